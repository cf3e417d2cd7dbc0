"""ANCE mining: the model that is about to be trained ranks the corpus, and what it wrongly ranks high is a negative.

Xiong et al. (2021), Approximate Nearest Neighbor Negative Contrastive Learning for Dense Text Retrieval,
arXiv:2007.00808. Here the search is exact, unless an approximate index is asked for.
"""

from __future__ import annotations

import os
import time
from collections import Counter
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

from sentence_transformers import SentenceTransformer

from st_clp.data import Collection
from st_clp.encoding import ComputeDtype, EmbeddingStore
from st_clp.mining.account import MiningAccount
from st_clp.mining.bm25 import require_bm25
from st_clp.mining.chooser import Choice, Chooser
from st_clp.mining.negative_queries import JudgedQueries
from st_clp.mining.options import (
    CandidateSource,
    JudgedNegatives,
    MiningOptions,
    OnShortage,
    SamplingStrategy,
)
from st_clp.mining.ranking import Ranker, Ranking
from st_clp.mining.rescoring import require_one_score, rescore
from st_clp.mining.rows import Negative, TrainingRow, require_writable, to_dataset, write_rows
from st_clp.search import require_index

if TYPE_CHECKING:
    from datasets import Dataset
    from sentence_transformers import CrossEncoder


@dataclass(frozen=True)
class MinedNegatives:
    """Training rows and the account of how they came about.

    Attributes:
        rows: One for each query and relevant document.
        account: What became of every query and every negative.
    """

    rows: list[TrainingRow]
    account: MiningAccount


