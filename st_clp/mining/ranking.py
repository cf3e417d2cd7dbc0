"""What a model ranks for the training queries."""

from __future__ import annotations

import os
from collections.abc import Sequence

import numpy as np
from sentence_transformers import SentenceTransformer

from st_clp.data import Collection, MemoryCorpus
from st_clp.encoding import ComputeDtype, EmbeddingStore
from st_clp.mining.candidates import Candidate
from st_clp.search import pair_scores, search


class Ranking:
    """The corpus as the model ranks it for every training query, the relevant documents left out.

    Args:
        model: The model that ranks.
        collection: Its queries that have a relevant document are ranked for.
        store: The documents' embeddings by the same model.
        depth: How many candidates for each query.
        query_store_dir: A folder to keep the queries' embeddings in; None keeps them in memory.
        dtype: As in :func:`st_clp.encoding.encode_documents`.
        batch_size: No more texts than this in one forward pass. None: as many as fill it with tokens.
        show_progress_bar: Show the encoding of the queries.

    Attributes:
        query_ids: The queries that are ranked for.
        positive_scores: Query id to {relevant document's id: its similarity to the query}.
    """

    def __init__(
        self,
        model: SentenceTransformer,
        collection: Collection,
        store: EmbeddingStore,
        depth: int,
        *,
        query_store_dir: str | os.PathLike[str] | None = None,
        dtype: ComputeDtype = "model",
        batch_size: int | None = None,
        show_progress_bar: bool = True,
    ) -> None:
        positives = collection.positives()
        self.query_ids = list(positives)
        asked = MemoryCorpus(f"{collection.name} queries", {q: collection.queries[q] for q in self.query_ids})
        queries = EmbeddingStore.build(
            model,
            asked,
            query_store_dir,
            task="query",
            dtype=dtype,
            batch_size=batch_size,
            show_progress_bar=show_progress_bar,
        ).rows(range(len(self.query_ids)))
        self.positive_scores = _score_positives(model, store, positives, queries)
        self._excluded = {query_id: set(doc_ids) for query_id, doc_ids in positives.items()}
        # Relevant documents are in the ranking too, so look deeper by as many as the query with the most of them has.
        most = max(map(len, positives.values()))
        scores, doc_ids = search(model, queries, store, min(len(store), depth + most))
        self._rows = {query_id: (doc_ids[row], scores[row]) for row, query_id in enumerate(self.query_ids)}

    def candidates(self, query_id: str) -> list[Candidate]:
        """The query's candidates, best first, without its relevant documents."""
        excluded = self._excluded[query_id]
        kept = [(d, float(s)) for d, s in zip(*self._rows[query_id], strict=True) if d not in excluded]
        return [Candidate(doc_id, rank, score) for rank, (doc_id, score) in enumerate(kept)]

    def excluded(self, query_id: str) -> set[str]:
        """Documents that are no candidates: the relevant ones, and those that were excluded since."""
        return self._excluded[query_id]

    def exclude(self, query_id: str, doc_ids: set[str]) -> None:
        """Leave these documents out of the query's candidates too."""
        self._excluded[query_id] |= doc_ids


def _score_positives(
    model: SentenceTransformer, store: EmbeddingStore, positives: dict[str, list[str]], queries: np.ndarray
) -> dict[str, dict[str, float]]:
    position = {doc_id: row for row, doc_id in enumerate(store.ids)}
    pairs: Sequence[tuple[int, str, str]] = [
        (row, query_id, doc_id) for row, (query_id, doc_ids) in enumerate(positives.items()) for doc_id in doc_ids
    ]
    documents = store.rows(position[doc_id] for _, _, doc_id in pairs)
    scores = pair_scores(model, queries[[row for row, _, _ in pairs]], documents)
    found: dict[str, dict[str, float]] = {query_id: {} for query_id in positives}
    for (_, query_id, doc_id), score in zip(pairs, scores, strict=True):
        found[query_id][doc_id] = float(score)
    return found
