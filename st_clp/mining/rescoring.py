"""Scores by a cross-encoder in place of the model's, for the margins and the order of the negatives."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from tqdm.auto import tqdm

from st_clp.data import Collection
from st_clp.mining.ranking import Ranking
from st_clp.options import Encoding

if TYPE_CHECKING:
    from sentence_transformers import CrossEncoder

# Whose candidates are scored in one call: enough for batches of like length, few enough to hold their texts.
QUERIES_TOGETHER = 1024
PAIRS_A_BATCH = 32


def rescore(
    ranking: Ranking,
    collection: Collection,
    cross_encoder: CrossEncoder,
    encoding: Encoding,
) -> None:
    """Let a cross-encoder score every candidate and every relevant document of each query.

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
        for begin in range(0, len(ranking.query_ids), QUERIES_TOGETHER):
            block = ranking.query_ids[begin : begin + QUERIES_TOGETHER]
            _rescore_block(ranking, collection, cross_encoder, block, encoding.encode_batch_size or PAIRS_A_BATCH)
            progress.update(len(block))


def require_one_score(cross_encoder: CrossEncoder) -> None:
    """Refuse a cross-encoder that classifies.

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
