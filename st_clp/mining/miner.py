"""ANCE mining: the model that is about to be trained ranks the corpus, and what it wrongly ranks high is a negative.

Xiong et al. (2021), Approximate Nearest Neighbor Negative Contrastive Learning for Dense Text Retrieval,
arXiv:2007.00808. Here the search is exact.
"""

from __future__ import annotations

import logging
import os
import time
from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING

from sentence_transformers import SentenceTransformer

from st_clp.data import Collection
from st_clp.encoding import ComputeDtype, EmbeddingStore
from st_clp.mining.account import MiningAccount
from st_clp.mining.candidates import CandidateFilter
from st_clp.mining.chooser import Choice, Chooser, JudgedNegatives, SamplingStrategy
from st_clp.mining.negative_queries import JudgedQueries
from st_clp.mining.ranking import Ranking
from st_clp.mining.rows import Negative, TrainingRow, to_dataset, write_rows

if TYPE_CHECKING:
    from datasets import Dataset

logger = logging.getLogger(__name__)


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
    dtype: ComputeDtype = "auto",
    batch_size: int | None = None,
    seed: int = 0,
    store_dir: str | os.PathLike[str] | None = None,
    output_file: str | os.PathLike[str] | None = None,
    show_progress_bar: bool = True,
) -> Dataset:
    """Mine hard negatives with the model itself, and the queries that they answer, ready for CLPLoss.

    No query with a relevant document is dropped: where the filters leave one short, its negatives are filled up
    with the deepest-ranked of the refused candidates and then with random documents, counted in the log.

    Args:
        model: The model that is about to be trained; its own similarity function ranks.
        collection: Documents, training queries and judgments.
        num_negatives: Negatives for each query.
        queries_per_negative: Queries for each negative, from the training judgments; 0 for none.
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
        dtype: What the model computes in: ``"model"`` its own precision, ``"bfloat16"``, or ``"auto"``: bfloat16 where
            the hardware multiplies it, several times as fast.
        batch_size: No more texts than this in one forward pass. None: as many as fill it with tokens.
        seed: Of everything random.
        store_dir: A folder to keep the documents' embeddings in, and the queries' in one beside it, so that mining can
            be stopped and gone on with, and mining again with other options encodes nothing; None keeps them in memory.
        output_file: Write the rows here too, as JSON lines in the format of the paper's code.
        show_progress_bar: Show progress.

    Returns:
        Columns ``anchor``, ``positive``, ``negative_1`` …, ``negative_query_1`` …, ``label`` (the weight of each
        negative query: 0 where none is known).

    Raises:
        CollectionError: No query has a relevant document, or the corpus is too small for so many negatives.
        ValueError: An option is out of range.
    """
    mined = mine(
        model,
        collection,
        num_negatives=num_negatives,
        queries_per_negative=queries_per_negative,
        candidate_filter=CandidateFilter(range_min, range_max, absolute_margin, relative_margin, max_score, min_score),
        sampling_strategy=sampling_strategy,
        judged_negatives=judged_negatives,
        prefer_known_queries=prefer_known_queries,
        dtype=dtype,
        batch_size=batch_size,
        seed=seed,
        store_dir=store_dir,
        show_progress_bar=show_progress_bar,
    )
    if output_file is not None:
        write_rows(output_file, mined.rows)
    logger.info("%s", mined.account)
    return to_dataset(mined.rows, num_negatives=num_negatives, queries_per_negative=queries_per_negative)


