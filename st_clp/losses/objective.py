"""The objective: the contrastive term and the penalties, row by row.

A penalty is a function ``(batch, rows, options) -> (rows, n * m)``: one term for each query of a negative. Weights,
processes and mini-batches are handled outside, so a new kind is one function decorated with :func:`penalty`.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from sentence_transformers.util import cos_sim, pairwise_cos_sim
from torch import Tensor

from st_clp.losses.batch import Batch, Vectors
from st_clp.losses.candidates import Scores, score_documents
from st_clp.losses.choices import Options, Similarity


def contrastive_terms(batch: Batch, rows: slice, options: Options) -> Tensor:
    """Cross-entropy of each anchor over its positive and its candidates.

    Directions, partition and hardness mean what they mean in sentence-transformers' MultipleNegativesRankingLoss.

    Args:
        batch: The batch.
        rows: Which of this process's rows.
        options: The settings.

    Returns:
        ``(rows,)``
    """
    own = torch.arange(rows.start, rows.stop, device=batch.texts.device) + batch.offset
    documents = score_documents(lambda vectors: vectors.anchors[own], torch.zeros_like(own), own, batch, options)
    logits = documents.logits(options.scale)
    if options.hardness_mode is not None and options.hardness_strength > 0:
        logits = logits + _hardness(own, documents, batch, options)
    parts = [logits]
    for direction in ("query_to_query", "doc_to_query", "doc_to_doc"):
        if direction in options.directions:
            parts.append(_direction_logits(direction, own, documents, batch, options))
    positive = logits.gather(1, documents.target[:, None])[:, 0]
    if options.partition_mode == "joint":
        return torch.cat(parts, dim=1).logsumexp(dim=1) - positive
    return torch.stack([part.logsumexp(dim=1) for part in parts]).mean(dim=0) - positive


def _hardness(own: Tensor, documents: Scores, batch: Batch, options: Options) -> Tensor:
    """The hardness term added to the logits of negatives: strength times similarity, without gradient."""
    columns, joined = batch.texts.shape
    if options.in_batch_negatives:
        own_row = _own_documents(own, batch)
        is_positive = torch.arange(columns * joined, device=own.device) < joined
    else:
        own_row = torch.ones_like(documents.excluded)
        is_positive = torch.arange(columns, device=own.device) == 0
    weighted = {
        "in_batch_negatives": ~own_row,
        "hard_negatives": own_row & ~is_positive,
        "all_negatives": ~(own_row & is_positive),
    }[str(options.hardness_mode)]
    return options.hardness_strength * documents.similarity.detach() * weighted


def _own_documents(own: Tensor, batch: Batch) -> Tensor:
    """``(rows, candidates)``, True for the documents of the row itself."""
    columns, joined = batch.texts.shape
    return (torch.arange(joined, device=own.device) == own[:, None]).repeat(1, columns)


def _direction_logits(direction: str, own: Tensor, documents: Scores, batch: Batch, options: Options) -> Tensor:
    """Logits of the other directions, between the rows of a batch.

    Rows with the same positive answer each other's queries, so they are not contrasted.
    """
    similarity = _direction_similarity(direction, own, batch.vectors, options.similarity_fct)
    positives = batch.texts[0]
    joined = torch.arange(len(positives), device=own.device)
    target = joined == own[:, None]
    same_answer = positives == positives[own][:, None]
    if direction == "doc_to_doc":
        excluded = (batch.texts.reshape(1, -1) == positives[own][:, None]) | _own_documents(own, batch)
    elif direction == "doc_to_query":
        excluded = same_answer & ~target
    else:
        excluded = same_answer
    if documents.threshold is not None:
        judged = similarity.detach()
        if batch.guide is not None:
            judged = _direction_similarity(direction, own, batch.guide, cos_sim)
        false_negative = options.false_negatives(judged, documents.threshold)
        excluded = excluded | (false_negative & ~target if direction == "doc_to_query" else false_negative)
    return (similarity * options.scale).masked_fill(excluded, -torch.inf)


def _direction_similarity(direction: str, own: Tensor, vectors: Vectors, similarity: Similarity) -> Tensor:
    if direction == "query_to_query":
        return similarity(vectors.anchors[own], vectors.anchors)
    positives = vectors.documents[0][own]
    if direction == "doc_to_query":
        return similarity(vectors.anchors, positives).T
    return similarity(vectors.documents.flatten(0, 1), positives).T


Penalty = Callable[[Batch, slice, Options], Tensor]

PENALTIES: dict[str, Penalty] = {}


def penalty(name: str) -> Callable[[Penalty], Penalty]:
    """Register a penalty under a name."""

    def register(function: Penalty) -> Penalty:
        PENALTIES[name] = function
        return function

    return register


@penalty("cosine")
def cosine_penalty(batch: Batch, rows: slice, options: Options) -> Tensor:
    """1 - cosine(negative, its query), independent of the similarity function (Yu 2024, the CLP term)."""
    own = slice(batch.offset + rows.start, batch.offset + rows.stop)
    negatives = batch.vectors.documents[1:, own].repeat_interleave(batch.queries_per_negative, dim=0)
    queries = batch.vectors.negative_queries[:, rows]
    cosine = pairwise_cos_sim(queries.flatten(0, 1), negatives.flatten(0, 1))
    return 1 - cosine.reshape(queries.shape[:2]).T


@penalty("contrastive")
def contrastive_penalty(batch: Batch, rows: slice, options: Options) -> Tensor:
    """Cross-entropy of each negative's query over its negative and the candidates of the contrastive term.

    Documents with the same text as the negative do not count, nor do those that the guide or the margin leave out.
    """
    count, size = batch.weights.shape[1], rows.stop - rows.start
    device = batch.texts.device
    column = 1 + torch.arange(count, device=device).div(batch.queries_per_negative, rounding_mode="floor")
    row = torch.arange(rows.start, rows.stop, device=device) + batch.offset

    def pick_queries(vectors: Vectors) -> Tensor:
        return vectors.negative_queries[:, rows].flatten(0, 1)

    scores = score_documents(pick_queries, column.repeat_interleave(size), row.repeat(count), batch, options)
    logits = scores.logits(options.scale)
    terms = logits.logsumexp(dim=1) - logits.gather(1, scores.target[:, None])[:, 0]
    return terms.reshape(count, size).T


def objective(batch: Batch, rows: slice, options: Options, penalty: str, penalty_weight: float) -> Tensor:
    """The part of the loss from some of this process's rows; over all its rows the parts sum to the loss.

    The mean over processes is the loss of the joined batch, as the mean of the gradients is under DDP: the contrastive
    term is divided by this process's rows, the penalty by the joined weights over the number of processes.

    Args:
        batch: The batch.
        rows: Which rows of this process.
        options: The settings of the terms.
        penalty: The kind of penalty.
        penalty_weight: The paper's lambda.

    Returns:
        A scalar.
    """
    # At scale 50 a cosine in bfloat16 would be off by 0.2 in the logit; compared to the encoder, float32 costs nothing.
    with torch.autocast(device_type=batch.weights.device.type, enabled=False):
        contrastive = contrastive_terms(batch, rows, options).sum() / batch.size
        if batch.weights.shape[1] == 0:
            return contrastive
        terms = PENALTIES[penalty](batch, rows, options)
        weight_sum = torch.where(batch.weight_sum > 0, batch.weight_sum, 1)  # the mean of nothing is 0
        weighted_mean = (batch.weights[rows] * terms).sum() * (batch.processes / weight_sum)
        return (1 - penalty_weight) * contrastive + penalty_weight * weighted_mean
