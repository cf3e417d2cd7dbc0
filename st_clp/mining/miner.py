"""ANCE mining: the model that is about to be trained ranks the corpus, and what it wrongly ranks high is a negative.

Xiong et al. (2021), Approximate Nearest Neighbor Negative Contrastive Learning for Dense Text Retrieval,
arXiv:2007.00808. Here the search is exact, unless an approximate index is asked for.
"""

from __future__ import annotations

import os
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

from sentence_transformers import SentenceTransformer

from st_clp.data import Collection, Document
from st_clp.encoding import ComputeDtype, EmbeddingStore
from st_clp.mining.account import MiningAccount
from st_clp.mining.chooser import Choice, Chooser
from st_clp.mining.negative_queries import (
    JUDGMENTS,
    JudgedQueries,
    Need,
    NegativeQuery,
    QueryChain,
    QueryOptions,
    RoundTrip,
    make_chain,
)
from st_clp.mining.options import (
    CandidateSource,
    JudgedNegatives,
    MiningOptions,
    OnShortage,
    SamplingStrategy,
)
from st_clp.mining.ranking import Ranker, Ranking
from st_clp.mining.rescoring import rescore
from st_clp.mining.rows import Negative, TrainingRow, to_dataset, write_rows

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
    negative_queries: str | QueryChain = JUDGMENTS,
    query_options: QueryOptions | None = None,
    query_store: str | os.PathLike[str] | None = None,
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
        queries_per_negative: Queries for each negative; 0 for none.
        range_min: Skip this many of the best-ranked candidates.
        range_max: Take candidates from no further down than this rank.
        absolute_margin: A negative must score at least this much below the query's best positive.
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
        negative_queries: Where the queries of negatives come from, in order: ``"judgments"``, ``"local:MODEL"``,
            ``"openai:MODEL"``, ``"title"``, with commas between; the first that knows one for a negative, wins. Or a
            :class:`st_clp.mining.negative_queries.QueryChain` of sources.
        query_options: How queries are made and checked; None has the defaults.
        query_store: A SQLite file that keeps what is generated, so that nothing is paid for twice; None keeps it in
            memory. A chain has its own.
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
        EndpointError: An endpoint that is to write queries refuses the key or does not have the model.
        ModuleNotFoundError: Something that an option needs is not installed.
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
    mined = mine(
        model,
        collection,
        options,
        cross_encoder=cross_encoder,
        negative_queries=negative_queries,
        query_options=query_options,
        query_store=query_store,
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
    negative_queries: str | QueryChain = JUDGMENTS,
    query_options: QueryOptions | None = None,
    query_store: str | os.PathLike[str] | None = None,
    dtype: ComputeDtype = "auto",
    batch_size: int | None = None,
    store_dir: str | os.PathLike[str] | None = None,
    show_progress_bar: bool = True,
) -> MinedNegatives:
    """As :func:`mine_hard_negatives`, but returns the rows with ids, ranks, scores and the account."""
    options = options or MiningOptions()
    query_options = query_options or QueryOptions(query_samples=max(1, options.queries_per_negative), seed=options.seed)
    if isinstance(negative_queries, str):
        # What is wrong with a source is said before anything is encoded.
        with make_chain(
            negative_queries, query_options, store=query_store, show_progress_bar=show_progress_bar
        ) as chain:
            return mine(
                model,
                collection,
                options,
                cross_encoder=cross_encoder,
                negative_queries=chain,
                query_options=query_options,
                dtype=dtype,
                batch_size=batch_size,
                store_dir=store_dir,
                show_progress_bar=show_progress_bar,
            )
    chain = negative_queries
    collection.require_positives()
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
    prefer = known if options.prefer_known_queries and chain.has_judgments else None
    chooser = Chooser(drawn, store.ids, options, prefer=prefer)
    chosen, documents, blank = _choose(drawn, ranking, chooser)
    dropped = chooser.short if options.on_shortage == "drop" else set()
    chosen = {query_id: choices for query_id, choices in chosen.items() if query_id not in dropped}
    positives = {query_id: _positives(drawn, ranking, query_id, options.max_positives_per_query) for query_id in chosen}
    clock.lap("choice")
    found, queries_account = chain.assign(
        _needs(chosen, positives),
        known,
        documents,
        number=options.queries_per_negative,
        language=collection.language,
        round_trip=_round_trip(model, store, query_options, dtype, batch_size),
    )
    rows = _make_rows(drawn, chosen, positives, documents, found)
    clock.lap("queries of negatives")
    account = MiningAccount(
        collection.name,
        queries=len(collection.queries),
        queries_without_positive=len(collection.queries) - len(usable.positives()),
        queries_not_drawn=len(usable.positives()) - len(drawn.positives()),
        queries_dropped=len(dropped),
        filtered=_refused(chooser, ranking, blank),
        left_out=usable.left_out,
        search=asdict(ranking.note) if ranking.note else None,
        seconds=clock.laps,
    )
    account.add_rows(rows, options.num_negatives)
    account.add_queries(queries_account)
    return MinedNegatives(rows, account)


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