def mine_hard_negatives(
    model: SentenceTransformer,
    collection: Collection,
    *,
    num_negatives: int = 4,
    queries_per_negative: int = 1,
    range_min: int = 0,
    range_max: int = 100,
    absolute_margin: float | None = None,
    relative_margin: float | None = None,
    max_score: float | None = None,
    min_score: float | None = None,
    sampling_strategy: SamplingStrategy = "top",
    judged_negatives: JudgedNegatives | None = None,
    prefer_known_queries: bool = True,
    duplicate_threshold: float | None = None,
    on_shortage: OnShortage = "relax",
    candidates: CandidateSource = "model",
    cross_encoder: CrossEncoder | None = None,
    index: str | None = None,
    nprobe: int | None = None,
    max_queries: int | None = None,
    max_positives_per_query: int | None = None,
    dtype: ComputeDtype = "auto",
    batch_size: int | None = None,
    seed: int = 0,
    store_dir: str | os.PathLike[str] | None = None,
    output_file: str | os.PathLike[str] | None = None,
    output_details: bool = False,
    show_progress_bar: bool = True,
    verbose: bool = True,
) -> Dataset:
    """Mine hard negatives with the model itself, and the queries that they answer, ready for CLPLoss.

    Every query with a relevant document comes back, unless ``on_shortage`` says otherwise, and the account says what
    became of each.

    Args:
        model: The model that is about to be trained; its own similarity function ranks.
        collection: Documents, training queries and judgments.
        num_negatives: Negatives for each query.
        queries_per_negative: Queries for each negative, from the training judgments; 0 for none.
        range_min: Skip this many of the best candidates that pass the margins and the score limits.
        range_max: Take candidates from no further down than this rank.
        absolute_margin: A negative must score at least this much below the query's lowest-scoring positive.
        relative_margin: The same, as a share of that positive's score.
        max_score: A negative must score at most this.
        min_score: A negative must score at least this.
        sampling_strategy: ``"top"`` takes the best-ranked, ``"random"`` draws from all candidates that are left.
        judged_negatives: What to do with documents that are judged not relevant (grade 0): ``"rank"`` leaves
            them in the ranking, where the margins do not apply to them; ``"first"`` takes them before all others;
            ``"ignore"`` treats them as not judged. None: ``"first"`` for training rows that name their negatives,
            ``"rank"`` otherwise.
        prefer_known_queries: Take candidates for which the judgments know a query before those without one, so
            that the penalty holds as many negatives as can be. In a small corpus this also keeps documents that
            no training query asks for from being pushed away by every query and pulled by none.
        duplicate_threshold: Candidates whose embedding has at least this cosine with that of a relevant document are
            no negatives: most are the same passage in other words. A document with the very text of a relevant one
            never is, whatever this says. None: there is no threshold.
        on_shortage: What to do for a query that the filters leave with too few negatives. ``"relax"`` takes the
            candidates that failed a filter by least, then random documents; ``"random"`` takes random documents
            alone; ``"fewer"`` leaves it with fewer (their columns hold the positive, which CLPLoss never
            takes for the row's negative); ``"drop"`` leaves out the query. All are counted in the account and marked
            in the rows.
        candidates: What ranks: the ``"model"``; ``"bm25"`` (which needs bm25s); or both ``"mixed"`` by reciprocal
            rank. The scores, and so the margins, are the model's in any case.
        cross_encoder: Scores the candidates anew; margins and the order of the negatives go by its scores, ranks by
            the ranking's.
        index: Search approximately by this FAISS factory, such as ``"IVF4096,PQ64"`` or ``"HNSW32"``; its recall is
            in the account. None searches exactly.
        nprobe: How many lists an IVF index looks through for a query.
        max_queries: Use no more than this many of the collection's queries (so of its language), drawn at random.
        max_positives_per_query: Make no more than this many rows of a query, with its best-judged positives.
        dtype: What the model computes in: ``"model"`` its own precision, ``"bfloat16"``, or ``"auto"``: bfloat16 where
            the hardware multiplies it, several times as fast.
        batch_size: No more texts than this in one forward pass. None: as many as fill it with tokens.
        seed: Of everything random.
        store_dir: A folder to keep the documents' embeddings in, and the queries' in one beside it, so that mining can
            be stopped and gone on with, and mining again with other options encodes nothing; None keeps them in memory.
        output_file: Write the rows here too, as JSON lines in the format of the paper's code.
        output_details: Add columns with ids, ranks, scores and how each negative was chosen
            (``st_clp.mining.DETAIL_COLUMNS``); take them out before training.
        show_progress_bar: Show progress.
        verbose: Print the account.

    Returns:
        Columns ``anchor``, ``positive``, ``negative_1`` …, ``negative_query_1`` …, ``label`` (the weight of each
        negative query: 0 where none is known). The account is kept as ``info.description``; :func:`mine` returns it
        as an object that can be plotted.

    Raises:
        CollectionError: No query has a relevant document, or the corpus is too small for so many negatives.
        ModuleNotFoundError: Something that an option needs is not installed.
        OSError: The disk is full or cannot be written; the embeddings that are finished are kept.
        ValueError: An option is out of range, or an embedding is not finite (with the document's id).
    """
    options = MiningOptions(
        num_negatives=num_negatives,
        queries_per_negative=queries_per_negative,
        range_min=range_min,
        range_max=range_max,
        absolute_margin=absolute_margin,
        relative_margin=relative_margin,
        max_score=max_score,
        min_score=min_score,
        sampling_strategy=sampling_strategy,
        judged_negatives=judged_negatives,
        prefer_known_queries=prefer_known_queries,
        duplicate_threshold=duplicate_threshold,
        on_shortage=on_shortage,
        candidates=candidates,
        index=index,
        nprobe=nprobe,
        max_queries=max_queries,
        max_positives_per_query=max_positives_per_query,
        seed=seed,
    )
    if output_file is not None:
        require_writable(output_file)
    mined = mine(
        model,
        collection,
        options,
        cross_encoder=cross_encoder,
        dtype=dtype,
        batch_size=batch_size,
        store_dir=store_dir,
        show_progress_bar=show_progress_bar,
    )
    if output_file is not None:
        write_rows(output_file, mined.rows)
    if verbose:
        print(mined.account)
    return to_dataset(
        mined.rows,
        num_negatives=num_negatives,
        queries_per_negative=queries_per_negative,
        details=output_details,
        description=str(mined.account),
    )


