"""Rank the corpus for the training queries: by the model, by BM25, or by both."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from sentence_transformers import SentenceTransformer
from tqdm.auto import tqdm

from st_clp.data import Collection, MemoryCorpus
from st_clp.encoding import EmbeddingStore
from st_clp.mining.bm25 import BM25, fuse
from st_clp.mining.filters import Candidate
from st_clp.options import Encoding, MiningOptions
from st_clp.search import ApproximateIndex, is_own_document, pair_scores, search_rows

if TYPE_CHECKING:
    from sentence_transformers import CrossEncoder


# Queries whose candidates are scored in one call: enough for batches of similar length, few enough to hold their texts.
RESCORED_TOGETHER = 1024
PAIRS_A_BATCH = 32


def rescore(
    ranking: Ranking,
    collection: Collection,
    cross_encoder: CrossEncoder,
    encoding: Encoding,
) -> None:
    """Score every candidate and relevant document of each query by a cross-encoder.

    Args:
        ranking: Its scores are replaced; its ranks stay.
        collection: Where the texts are.
        cross_encoder: Scores (query, document) pairs, one number each.
        encoding: How many pairs in one forward pass (by default 32), and whether progress is shown.

    Raises:
        ValueError: The cross-encoder gives more than one number for a pair, or one that is not finite.
    """
    require_one_score(cross_encoder)
    with tqdm(
        total=len(ranking.query_ids), desc="Rescoring", unit=" queries", disable=not encoding.show_progress_bar
    ) as progress:
        for begin in range(0, len(ranking.query_ids), RESCORED_TOGETHER):
            block = ranking.query_ids[begin : begin + RESCORED_TOGETHER]
            _rescore_block(ranking, collection, cross_encoder, block, encoding.encode_batch_size or PAIRS_A_BATCH)
            progress.update(len(block))


def require_one_score(cross_encoder: CrossEncoder) -> None:
    """Require a cross-encoder with a single output.

    Raises:
        ValueError: It gives more than one number for a pair.
    """
    if cross_encoder.num_labels != 1:
        raise ValueError(
            f"the cross-encoder gives {cross_encoder.num_labels} numbers for a pair; rescoring needs one that gives a "
            "single score (num_labels=1)"
        )


def _rescore_block(
    ranking: Ranking, collection: Collection, cross_encoder: CrossEncoder, query_ids: list[str], batch_size: int
) -> None:
    pairs = [(q, doc_id) for q in query_ids for doc_id in ranking.positive_scores[q]]
    positives = len(pairs)
    pairs += [(q, candidate.doc_id) for q in query_ids for candidate in ranking.candidates(q)]
    documents = collection.get_documents({doc_id for _, doc_id in pairs})
    texts = [(collection.queries[q], documents[doc_id].text) for q, doc_id in pairs]
    scores = np.asarray(cross_encoder.predict(texts, batch_size=batch_size, show_progress_bar=False), np.float64)
    if not np.isfinite(scores).all():
        query_id, doc_id = pairs[int(np.flatnonzero(~np.isfinite(scores))[0])]
        raise ValueError(f"the cross-encoder's score of query {query_id!r} and document {doc_id!r} is not finite")
    found: dict[str, tuple[dict[str, float], dict[str, float]]] = {q: ({}, {}) for q in query_ids}
    for number, ((query_id, doc_id), score) in enumerate(zip(pairs, scores.tolist(), strict=True)):
        found[query_id][number >= positives][doc_id] = score
    for query_id, (relevant, candidates) in found.items():
        ranking.replace_scores(query_id, relevant, candidates)


QUERIES_TOGETHER = 1024  # whose candidates' embeddings are held at once
PAIRS_TOGETHER = 65_536  # of queries and positives, whose embeddings are


@dataclass(frozen=True)
class SearchNote:
    """The quality of an approximate search: the index's factory, and its recall over so many queries."""

    index: str
    recall: float
    recall_queries: int


def queries_of(collection: Collection) -> MemoryCorpus:
    """The queries with a relevant document, as texts to encode."""
    return MemoryCorpus(
        f"{collection.name} queries", {name: collection.queries[name] for name in collection.positives()}
    )


def query_store_dir(store_dir: str | os.PathLike[str]) -> str:
    """The folder of the queries' embeddings: beside the documents'."""
    return f"{os.fspath(store_dir)}.queries"


