"""ANCE mining: the model to be trained ranks the corpus, and documents that it wrongly ranks high become negatives.

Xiong et al. (2021), Approximate Nearest Neighbor Negative Contrastive Learning for Dense Text Retrieval,
arXiv:2007.00808. Here the search is exact, unless an approximate index is asked for.
"""

from __future__ import annotations

import os
import time
from collections import Counter
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

from sentence_transformers import SentenceTransformer

from st_clp.data import Collection
from st_clp.declaring import takes
from st_clp.encoding import EmbeddingStore
from st_clp.mining.account import MiningAccount
from st_clp.mining.bm25 import require_bm25
from st_clp.mining.chooser import Chooser
from st_clp.mining.ranking import Ranker, Ranking, require_one_score, rescore
from st_clp.mining.row_building import choose_negatives, make_rows, needs_of, positives_of, usable_part
from st_clp.mining.rows import TrainingRow, require_writable, to_dataset, write_rows
from st_clp.options import Encoding, MiningOptions
from st_clp.queries import (
    JUDGMENTS,
    JudgedQueries,
    QueryChain,
    QueryOptions,
    RoundTrip,
    make_chain,
)
from st_clp.search import require_index

if TYPE_CHECKING:
    from datasets import Dataset
    from sentence_transformers import CrossEncoder


@dataclass(frozen=True)
class MinedNegatives:
    """Training rows and the statistics of how they were mined.

    Attributes:
        rows: One for each query and relevant document.
        account: The statistics: what became of every query and every negative.
    """

    rows: list[TrainingRow]
    account: MiningAccount


@takes(options=MiningOptions, encoding=Encoding)
def mine_hard_negatives(
    model: SentenceTransformer,
    collection: Collection,
    *,
    options: MiningOptions,
    cross_encoder: CrossEncoder | None = None,
    negative_queries: str | QueryChain = JUDGMENTS,
    query_options: QueryOptions | None = None,
    query_store: str | os.PathLike[str] | None = None,
    store_dir: str | os.PathLike[str] | None = None,
    output_file: str | os.PathLike[str] | None = None,
    output_details: bool = False,
    verbose: bool = True,
    encoding: Encoding,
) -> Dataset:
    """Mine hard negatives with the model itself, and the queries that they answer, ready for CLPLoss.

    Every query with a relevant document gets a row, unless ``on_shortage`` says otherwise, and the account says what
    became of each. Negatives that come from ``on_shortage`` are marked in the rows. Where a query has fewer negatives
    than columns, the others hold the positive, which CLPLoss never uses as the row's negative.

    Args:
        model: The model that is about to be trained; its own similarity function ranks.
        collection: Documents, training queries and judgments.
        options
        cross_encoder: Rescores the candidates. Margins and the order of the negatives then use its scores; ranks stay
            those of the ranking.
        negative_queries: Where the queries of negatives come from, in order: ``"judgments"``, ``"local:MODEL"``,
            ``"openai:MODEL"``, ``"title"``, with commas between; the first that knows one for a negative wins. Or a
            :class:`st_clp.queries.QueryChain` of sources.
        query_options: How queries are made and checked; None takes the defaults.
        query_store: A SQLite file that keeps what is generated, so that nothing is paid for twice; None keeps it in
            memory. A chain has its own.
        store_dir: A folder to keep the documents' embeddings in, and the queries' in one beside it, so that stopped
            mining can be resumed, and mining again with other options encodes nothing; None keeps them in memory.
        output_file: Write the rows here too, as JSON lines in the format of the paper's code.
        output_details: Add columns with ids, ranks, scores and how each negative was chosen
            (``st_clp.mining.DETAIL_COLUMNS``); take them out before training.
        verbose: Print the account.
        encoding

    Returns:
        Columns ``anchor``, ``positive``, ``negative_1`` …, ``negative_query_1`` …, ``label`` (the weight of each
        negative query: 0 where none is known). The account is kept as ``info.description``; :func:`mine` returns it
        as an object that can be plotted.

    Raises:
        CollectionError: No query has a relevant document, or the corpus is too small for so many negatives.
        EndpointError: An endpoint that is to write queries refuses the key or does not have the model.
        ModuleNotFoundError: Something that an option needs is not installed.
        OSError: The disk is full or cannot be written; the embeddings that are finished are kept.
        ValueError: An option is out of range, or an embedding is not finite (with the document's id).
    """
    if output_file is not None:
        require_writable(output_file)
    mined = mine(
        model,
        collection,
        options,
        cross_encoder=cross_encoder,
        negative_queries=negative_queries,
        query_options=query_options,
        query_store=query_store,
        store_dir=store_dir,
        encoding=encoding,
    )
    if output_file is not None:
        write_rows(output_file, mined.rows)
    if verbose:
        print(mined.account)
    return to_dataset(
        mined.rows,
        num_negatives=options.num_negatives,
        queries_per_negative=options.queries_per_negative,
        details=output_details,
        description=str(mined.account),
    )


