"""CachedCLPLoss: CLPLoss for any batch size, in the memory of a mini-batch."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import Any, cast

import torch
import tqdm
from sentence_transformers import SentenceTransformer
from sentence_transformers.base.losses.gradcache import (
    CachedLossMixin,
    has_static_embedding_input,
)
from torch import Tensor

from st_clp.declaring import with_parameters_of
from st_clp.losses.batch import Batch, Inputs
from st_clp.losses.clp import CLPLoss
from st_clp.losses.columns import drop_foreign_features
from st_clp.losses.forward import shortest_first
from st_clp.losses.gradcache import get_batch_size, validate_mini_batch_num_tokens
from st_clp.losses.host_texts import host_texts


class CachedCLPLoss(CachedLossMixin, CLPLoss):
    def __init__(
        self,
        model: SentenceTransformer,
        *args: Any,
        mini_batch_size: int = 32,
        mini_batch_num_tokens: int | None = None,
        show_progress_bar: bool = False,
        **settings: Any,
    ) -> None:
        """
        CLPLoss with gradient caching (GradCache): the same loss and gradients, with batches of any size in the memory
        of a mini-batch.

        The batch is embedded in mini-batches without gradients, the loss and its gradients with respect to the
        embeddings are computed some rows at a time, and then the mini-batches are embedded again with gradients. A step
        costs one more forward pass than :class:`CLPLoss`.

        Args:
            model: SentenceTransformer model to train. Not one whose first module is a StaticEmbedding.
            mini_batch_size: Texts that are embedded at a time, and rows whose loss is computed at a time. It bounds the
                memory and does not change the result.
            mini_batch_num_tokens: Tokens that are embedded at a time, instead of ``mini_batch_size`` texts, which then
                only counts the rows whose loss is computed at a time.
            show_progress_bar: Show a progress bar for the mini-batches.

            *args, **settings: All others are those of :class:`CLPLoss`, as are the inputs and the labels.

        References:
            - Yu, J. (2024). Contrastive Learning Penalty (CLP). https://arxiv.org/abs/2412.17364
            - Gao, L. et al. (2021). Scaling Deep Contrastive Learning Batch Size under Memory Limited Setup.
              https://arxiv.org/abs/2101.06983

        Inputs:
            +----------------------------------------------------------------+---------------------------------------+
            | Inputs                                                         | Labels                                |
            +================================================================+=======================================+
            | (anchor, positive) pairs                                       | none                                  |
            +----------------------------------------------------------------+---------------------------------------+
            | (anchor, positive, negative_1, ..., negative_n) with           | none                                  |
            | ``queries_per_negative=0``                                     |                                       |
            +----------------------------------------------------------------+---------------------------------------+
            | (anchor, positive, negative_1, ..., negative_n,                | none, or a list of n * m weights from |
            | query_1_of_negative_1, ..., query_m_of_negative_n)             | 0 (no such query) to 1                |
            +----------------------------------------------------------------+---------------------------------------+

        Relations:
            - :class:`CLPLoss` is the same loss without caching: faster, where the batch fits.
            - :class:`CachedMultipleNegativesRankingLoss` is this loss with ``penalty_weight=0``, where no two documents
              of a batch are the same text.

        Example:
            ::

                from datasets import Dataset
                from sentence_transformers import SentenceTransformer, SentenceTransformerTrainer
                from st_clp import CachedCLPLoss

                model = SentenceTransformer("sentence-transformers/all-MiniLM-L6-v2")
                train_dataset = Dataset.from_dict({
                    "anchor": ["which river is in the north?", "who was queen in the war?"],
                    "positive": ["The north has one big river.", "Queen Anne was queen in the war."],
                    "negative": ["The south has one small river.", "The queen was born in peace."],
                    "negative_query": ["which river is in the south?", "who was born in peace?"],
                })
                loss = CachedCLPLoss(model, mini_batch_size=32)

                trainer = SentenceTransformerTrainer(model=model, train_dataset=train_dataset, loss=loss)
                trainer.train()
        """
        super().__init__(model, *args, **settings)
        if has_static_embedding_input(model):
            raise ValueError(
                "CachedCLPLoss splits a batch into mini-batches, which the inputs of a StaticEmbedding cannot be split "
                "into; use CLPLoss, whose memory such a model hardly fills."
            )
        if mini_batch_size < 1:
            raise ValueError(f"mini_batch_size must be a whole number from 1 up, got {mini_batch_size}")
        validate_mini_batch_num_tokens(mini_batch_num_tokens)
        self.mini_batch_size = mini_batch_size
        self.mini_batch_num_tokens = mini_batch_num_tokens
        self.show_progress_bar = show_progress_bar

    __init__.__signature__ = with_parameters_of(CLPLoss.__init__, __init__)  # type: ignore[attr-defined]

    def forward(self, sentence_features: Iterable[dict[str, Any]], labels: Tensor | None = None) -> Tensor:
        features = list(sentence_features)
        drop_foreign_features(features)
        with host_texts(features) as known:
            columns, _, inputs = self._prepare(features, known, labels)
            by_length = [self._by_length(column) for column in columns]
        inputs = replace(inputs, back=[back for _, back in by_length])
        # The cache hands its second argument on to calculate_loss untouched.
        return self.forward_cached([column for column, _ in by_length], cast(Tensor, inputs))

    def _by_length(self, column: dict[str, Any]) -> tuple[dict[str, Any], Tensor | None]:
        if self.mini_batch_num_tokens is None and get_batch_size(column) <= self.mini_batch_size:
            return dict(column), None  # it is one mini-batch, as wide in any order
        return shortest_first(column)

    def calculate_loss(
        self, reps: list[list[Tensor]], labels: Tensor | Inputs | None = None, *, with_backward: bool = False
    ) -> Tensor:
        """The loss from the embeddings of all mini-batches.

        Args:
            reps: For each column, in the order of the dataset, the embeddings of its mini-batches,
                ``(mini batch, dim)`` each.
            labels: ``(batch, n * m)``, or None. From ``forward``, which brings the columns into another order, what
                it found out about the batch.
            with_backward: Back-propagate to ``reps`` as well, some rows at a time.

        Raises:
            ValueError: As :meth:`CLPLoss.compute_loss_from_embeddings`.
        """
        embeddings = [torch.cat(mini_batches) for mini_batches in reps]
        if isinstance(labels, Inputs):
            if labels.back is not None:
                pairs = zip(embeddings, labels.back, strict=True)
                embeddings = [column if back is None else column[back] for column, back in pairs]
            batch = self._assemble(embeddings, labels)
        else:
            batch = self._assemble_embeddings(embeddings, labels)
        if not with_backward:
            return torch.stack([self._objective(batch, rows) for rows in self._row_chunks(batch)]).sum()
        # Gradients gather on copies first, so that what lies behind (joining over processes) runs backward once.
        leaves = batch.vectors.leaves()
        total = torch.zeros_like(batch.weight_sum)
        for rows in self._row_chunks(batch):
            loss = self._objective(batch.with_vectors(leaves), rows)
            loss.backward()
            total += loss.detach()
        both = zip(batch.vectors.tensors(), leaves.tensors(), strict=True)
        roots = [(root, leaf.grad) for root, leaf in both if root.requires_grad]
        # A column that the penalty does not read has the gradient 0.
        gradients = [torch.zeros_like(root) if gradient is None else gradient for root, gradient in roots]
        torch.autograd.backward([root for root, _ in roots], gradients)
        return total

    def _row_chunks(self, batch: Batch) -> Iterable[slice]:
        starts = tqdm.trange(
            0, batch.size, self.mini_batch_size, desc="Calculating loss", disable=not self.show_progress_bar
        )
        return (slice(start, min(start + self.mini_batch_size, batch.size)) for start in starts)

    def _guide_mini_batch(self) -> dict[str, int | None]:
        return {"mini_batch_size": self.mini_batch_size, "mini_batch_num_tokens": self.mini_batch_num_tokens}

    def get_config_dict(self) -> dict[str, Any]:
        return {
            **super().get_config_dict(),
            "mini_batch_size": self.mini_batch_size,
            "mini_batch_num_tokens": self.mini_batch_num_tokens,
        }

    @property
    def citation(self) -> str:
        return (
            super().citation
            + """
@misc{gao2021scaling,
    title={Scaling Deep Contrastive Learning Batch Size under Memory Limited Setup},
    author={Luyu Gao and Yunyi Zhang and Jiawei Han and Jamie Callan},
    year={2021},
    eprint={2101.06983},
    archivePrefix={arXiv},
    primaryClass={cs.LG}
}
"""
        )