class Ranking:
    """The ranking of the corpus for every training query, without the relevant documents.

    Attributes:
        query_ids: The queries that are ranked for.
        positive_scores: Query id to {relevant document's id: its similarity to the query}.
        near_duplicates: How many candidates were left out as near-duplicates of a relevant document.
        own_documents: How many documents were left out for having their query's own id.
        note: The quality of an approximate search; None after an exact one.
        by_score: Whether candidates are taken by score instead of by rank.
    """

    def __init__(
        self,
        positive_scores: dict[str, dict[str, float]],
        doc_ids: Sequence[str],
        rows: np.ndarray,
        scores: np.ndarray,
        *,
        note: SearchNote | None = None,
    ) -> None:
        self.query_ids = list(positive_scores)
        self.positive_scores = positive_scores
        self.near_duplicates = self.own_documents = 0
        self.note = note
        self.by_score = False
        self._doc_ids = doc_ids
        self._place = {query_id: row for row, query_id in enumerate(self.query_ids)}
        self._rows, self._scores = rows, scores
        self._excluded = {query_id: set(relevant) for query_id, relevant in positive_scores.items()}
        self._excluded_everywhere: set[str] = set()

    def candidates(self, query_id: str) -> list[Candidate]:
        """The query's candidates, best first, without its relevant documents."""
        place = self._place[query_id]
        excluded = self.excluded(query_id)
        found = [
            (self._doc_ids[row], score)
            for row, score in zip(self._rows[place].tolist(), self._scores[place].tolist(), strict=True)
            if row >= 0
        ]
        kept = [pair for pair in found if pair[0] not in excluded]
        return [Candidate(doc_id, rank, score) for rank, (doc_id, score) in enumerate(kept)]

    def excluded(self, query_id: str) -> set[str]:
        """Documents that are not candidates: the relevant ones and those that were excluded."""
        return self._excluded[query_id] | self._excluded_everywhere

    def exclude(self, query_id: str, doc_ids: set[str]) -> None:
        """Exclude documents from a query's candidates."""
        self._excluded[query_id] |= doc_ids

    def exclude_everywhere(self, doc_ids: set[str]) -> None:
        """Exclude documents from every query's candidates."""
        self._excluded_everywhere |= doc_ids

    def replace_scores(self, query_id: str, positives: dict[str, float], candidates: dict[str, float]) -> None:
        """Replace the model's scores by a cross-encoder's; ranks stay, but negatives are taken by score."""
        self.by_score = True
        self.positive_scores[query_id] = positives
        place = self._place[query_id]
        for column, row in enumerate(self._rows[place].tolist()):
            if row >= 0 and (score := candidates.get(self._doc_ids[row])) is not None:
                self._scores[place, column] = score