@takes(encoding=Encoding)
def mine(
    model: SentenceTransformer,
    collection: Collection,
    options: MiningOptions | None = None,
    *,
    cross_encoder: CrossEncoder | None = None,
    negative_queries: str | QueryChain = JUDGMENTS,
    query_options: QueryOptions | None = None,
    query_store: str | os.PathLike[str] | None = None,
    store_dir: str | os.PathLike[str] | None = None,
    encoding: Encoding,
) -> MinedNegatives:
    """As :func:`mine_hard_negatives`, but returns the rows with ids, ranks, scores and the account."""
    options = options or MiningOptions()
    _require_possible(model, collection, options, cross_encoder)
    encoding.require_folder(store_dir, "store_dir")
    query_options = (query_options or QueryOptions(seed=options.seed)).with_samples(options.queries_per_negative)
    # Errors in a source are reported before anything is encoded.
    sources = (
        make_chain(
            negative_queries,
            query_options,
            store=query_store,
            show_progress_bar=encoding.show_progress_bar,
            cluster=encoding,
        )
        if isinstance(negative_queries, str)
        else nullcontext(negative_queries)
    )
    with sources as chain:
        return _mine(model, collection, options, cross_encoder, chain, query_options, store_dir, encoding)


def _mine(
    model: SentenceTransformer,
    collection: Collection,
    options: MiningOptions,
    cross_encoder: CrossEncoder | None,
    chain: QueryChain,
    query_options: QueryOptions,
    store_dir: str | os.PathLike[str] | None,
    encoding: Encoding,
) -> MinedNegatives:
    clock = _Clock()
    store = EmbeddingStore.build(model, collection, store_dir, encoding=encoding)
    clock.lap("documents")
    usable = usable_part(collection, store)
    drawn = usable if options.max_queries is None else _draw_queries(usable, options.max_queries, options.seed)
    ranker = Ranker(model, drawn, store, options, encoding, store_dir=store_dir)
    clock.lap("queries")
    ranking = ranker.rank()
    clock.lap("search")
    if cross_encoder is not None:
        rescore(ranking, drawn, cross_encoder, encoding)
        clock.lap("rescoring")
    # All judgments say whether a document answers another query, not only those of drawn queries.
    known = JudgedQueries(usable, seed=options.seed)
    prefer = known if options.prefer_known_queries and chain.has_judgments else None
    chooser = Chooser(drawn, store.ids, options, prefer=prefer)
    chosen, documents, passed_over = choose_negatives(drawn, ranking, chooser)
    dropped = chooser.short if options.on_shortage == "drop" else set()
    chosen = {query_id: choices for query_id, choices in chosen.items() if query_id not in dropped}
    positives = {
        query_id: positives_of(drawn, ranking, query_id, options.max_positives_per_query) for query_id in chosen
    }
    clock.lap("choice")
    found, queries_account = chain.assign(
        needs_of(chosen, positives),
        known,
        documents,
        number=options.queries_per_negative,
        language=collection.language,
        round_trip=_round_trip(model, store, query_options, encoding),
    )
    rows = make_rows(drawn, chosen, positives, documents, found)
    clock.lap("queries of negatives")
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
    account.add_queries(queries_account)
    return MinedNegatives(rows, account)


def _require_possible(
    model: SentenceTransformer, collection: Collection, options: MiningOptions, cross_encoder: CrossEncoder | None
) -> None:
    """Check before encoding what would otherwise fail after it."""
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
    """Measures the seconds of each stage."""

    def __init__(self) -> None:
        self.laps: dict[str, float] = {}
        self._last = time.perf_counter()

    def lap(self, name: str) -> None:
        now = time.perf_counter()
        self.laps[name], self._last = now - self._last, now


def _draw_queries(collection: Collection, number: int, seed: int) -> Collection:
    """Draw so many of the queries that have a relevant document."""
    return collection.with_queries(collection.positives()).sample(number, seed)


def _refused(chooser: Chooser, ranking: Ranking, passed_over: Counter[str]) -> dict[str, int]:
    refused = sum(chooser.refused.values(), Counter[str]())
    refused["near-duplicate of a relevant document"] = ranking.near_duplicates
    refused["the query's own id"] = ranking.own_documents
    return {reason: number for reason, number in (refused + passed_over).items() if number}


def _round_trip(
    model: SentenceTransformer, store: EmbeddingStore, options: QueryOptions, encoding: Encoding
) -> RoundTrip | None:
    """The round-trip check of generated queries; None where it is off."""
    if options.query_round_trip == "off":
        return None
    return RoundTrip(model, store, k=options.query_round_trip_k, action=options.query_round_trip, encoding=encoding)
