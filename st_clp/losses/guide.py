"""A guide model, which finds likely false negatives in the batch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.base.losses.merged_forward import embed_columns
from sentence_transformers.sentence_transformer.losses import GISTEmbedLoss
from sentence_transformers.util import batch_to_device
from torch import Tensor, nn

from st_clp.losses.gradcache import create_minibatch, minibatch_ranges


class Guide(nn.Module):
    """Embed the batch's texts with a guide model, without gradients and without dropout.

    Args:
        model: The model that is trained.
        guide: The model that judges which candidates may be relevant.

    Raises:
        ValueError: The two are one model, or sentence-transformers' GISTEmbedLoss does not take the pair.
    """

    def __init__(self, model: SentenceTransformer, guide: SentenceTransformer) -> None:
        super().__init__()
        if guide is model:
            raise ValueError(
                "guide is the model that is trained. Give `margin` without a guide to judge candidates by the trained "
                "model itself, or load a second copy of the model."
            )
        # GISTEmbedLoss checks which pairs of models are compatible and when texts have to be tokenized again.
        self.must_retokenize = GISTEmbedLoss(model, guide).must_retokenize
        self.tokenizer = model.tokenizer
        self.guide = guide
        self.train(False)

    def train(self, mode: bool = True) -> Guide:
        return super().train(False)

    @torch.no_grad()
    def embed(
        self,
        columns: Sequence[dict[str, Any]],
        num_queries: int,
        mini_batch_size: int | None = None,
        mini_batch_num_tokens: int | None = None,
    ) -> list[Tensor]:
        """Embed the columns of a batch, in mini-batches where a size is given.

        Args:
            columns: The trained model's inputs, queries first.
            num_queries: How many of them are queries; each half shares a forward pass where it can.
            mini_batch_size: Texts at a time; None for all.
            mini_batch_num_tokens: Tokens at a time, instead.

        Returns:
            One ``(batch, guide dim)`` tensor for each column.
        """
        features = [self._features(column) for column in columns]
        if mini_batch_size is None:
            queries, documents = features[:num_queries], features[num_queries:]
            return [*embed_columns(self.guide, queries, False), *embed_columns(self.guide, documents, False)]
        return [self._embed_in_pieces(column, mini_batch_size, mini_batch_num_tokens) for column in features]

    def _embed_in_pieces(self, features: dict[str, Any], size: int, num_tokens: int | None) -> Tensor:
        ranges = minibatch_ranges(features, size, num_tokens)
        pieces = [self.guide(create_minibatch(features, begin, end)) for begin, end in ranges]
        return torch.cat([piece["sentence_embedding"] for piece in pieces])

    def _features(self, features: dict[str, Any]) -> dict[str, Any]:
        """The guide's inputs for a column; a copy, since models write their outputs into it."""
        if not self.must_retokenize:
            return dict(features)
        ids = features["input_ids"]
        if "cu_seq_lens_q" in features:
            ids = ids[0].tensor_split(features["cu_seq_lens_q"][1:-1].cpu())
        texts = self.tokenizer.batch_decode([row.tolist() for row in ids], skip_special_tokens=True)
        return batch_to_device(self.guide.preprocess(texts), self.guide.device)