def mine(
    model: SentenceTransformer,
    collection: Collection,
    *,
    num_negatives: int = 4,
    queries_per_negative: int = 1,
    candidate_filter: CandidateFilter | None = None,
    sampling_strategy: SamplingStrategy = "top",
    judged_negatives: JudgedNegatives | None = None,
    prefer_known_queries: bool = True,
    dtype: ComputeDtype = "auto",
    batch_size: int | None = None,
    seed: int = 0,
    store_dir: str | os.PathLike[str] | None = None,
    show_progress_bar: bool = True,
) -> MinedNegatives:
    """As :func:`mine_hard_negatives`, but returns the rows with ids, ranks, scores and the account."""
    candidate_filter = candidate_filter or CandidateFilter()
    _check_options(num_negatives, queries_per_negative, sampling_strategy, judged_negatives)
    collection.require_positives()
    started = time.perf_counter()
    store = EmbeddingStore.build(
        model, collection, store_dir, dtype=dtype, batch_size=batch_size, show_progress_bar=show_progress_bar
    )
    collection = collection.without_missing_documents(store.ids)
    collection.require_positives()
    encoded = time.perf_counter()
    ranking = Ranking(
        model,
        collection,
        store,
        candidate_filter.range_max,
        query_store_dir=None if store_dir is None else f"{os.fspath(store_dir)}.queries",
        dtype=dtype,
        batch_size=batch_size,
        show_progress_bar=show_progress_bar,
    )
    searched = time.perf_counter()
    known = JudgedQueries(collection, seed=seed)
    chooser = Chooser(
        collection,
        store.ids,
        candidate_filter,
        num_negatives=num_negatives,
        sampling_strategy=sampling_strategy,
        judged_negatives=judged_negatives or ("first" if collection.judged_negatives else "rank"),
        seed=seed,
        prefer=known if prefer_known_queries else None,
    )
    chosen, texts = _choose(collection, ranking, chooser)
    rows = _make_rows(collection, ranking, chosen, texts, known, queries_per_negative)
    account = MiningAccount(
        collection.name,
        queries=len(collection.queries),
        queries_without_positive=len(collection.queries) - len(ranking.query_ids),
        filtered=dict(sum(chooser.refused.values(), Counter())),
        seconds={
            "documents": encoded - started,
            "queries and search": searched - encoded,
            "choice": time.perf_counter() - searched,
        },
    )
    account.add_rows(rows)
    return MinedNegatives(rows, account)


def _check_options(
    num_negatives: int, queries_per_negative: int, sampling_strategy: str, judged_negatives: str | None
) -> None:
    if num_negatives < 0:
        raise ValueError(f"num_negatives must be at least 0, got {num_negatives}")
    if queries_per_negative < 0:
        raise ValueError(f"queries_per_negative must be at least 0, got {queries_per_negative}")
    if sampling_strategy not in ("top", "random"):
        raise ValueError(f"sampling_strategy must be 'top' or 'random', got {sampling_strategy!r}")
    if judged_negatives not in (None, "rank", "first", "ignore"):
        raise ValueError(f"judged_negatives must be 'rank', 'first' or 'ignore', got {judged_negatives!r}")


def _choose(
    collection: Collection, ranking: Ranking, chooser: Chooser
) -> tuple[dict[str, list[Choice]], dict[str, str]]:
    """Every query's negatives, and the texts of all documents in the rows.

    A document with the same text as a relevant one is an answer too, whatever its id. Texts are only known once
    documents are chosen, so such a choice is excluded and made again until there is none.
    """
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
        for query_id in open_queries:
            answers = {texts[doc_id] for doc_id in ranking.positive_scores[query_id]}
            copies = {choice.doc_id for choice in chosen[query_id] if texts[choice.doc_id] in answers}
            if copies:
                ranking.exclude(query_id, copies)
                again.append(query_id)
        open_queries = again
    return chosen, texts


def _make_rows(
    collection: Collection,
    ranking: Ranking,
    chosen: dict[str, list[Choice]],
    texts: dict[str, str],
    known: JudgedQueries,
    queries_per_negative: int,
) -> list[TrainingRow]:
    def negative(choice: Choice, query_id: str, positive_id: str) -> Negative:
        queries = known.find(choice.doc_id, query_id=query_id, positive_id=positive_id, number=queries_per_negative)
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
        for query_id in ranking.query_ids
        for positive_id, score in ranking.positive_scores[query_id].items()
    ]
