"""The penalties that hold a negative near the queries it does answer.

A penalty is a function ``(batch, rows, options) -> (rows, n * m)``: one term for each query of a negative. Weights,
processes and mini-batches are dealt with outside, so another kind is one function with :func:`penalty` above it.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from sentence_transformers.util import pairwise_cos_sim
from torch import Tensor

from st_clp.losses.batch import Batch, Vectors
from st_clp.losses.candidates import score_documents
from st_clp.losses.choices import Options

Penalty = Callable[[Batch, slice, Options], Tensor]

PENALTIES: dict[str, Penalty] = {}


def penalty(name: str) -> Callable[[Penalty], Penalty]:
    """Make a penalty known to the losses under a name."""

    def register(function: Penalty) -> Penalty:
        PENALTIES[name] = function
        return function

    return register


@penalty("cosine")
def cosine_penalty(batch: Batch, rows: slice, options: Options) -> Tensor:
    """1 - cosine(negative, its query), whatever the similarity function is (Yu 2024, the CLP term)."""
    own = slice(batch.offset + rows.start, batch.offset + rows.stop)
    negatives = batch.vectors.documents[1:, own].repeat_interleave(batch.queries_per_negative, dim=0)
    queries = batch.vectors.negative_queries[:, rows]
    cosine = pairwise_cos_sim(queries.flatten(0, 1), negatives.flatten(0, 1))
    return 1 - cosine.reshape(queries.shape[:2]).T


@penalty("contrastive")
def contrastive_penalty(batch: Batch, rows: slice, options: Options) -> Tensor:
    """Cross-entropy of each negative's query over its negative and the candidates of the contrastive term.

    Documents with the same text as the negative do not count against it, nor do those that the guard leaves out.
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
