"""Scoring queries against their candidate documents, and knowing which candidates are no negatives."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from sentence_transformers.util import (
    cos_sim,
    dot_score,
    euclidean_sim,
    manhattan_sim,
    pairwise_cos_sim,
    pairwise_dot_score,
    pairwise_euclidean_sim,
    pairwise_manhattan_sim,
)
from torch import Tensor

from st_clp.losses.batch import Batch, Vectors
from st_clp.losses.choices import Options, Similarity

_PAIRWISE: dict[Similarity, Similarity] = {
    cos_sim: pairwise_cos_sim,
    dot_score: pairwise_dot_score,
    euclidean_sim: pairwise_euclidean_sim,
    manhattan_sim: pairwise_manhattan_sim,
}


@dataclass(frozen=True)
class Scores:
    """Queries against documents.

    Args:
        similarity: ``(queries, candidates)``.
        target: ``(queries,)``, the candidate that each query has to find.
        excluded: ``(queries, candidates)``, True for candidates that do not count as negatives.
        threshold: ``(queries,)``, the guard's similarity of query and target; None without a guard.
    """

    similarity: Tensor
    target: Tensor
    excluded: Tensor
    threshold: Tensor | None

    def logits(self, scale: float) -> Tensor:
        return (self.similarity * scale).masked_fill(self.excluded, -torch.inf)


def score_documents(
    pick_queries: Callable[[Vectors], Tensor], column: Tensor, row: Tensor, batch: Batch, options: Options
) -> Scores:
    """Score queries against the candidate documents, and mark those that are no negatives.

    Args:
        pick_queries: Takes the ``(queries, dim)`` embeddings out of either model's embeddings.
        column: ``(queries,)``, the column of the document that each query has to find: 0 for the positive.
        row: ``(queries,)``, its joined row.
        batch: The batch.
        options: The settings.
    """
    similarity = _similarity_to_documents(
        options.similarity_fct, pick_queries(batch.vectors), batch.vectors.documents, row, options
    )
    if options.in_batch_negatives:
        texts = batch.texts.reshape(1, -1)
        target = column * batch.texts.shape[1] + row
    else:
        texts = batch.texts[:, row].T
        target = column
    excluded = texts == batch.texts[column, row][:, None]
    threshold = None
    if options.margin is not None:
        judged = similarity
        if batch.guide is not None:
            judged = _similarity_to_documents(cos_sim, pick_queries(batch.guide), batch.guide.documents, row, options)
        threshold = judged.gather(1, target[:, None])[:, 0]
        excluded = excluded | options.false_negatives(judged, threshold)
    excluded = excluded.scatter(1, target[:, None], False)
    return Scores(similarity, target, excluded, threshold)


def _similarity_to_documents(
    similarity: Similarity, queries: Tensor, documents: Tensor, row: Tensor, options: Options
) -> Tensor:
    if options.in_batch_negatives:
        return similarity(queries, documents.flatten(0, 1))
    return similarity_to_own(similarity, queries, documents[:, row])


def similarity_to_own(similarity: Similarity, queries: Tensor, documents: Tensor) -> Tensor:
    """Similarity of each query to its own documents alone.

    Args:
        similarity: A function of two matrices that gives all pairs.
        queries: ``(rows, dim)``.
        documents: ``(columns, rows, dim)``.

    Returns:
        ``(rows, columns)``
    """
    pairwise = _PAIRWISE.get(similarity)
    if pairwise is not None:
        repeated = queries.expand_as(documents)
        return pairwise(repeated.flatten(0, 1), documents.flatten(0, 1)).reshape(documents.shape[:2]).T
    # A function that is not known to have a row-by-row form is asked about one row at a time.
    rows = [similarity(queries[index : index + 1], documents[:, index]) for index in range(len(queries))]
    return torch.cat(rows)
