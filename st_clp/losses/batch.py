"""The batch of embeddings that the objective reads, joined over processes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from sentence_transformers.util import all_gather, all_gather_with_grad, get_rank
from sentence_transformers.util.distributed import get_world_size
from torch import Tensor

from st_clp.losses.columns import Layout
from st_clp.losses.text_codes import embedding_codes


@dataclass(frozen=True)
class Inputs:
    """What the objective needs of a batch besides its embeddings.

    Args:
        layout: The columns of a row; ``queries_per_negative`` is 0 where the penalty is switched off.
        weights: ``(batch, n * m)``, or None where every negative query counts fully.
        texts: ``(batch, 1 + n)``, equal numbers for equal texts; None where the inputs are not tokens.
        guide: The guide model's embeddings, one ``(batch, guide dim)`` tensor for each column, queries first.
        places: ``(1 + n, batch)``, the positions of each row's documents among the distinct ones, if only these were
            embedded; otherwise None.
        back: For each column, the positions of its texts in the order in which they were embedded; None where that is
            their own.
    """

    layout: Layout
    weights: Tensor | None = None
    texts: Tensor | None = None
    guide: list[Tensor] | None = None
    places: Tensor | None = None
    back: list[Tensor | None] | None = None


@dataclass(frozen=True)
class Vectors:
    """One model's embeddings of a batch.

    Args:
        anchors: ``(joined, dim)``.
        documents: ``(1 + n, joined, dim)``, the positives and then the first to the last negatives.
        negative_queries: ``(n * m, batch, dim)``, of this process alone.
    """

    anchors: Tensor
    documents: Tensor
    negative_queries: Tensor

    @classmethod
    def from_columns(cls, columns: Sequence[Tensor], layout: Layout) -> Vectors:
        """Stack columns in "queries first" order, in float32 at least: autocast's halves are too coarse at scale 50."""
        columns = [column if column.dtype == torch.float64 else column.float() for column in columns]
        queries = columns[1 : layout.num_queries]
        return cls(
            anchors=columns[0],
            documents=torch.stack(columns[layout.num_queries :]),
            negative_queries=torch.stack(queries) if queries else columns[0].new_empty(0, *columns[0].shape),
        )

    def gathered(self) -> Vectors:
        """Join anchors and documents over all processes, with gradients."""
        documents = _gather(self.documents.transpose(0, 1)).transpose(0, 1)
        return replace(self, anchors=_gather(self.anchors), documents=documents)

    def leaves(self) -> Vectors:
        """Detached copies that collect gradients, so that a loss can be back-propagated in pieces."""
        return Vectors(*(tensor.detach().requires_grad_() for tensor in self.tensors()))

    def tensors(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.anchors, self.documents, self.negative_queries


@dataclass(frozen=True)
class Batch:
    """The input of the objective.

    Args:
        vectors: The trained model's embeddings.
        guide: The guide model's embeddings, or None.
        texts: ``(1 + n, joined)``, equal numbers for documents with equal text.
        weights: ``(batch, n * m)``, of this process alone.
        weight_sum: The sum of the weights over all joined rows.
        size: Rows of this process.
        offset: The joined row that is this process's first.
        processes: How many processes' rows are joined.
        queries_per_negative: m, how many queries each negative has.
    """

    vectors: Vectors
    guide: Vectors | None
    texts: Tensor
    weights: Tensor
    weight_sum: Tensor
    size: int
    offset: int
    processes: int
    queries_per_negative: int

    def with_vectors(self, vectors: Vectors) -> Batch:
        return replace(self, vectors=vectors)

    @classmethod
    def assemble(cls, columns: Sequence[Tensor], inputs: Inputs, *, gather: bool, share_candidates: bool) -> Batch:
        """Build the batch from one embedding tensor for each column, queries first.

        Args:
            columns: ``(batch, dim)`` each.
            inputs: What else is needed of the batch.
            gather: Join the rows of all processes.
            share_candidates: Rows are one another's candidates; without that only the sum of weights is joined.
        """
        layout, size = inputs.layout, len(columns[0])
        vectors = Vectors.from_columns(columns, layout)
        guide = None if inputs.guide is None else Vectors.from_columns(inputs.guide, layout)
        texts = inputs.texts
        if texts is None:
            texts = torch.stack([embedding_codes(document) for document in vectors.documents], dim=1)
        weights = inputs.weights
        if weights is None:
            weights = vectors.anchors.new_ones(size, layout.num_negative_queries)
        weights = weights.to(vectors.anchors.dtype)
        weight_sum = weights.sum()
        if gather:
            weight_sum = all_gather(weight_sum.reshape(1)).sum()
        join = gather and share_candidates
        if join:
            vectors, texts = vectors.gathered(), all_gather(texts.contiguous())
            guide = None if guide is None else guide.gathered()
        return cls(
            vectors=vectors,
            guide=guide,
            texts=texts.T,
            weights=weights,
            weight_sum=weight_sum,
            size=size,
            offset=get_rank() * size if join else 0,
            processes=get_world_size() if gather else 1,
            queries_per_negative=layout.queries_per_negative,
        )


def _gather(tensor: Tensor) -> Tensor:
    joined = all_gather_with_grad(tensor.contiguous())
    if joined.requires_grad:
        # torch's backward receives into buffers strided like the gradient, which gloo fills as if they were contiguous.
        joined.register_hook(torch.Tensor.contiguous)
    return joined