def _refused(chooser: Chooser, ranking: Ranking, blank: int) -> dict[str, int]:
    refused = dict(sum(chooser.refused.values(), Counter()))
    if ranking.near_duplicates:
        refused["near-duplicate of a relevant document"] = ranking.near_duplicates
    if blank:
        refused["document without text"] = blank
    return refused


def _choose(
    collection: Collection, ranking: Ranking, chooser: Chooser
) -> tuple[dict[str, list[Choice]], dict[str, Document], int]:
    """Every query's negatives, all documents in the rows by id, and how many blank documents were passed over.

    A document with the same text as a relevant one is an answer too, whatever its id, and one without text teaches
    nothing. Texts are only known once documents are chosen, so such a choice is excluded and made again until there
    is none.
    """
    blank: set[str] = set()
    chosen: dict[str, list[Choice]] = {}
    documents: dict[str, Document] = {}
    open_queries = ranking.query_ids
    while open_queries:
        for query_id in open_queries:
            chosen[query_id] = chooser.choose(query_id, ranking)
        wanted = {choice.doc_id for query_id in open_queries for choice in chosen[query_id]}
        wanted |= {doc_id for query_id in open_queries for doc_id in ranking.positive_scores[query_id]}
        found = collection.get_documents(wanted - documents.keys())
        documents.update(found)
        again = []
        empty = {doc_id for doc_id in found if not documents[doc_id].text.strip()}
        ranking.exclude_everywhere(empty)
        blank |= empty
        for query_id in open_queries:
            answers = {documents[doc_id].text for doc_id in ranking.positive_scores[query_id]}
            copies = {choice.doc_id for choice in chosen[query_id] if documents[choice.doc_id].text in answers}
            ranking.exclude(query_id, copies)
            if copies or any(choice.doc_id in blank for choice in chosen[query_id]):
                again.append(query_id)
        open_queries = again
    return chosen, documents, len(blank)


def _needs(chosen: dict[str, list[Choice]], positives: dict[str, list[tuple[str, float]]]) -> Iterator[Need]:
    """Every row's negatives."""
    for query_id, choices in chosen.items():
        for positive_id, _ in positives[query_id]:
            yield from (Need(query_id, positive_id, choice.doc_id) for choice in choices)


def _round_trip(
    model: SentenceTransformer,
    store: EmbeddingStore,
    options: QueryOptions,
    dtype: ComputeDtype,
    batch_size: int | None,
) -> RoundTrip | None:
    """The check of what is generated; None where there is to be none."""
    if options.query_round_trip == "off":
        return None
    k, action = options.query_round_trip_k, options.query_round_trip
    return RoundTrip(model, store, k=k, action=action, dtype=dtype, batch_size=batch_size)


def _make_rows(
    collection: Collection,
    chosen: dict[str, list[Choice]],
    positives: dict[str, list[tuple[str, float]]],
    documents: dict[str, Document],
    queries: dict[Need, tuple[NegativeQuery, ...]],
) -> list[TrainingRow]:
    def negative(choice: Choice, query_id: str, positive_id: str) -> Negative:
        found = queries.get(Need(query_id, positive_id, choice.doc_id), ())
        return Negative(
            choice.doc_id,
            documents[choice.doc_id].text,
            choice.rank,
            choice.score,
            choice.source,
            tuple(query.text for query in found),
            tuple(query.source for query in found),
            tuple(query.weight for query in found),
        )

    return [
        TrainingRow(
            query_id,
            collection.queries[query_id],
            positive_id,
            documents[positive_id].text,
            score,
            tuple(negative(choice, query_id, positive_id) for choice in chosen[query_id]),
        )
        for query_id in chosen
        for positive_id, score in positives[query_id]
    ]


def _positives(collection: Collection, ranking: Ranking, query_id: str, at_most: int | None) -> list[tuple[str, float]]:
    """The query's relevant documents with their scores: all of them, or the best-judged."""
    scored = list(ranking.positive_scores[query_id].items())
    if at_most is None or len(scored) <= at_most:
        return scored
    grades = collection.judgments[query_id]
    return sorted(scored, key=lambda pair: (-grades[pair[0]], -pair[1]))[:at_most]