def mine(
    model: SentenceTransformer,
    collection: Collection,
    options: MiningOptions | None = None,
    *,
    cross_encoder: CrossEncoder | None = None,
    dtype: ComputeDtype = "auto",
    batch_size: int | None = None,
    store_dir: str | os.PathLike[str] | None = None,
    show_progress_bar: bool = True,
) -> MinedNegatives:
    """As :func:`mine_hard_negatives`, but returns the rows with ids, ranks, scores and the account."""
    options = options or MiningOptions()
    _require_possible(model, collection, options, cross_encoder)
    clock = _Clock()
    store = EmbeddingStore.build(
        model, collection, store_dir, dtype=dtype, batch_size=batch_size, show_progress_bar=show_progress_bar
    )
    clock.lap("documents")
    usable = _usable(collection, store)
    drawn = usable if options.max_queries is None else _draw_queries(usable, options.max_queries, options.seed)
    ranker = Ranker(
        model,
        drawn,
        store,
        options,
        store_dir=store_dir,
        dtype=dtype,
        batch_size=batch_size,
        show_progress_bar=show_progress_bar,
    )
    clock.lap("queries")
    ranking = ranker.rank()
    clock.lap("search")
    if cross_encoder is not None:
        rescore(ranking, drawn, cross_encoder, batch_size=batch_size, show_progress_bar=show_progress_bar)
        clock.lap("rescoring")
    # Whether a document answers another query is known from all judgments, drawn or not.
    known = JudgedQueries(usable, seed=options.seed)
    chooser = Chooser(drawn, store.ids, options, prefer=known if options.prefer_known_queries else None)
    chosen, texts, passed_over = _choose(drawn, ranking, chooser)
    dropped = chooser.short if options.on_shortage == "drop" else set()
    rows = _make_rows(drawn, ranking, {q: c for q, c in chosen.items() if q not in dropped}, texts, known, options)
    clock.lap("choice")
    account = MiningAccount(
        collection.name,
        queries=len(collection.queries),
        queries_without_positive=len(collection.queries) - len(usable.positives()),
        queries_not_drawn=len(usable.positives()) - len(drawn.positives()),
        queries_dropped=len(dropped),
        filtered=_refused(chooser, ranking, passed_over),
        left_out=usable.left_out,
        search=asdict(ranking.note) if ranking.note else None,
        seconds=clock.laps,
    )
    account.add_rows(rows, options.num_negatives)
    return MinedNegatives(rows, account)


def _require_possible(
    model: SentenceTransformer, collection: Collection, options: MiningOptions, cross_encoder: CrossEncoder | None
) -> None:
    """Refuse before hours of encoding what would be refused after them."""
    for name, value, kind in (("model", model, SentenceTransformer), ("collection", collection, Collection)):
        if not isinstance(value, kind):
            raise TypeError(f"{name} must be a {kind.__name__}, got {type(value).__name__}")
    collection.require_positives()
    if options.candidates != "model":
        require_bm25()
    if options.index is not None:
        require_index(model, options.index)
    if cross_encoder is not None:
        require_one_score(cross_encoder)


class _Clock:
    """Seconds between laps, by name."""

    def __init__(self) -> None:
        self.laps: dict[str, float] = {}
        self._last = time.perf_counter()

    def lap(self, name: str) -> None:
        now = time.perf_counter()
        self.laps[name], self._last = now - self._last, now


def _usable(collection: Collection, store: EmbeddingStore) -> Collection:
    """The collection without judgments that cannot be used: of documents that are not there, or have no text.

    Raises:
        CollectionError: No query with a relevant document is left.
    """
    usable = collection.without_missing_documents(store.ids)
    relevant = {doc_id for doc_ids in usable.positives().values() for doc_id in doc_ids}
    blank = {doc_id for doc_id, document in usable.get_documents(relevant).items() if not document.text.strip()}
    usable = usable.without_documents(blank, "judgments of a document without text")
    usable.require_positives()
    if usable is not collection:
        usable.say_left_out()
    return usable