class Ranker:
    """Ranks a store's documents for a collection's queries.

    Args:
        model: The model that ranks.
        collection: Its queries that have a relevant document are ranked for.
        store: The documents' embeddings by the same model.
        options: How many candidates, from where, and which of them are near-duplicates.
        store_dir: The documents' folder, beside which the queries' embeddings are kept; None keeps them in memory.
        encoding: How the queries are encoded.
    """

    def __init__(
        self,
        model: SentenceTransformer,
        collection: Collection,
        store: EmbeddingStore,
        options: MiningOptions,
        encoding: Encoding,
        *,
        store_dir: str | os.PathLike[str] | None = None,
    ) -> None:
        self._model, self._collection, self._store, self._options = model, collection, store, options
        self._show_progress_bar, self._encoding = encoding.show_progress_bar, encoding
        self._positives = collection.positives()
        query_ids = list(self._positives)
        self._texts = [collection.queries[query_id] for query_id in query_ids]
        self._queries = EmbeddingStore.build(
            model,
            queries_of(collection),
            None if store_dir is None else query_store_dir(store_dir),
            task="query",
            encoding=encoding,
        ).rows(range(len(query_ids)))
        relevant = {doc_id for doc_ids in self._positives.values() for doc_id in doc_ids}
        self._position = store.positions(relevant | self._positives.keys())
        self._own = {
            query_id
            for query_id, doc_ids in self._positives.items()
            if query_id in self._position
            and query_id not in doc_ids
            and is_own_document(query_id, query_id, ignore_identical_ids=options.ignore_identical_ids)
        }
        # Relevant documents are ranked too, so look deeper by as many as the query with the most of them has; and by
        # one each for the query's own document and for another with its text, which are no candidates either.
        self._depth = min(len(store), options.range_max + max(map(len, self._positives.values())) + bool(self._own) + 1)

    def rank(self) -> Ranking:
        """Rank by the method that the options name.

        Raises:
            ModuleNotFoundError: BM25 is asked for and not installed.
            ValueError: An index that FAISS cannot make.
        """
        note = None
        if self._options.candidates == "bm25":
            rows = self._by_bm25()
            scores = self._score(rows)
        else:
            rows, scores, note = self._by_model()
            if self._options.candidates == "mixed":
                rows = fuse(rows, self._by_bm25(), k=self._depth)
                scores = self._score(rows)
        ranking = Ranking(self._score_positives(), self._store.ids, rows, scores, note=note)
        for query_id in self._own:
            ranking.exclude(query_id, {query_id})
        ranking.own_documents = len(self._own)
        for query_id, doc_ids in self._near_duplicates(rows):
            ranking.exclude(query_id, doc_ids)
            ranking.near_duplicates += len(doc_ids)
        return ranking

    def _by_model(self) -> tuple[np.ndarray, np.ndarray, SearchNote | None]:
        if self._options.index is None:
            scores, rows = search_rows(
                self._model,
                self._queries,
                self._store,
                self._depth,
                show_progress_bar=self._show_progress_bar,
                cluster=self._encoding,
            )
            return rows, scores, None
        index = ApproximateIndex(
            self._model,
            self._store,
            self._options.index,
            nprobe=self._options.nprobe,
            seed=self._options.seed,
            show_progress_bar=self._show_progress_bar,
        )
        found = index.search(self._queries, self._depth)
        # An index may hold approximate codes; margins must compare true scores.
        scores = self._score(found.rows)
        order = np.argsort(-scores, axis=1, kind="stable")
        rows, scores = np.take_along_axis(found.rows, order, axis=1), np.take_along_axis(scores, order, axis=1)
        return rows, scores, SearchNote(self._options.index, found.recall, found.recall_queries)

    def _by_bm25(self) -> np.ndarray:
        bm25 = BM25(self._collection.corpus, show_progress_bar=self._show_progress_bar)
        return bm25.search(self._texts, self._depth)

    def _score(self, rows: np.ndarray) -> np.ndarray:
        """The model's similarity of each query to the documents in these rows; -inf where the row is -1."""
        scores = np.full(rows.shape, -np.inf, dtype=np.float32)
        for begin in range(0, len(rows), QUERIES_TOGETHER):
            block = rows[begin : begin + QUERIES_TOGETHER]
            at, column = np.nonzero(block >= 0)
            documents = self._store.rows(block[at, column].tolist())
            scores[begin + at, column] = pair_scores(self._model, self._queries[begin + at], documents)
        return scores

    def _near_duplicates(self, rows: np.ndarray) -> Iterator[tuple[str, set[str]]]:
        """Yield (query id, its candidates that are near-duplicates of a relevant document)."""
        threshold = self._options.duplicate_threshold
        if threshold is None:
            return
        for row, (query_id, doc_ids) in enumerate(self._positives.items()):
            relevant = [self._position[doc_id] for doc_id in doc_ids]
            no_candidates = [*relevant, self._position[query_id]] if query_id in self._own else relevant
            ranked = rows[row][(rows[row] >= 0) & ~np.isin(rows[row], no_candidates)]
            likeness = _unit(self._store.rows(ranked.tolist())) @ _unit(self._store.rows(relevant)).T
            yield query_id, {self._store.ids[place] for place in ranked[(likeness >= threshold).any(axis=1)].tolist()}

    def _score_positives(self) -> dict[str, dict[str, float]]:
        pairs = [
            (row, query_id, doc_id)
            for row, (query_id, doc_ids) in enumerate(self._positives.items())
            for doc_id in doc_ids
        ]
        found: dict[str, dict[str, float]] = {query_id: {} for query_id in self._positives}
        for begin in range(0, len(pairs), PAIRS_TOGETHER):
            block = pairs[begin : begin + PAIRS_TOGETHER]
            documents = self._store.rows([self._position[doc_id] for _, _, doc_id in block])
            scores = pair_scores(self._model, self._queries[[row for row, _, _ in block]], documents)
            for (_, query_id, doc_id), score in zip(block, scores, strict=True):
                found[query_id][doc_id] = float(score)
        return found


def _unit(embeddings: np.ndarray) -> np.ndarray:
    return embeddings / np.maximum(np.linalg.norm(embeddings, axis=1, keepdims=True), 1e-12)