def _draw_queries(collection: Collection, number: int, seed: int) -> Collection:
    """The collection with so many of the queries that have a relevant document."""
    return collection.with_queries(collection.positives()).sample(number, seed)


def _refused(chooser: Chooser, ranking: Ranking, passed_over: Counter[str]) -> dict[str, int]:
    refused = sum(chooser.refused.values(), Counter[str]())
    refused["near-duplicate of a relevant document"] = ranking.near_duplicates
    return {reason: number for reason, number in (refused + passed_over).items() if number}


def _choose(
    collection: Collection, ranking: Ranking, chooser: Chooser
) -> tuple[dict[str, list[Choice]], dict[str, str], Counter[str]]:
    """Every query's negatives, the texts of all documents in the rows, and what was passed over for its text.

    A document with the same text as a relevant one is an answer too, whatever its id, and one without text teaches
    nothing. Texts are only known once documents are chosen, so such a choice is excluded and made again until there
    is none.
    """
    passed_over: Counter[str] = Counter()
    blank: set[str] = set()
    chosen: dict[str, list[Choice]] = {}
    texts: dict[str, str] = {}
    open_queries = ranking.query_ids
    while open_queries:
        for query_id in open_queries:
            chosen[query_id] = chooser.choose(query_id, ranking)
        wanted = {choice.doc_id for query_id in open_queries for choice in chosen[query_id]}
        wanted |= {doc_id for query_id in open_queries for doc_id in ranking.positive_scores[query_id]}
        found = collection.get_documents(wanted - texts.keys())
        texts.update({doc_id: document.text for doc_id, document in found.items()})
        again = []
        empty = {doc_id for doc_id in found if not texts[doc_id].strip()}
        ranking.exclude_everywhere(empty)
        blank |= empty
        passed_over["document without text"] += len(empty)
        for query_id in open_queries:
            answers = {texts[doc_id] for doc_id in ranking.positive_scores[query_id]}
            copies = {choice.doc_id for choice in chosen[query_id] if texts[choice.doc_id] in answers}
            ranking.exclude(query_id, copies)
            passed_over["same text as a relevant document"] += len(copies)
            if copies or any(choice.doc_id in blank for choice in chosen[query_id]):
                again.append(query_id)
        open_queries = again
    return chosen, texts, passed_over


def _make_rows(
    collection: Collection,
    ranking: Ranking,
    chosen: dict[str, list[Choice]],
    texts: dict[str, str],
    known: JudgedQueries,
    options: MiningOptions,
) -> list[TrainingRow]:
    def negative(choice: Choice, query_id: str, positive_id: str) -> Negative:
        queries = known.find(
            choice.doc_id, query_id=query_id, positive_id=positive_id, number=options.queries_per_negative
        )
        return Negative(choice.doc_id, texts[choice.doc_id], choice.rank, choice.score, choice.source, tuple(queries))

    return [
        TrainingRow(
            query_id,
            collection.queries[query_id],
            positive_id,
            texts[positive_id],
            score,
            tuple(negative(choice, query_id, positive_id) for choice in chosen[query_id]),
        )
        for query_id in chosen
        for positive_id, score in _positives(collection, ranking, query_id, options.max_positives_per_query)
    ]


def _positives(collection: Collection, ranking: Ranking, query_id: str, at_most: int | None) -> list[tuple[str, float]]:
    """The query's relevant documents with their scores: all of them, or the best-judged."""
    scored = list(ranking.positive_scores[query_id].items())
    if at_most is None or len(scored) <= at_most:
        return scored
    grades = collection.judgments[query_id]
    return sorted(scored, key=lambda pair: (-grades[pair[0]], -pair[1]))[:at_most]
