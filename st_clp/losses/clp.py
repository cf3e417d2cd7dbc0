"""CLPLoss: contrastive learning with a penalty that keeps a negative near the queries it does answer."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import fields
from typing import Any

import numpy as np
import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss
from sentence_transformers.util import cos_sim, similarity_fct_name
from torch import Tensor, nn

from st_clp.losses.batch import Batch, Inputs
from st_clp.losses.choices import Direction, HardnessMode, MarginStrategy, Options, PartitionMode, Similarity
from st_clp.losses.columns import (
    Column,
    Layout,
    RangeCheck,
    check_finite,
    drop_foreign_features,
    weights_from_labels,
)
from st_clp.losses.forward import distinct_texts, embed_by_length
from st_clp.losses.gradcache import get_batch_size
from st_clp.losses.guide import Guide
from st_clp.losses.host_texts import HostTexts, host_texts, on_device
from st_clp.losses.objective import PENALTIES, objective
from st_clp.losses.text_codes import text_codes
from st_clp.options import LossOptions, MiningSettings


def check_settings(loss: Any) -> None:
    """Check the settings of a CLPLoss.

    Raises:
        ValueError: A setting is out of its range, or two of them contradict each other.
    """
    if not (loss.scale > 0 and math.isfinite(loss.scale)):
        raise ValueError(f"scale must be a positive number (it is 1 / temperature), got {loss.scale}")
    if not 0 <= loss.penalty_weight <= 1:
        raise ValueError(f"penalty_weight must be between 0 and 1, got {loss.penalty_weight}")
    if loss.penalty not in PENALTIES:
        raise ValueError(f"penalty must be one of {sorted(PENALTIES)}, got {loss.penalty!r}")
    if not isinstance(loss.queries_per_negative, int) or loss.queries_per_negative < 0:
        raise ValueError(f"queries_per_negative must be a whole number from 0 up, got {loss.queries_per_negative}")
    if not (loss.hardness_strength >= 0 and math.isfinite(loss.hardness_strength)):
        raise ValueError(f"hardness_strength must be 0 or a positive number, got {loss.hardness_strength}")
    if loss.margin is not None and not math.isfinite(loss.margin):
        raise ValueError(f"margin must be a finite number, or None for no guard, got {loss.margin}")
    if loss.margin_strategy not in ("absolute", "relative"):
        raise ValueError(f"margin_strategy must be 'absolute' or 'relative', got {loss.margin_strategy!r}")
    # The settings that both losses share are checked as users of that loss know it.
    MultipleNegativesRankingLoss(
        loss.model,
        directions=loss.directions,
        partition_mode=loss.partition_mode,
        hardness_mode=loss.hardness_mode,
        hardness_strength=loss.hardness_strength,
    )
    if loss.in_batch_negatives:
        return
    if set(loss.directions) != {"query_to_doc"}:
        raise ValueError(
            f"directions={loss.directions} compare the rows of a batch with one another, which "
            "in_batch_negatives=False rules out; use directions=('query_to_doc',) or in_batch_negatives=True"
        )
    if loss.hardness_mode == "in_batch_negatives":
        raise ValueError(
            "hardness_mode='in_batch_negatives' weighs candidates that in_batch_negatives=False leaves out; "
            "use hardness_mode='hard_negatives'"
        )


class CLPLoss(nn.Module):
    def __init__(
        self,
        model: SentenceTransformer,
        scale: float = LossOptions.scale,
        penalty_weight: float = LossOptions.penalty_weight,
        *,
        penalty: str = LossOptions.penalty,
        queries_per_negative: int = MiningSettings.queries_per_negative,
        in_batch_negatives: bool = LossOptions.in_batch_negatives,
        similarity_fct: Similarity = cos_sim,
        gather_across_devices: bool = False,
        directions: tuple[Direction, ...] = ("query_to_doc",),
        partition_mode: PartitionMode = "joint",
        hardness_mode: HardnessMode | None = None,
        hardness_strength: float = 0.0,
        guide: SentenceTransformer | None = None,
        margin: float | None = None,
        margin_strategy: MarginStrategy = "absolute",
        encode_once: bool = False,
        check_finite: bool = False,
    ) -> None:
        """
        Contrastive learning with a penalty that keeps a hard negative near the queries it does answer (CLP).

        Pushing a negative away from this row's query also pushes it away from the queries that it *is* an answer to.
        This loss takes such queries beside each negative and holds the negative near them::

            loss = (1 - penalty_weight) * contrastive + penalty_weight * penalty

            contrastive = mean over anchors q with positive p of
                          -log( exp(scale * sim(q, p)) / sum over candidates d of exp(scale * sim(q, d)) )

            penalty     = sum over negatives d and their queries r of weight(d, r) * term(d, r)
                          / sum of all weight(d, r), and 0 where all weights are 0
            term(d, r)  = 1 - cos(d, r)                                   with penalty="cosine"
            term(d, r)  = -log( exp(scale * sim(r, d)) / sum over candidates d' of exp(scale * sim(r, d')) )
                                                                          with penalty="contrastive"

        The candidates are the positives and negatives of the whole batch, or with ``in_batch_negatives=False`` those of
        the row alone, as in the paper. A candidate with the same text (the same tokens) as the document to be found
        never counts as a negative. Rows without queries of negatives (pairs, or ``queries_per_negative=0``) train by
        the contrastive term alone, at its full weight.

        The loss is computed in float32 (float64 if the embeddings are), under autocast too.

        Args:
            model: SentenceTransformer model to train.
            scale: The similarities are multiplied by this, 1 / temperature. Above 0. The paper's temperature 0.02
                is the default.
            penalty_weight: The paper's lambda, 0 to 1. At 0 the queries of the negatives are not even encoded, and the
                loss is that of MultipleNegativesRankingLoss.
            penalty: Kind of penalty. ``"cosine"`` (default) is the paper's: the cosine of negative and query,
                whatever ``similarity_fct`` is. With ``"contrastive"`` the query has to find the negative among all
                candidates, so the negative stays near its queries and apart from what else they could find.
            queries_per_negative: m, how many queries each negative has. 1 by default; 0 for negatives without queries.
            in_batch_negatives: Whether the documents of the other rows of the batch are candidates as well.
            similarity_fct: Function of two matrices ``(a, dim)`` and ``(b, dim)`` that gives ``(a, b)`` similarities.
                Default: cosine. The reference code takes the dot product of unit vectors, which is the same number.
                With ``in_batch_negatives=False``, functions that are not sentence-transformers' own are called row by
                row.
            gather_across_devices: Join the rows of all processes: their documents become candidates, and the penalty is
                the weighted mean over all of them. The mean of the processes' losses and gradients is then that of one
                process with the joined batch. All processes must have batches of one size.
            directions: Which interactions the contrastive term includes, as in MultipleNegativesRankingLoss:
                "query_to_doc" (always), "query_to_query", "doc_to_query" and "doc_to_doc". Rows whose positives are the
                same text are not contrasted. Needs ``in_batch_negatives=True`` for all but the first.
            partition_mode: "joint" (one softmax over all directions) or "per_direction" (one for each, averaged).
            hardness_mode: None, or which negatives of the contrastive term are weighted up by their similarity:
                "in_batch_negatives", "hard_negatives" or "all_negatives", as in MultipleNegativesRankingLoss. The
                penalty is not weighted so.
            hardness_strength: The strength of that, 0 or above.
            guide: A model that judges which candidates are likely to be relevant after all, as in GISTEmbedLoss.
                Candidates that it rates nearer to the query than the positive (less ``margin``) are left out; in the
                contrastive penalty, nearer than the negative that is to be found. Its dropout is off.
            margin: Leave out candidates whose similarity to the query is above that of the positive less this margin.
                With a guide 0 by default; without one None (nothing is left out), and a number means that the trained
                model's own similarities judge.
            margin_strategy: "absolute" leaves out what is above ``positive - margin``, "relative" what is above
                ``positive - abs(positive) * margin``.
            encode_once: Encode a document that stands in the batch more than once only once. The loss is the same, but
                for dropout, which all of its places then share. It pays where rows have documents in common, as with
                :class:`DocumentBatchSampler`. A GPU is waited for once a step, unless :func:`plan_on_host` was called.
            check_finite: Look for NaN and infinite embeddings in every step and name the column that has them. This
                waits for the device, so it is for debugging.

        References:
            - Yu, J. (2024). Efficient Fine-tuning Methodology of Text Embedding Models for Information Retrieval:
              Contrastive Learning Penalty (CLP). https://arxiv.org/abs/2412.17364. The formula as printed there has its
              brackets and a sign off; this is what its published code computes, for any batch size.

        Requirements:
            1. The columns in this order: anchor, positive, negative_1 to negative_n, then the m queries of negative_1,
               the m queries of negative_2, and so on. Their names do not matter, their order does: of four columns
               with ``queries_per_negative=1`` the last is taken for the query of the third.
            2. A negative for which no query is known has an empty text there and the label 0.

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

            A one-dimensional label tensor of integer zeros is what ``InputExample`` has when no label was set, and
            means the same as no labels. With ``model.fit`` give ``InputExample(texts=[...], label=[1.0, 0.0, ...])``.

        Recommendations:
            - ``BatchSamplers.NO_DUPLICATES`` keeps duplicates out of a batch. Mind that it takes empty texts for
              duplicates of each other too; where many negatives have no query, rely on this loss's own check instead.
            - Give the anchors and the queries of the negatives one prompt, and the documents one: columns that are
              prepared alike share a forward pass. In one process on a CPU, and on a GPU after :func:`plan_on_host`,
              they share several, each for texts of similar length, so that little of the work is for padding. Loss and
              gradients are the same, but for dropout.

        Relations:
            - :class:`MultipleNegativesRankingLoss` is this loss with ``penalty_weight=0``, where no two documents of a
              batch are the same text.
            - :class:`GISTEmbedLoss` with ``contrast_anchors=False, contrast_positives=False`` is this loss with
              ``penalty_weight=0`` and its guide; this one takes any number of negatives.
            - :class:`CachedCLPLoss` gives the same loss and gradients with batches of any size in little memory.

        Example:
            ::

                from datasets import Dataset
                from sentence_transformers import SentenceTransformer, SentenceTransformerTrainer
                from st_clp import CLPLoss

                model = SentenceTransformer("sentence-transformers/all-MiniLM-L6-v2")
                train_dataset = Dataset.from_dict({
                    "anchor": ["which river is in the north?", "who was queen in the war?"],
                    "positive": ["The north has one big river.", "Queen Anne was queen in the war."],
                    "negative": ["The south has one small river.", "The queen was born in peace."],
                    "negative_query": ["which river is in the south?", ""],
                    "label": [[1.0], [0.0]],
                })
                loss = CLPLoss(model, penalty_weight=0.1)

                trainer = SentenceTransformerTrainer(model=model, train_dataset=train_dataset, loss=loss)
                trainer.train()
        """
        super().__init__()
        self.model = model
        self.scale = scale
        self.penalty_weight = penalty_weight
        self.penalty = penalty
        self.queries_per_negative = queries_per_negative
        self.in_batch_negatives = in_batch_negatives
        self.similarity_fct = similarity_fct
        self.gather_across_devices = gather_across_devices
        self.directions = tuple(directions)
        self.partition_mode = partition_mode
        self.hardness_mode = hardness_mode
        self.hardness_strength = hardness_strength
        self.guide = None if guide is None else Guide(model, guide)
        self.margin = 0.0 if margin is None and guide is not None else margin
        self.margin_strategy = margin_strategy
        self.encode_once = encode_once
        self.check_finite = check_finite
        self._check_range = RangeCheck()
        check_settings(self)

    def forward(self, sentence_features: Iterable[dict[str, Any]], labels: Tensor | None = None) -> Tensor:
        features = list(sentence_features)
        drop_foreign_features(features)
        with host_texts(features) as known:
            columns, known, inputs = self._prepare(features, known, labels)
            number = inputs.layout.num_queries
            embeddings = embed_by_length(
                self.model, [columns[:number], columns[number:]], [known[:number], known[number:]]
            )
        return self._objective(self._assemble(embeddings, inputs))

    def compute_loss_from_embeddings(self, embeddings: list[Tensor], labels: Tensor | None = None) -> Tensor:
        """Compute the loss from embeddings.

        Without tokens, texts count as the same if their embeddings are equal.

        Args:
            embeddings: ``(batch, dim)`` for each column, in the order of the dataset.
            labels: ``(batch, n * m)``, or None.

        Raises:
            ValueError: The loss has a guide, which judges texts; or the columns or labels do not fit.
        """
        return self._objective(self._assemble_embeddings(embeddings, labels))

    def _assemble_embeddings(self, embeddings: list[Tensor], labels: Tensor | None) -> Batch:
        """The batch of embeddings without their texts, a column each, in the order of the dataset."""
        if self.guide is not None:
            raise ValueError("a guide judges texts, not embeddings; for embeddings use margin without a guide")
        columns, layout, weights = self._arrange(embeddings, labels, len(embeddings[0]))
        return self._assemble(columns, Inputs(layout, weights))

    def _prepare(
        self, features: list[dict[str, Any]], known: list[HostTexts | None], labels: Tensor | None
    ) -> tuple[list[dict[str, Any]], list[HostTexts | None], Inputs]:
        """Bring the columns into "queries first" order, and collect what the objective needs besides embeddings.

        Args:
            features: The columns, in the order of the dataset.
            known: What the host knows of the texts of each.
            labels: ``(batch, n * m)``, or None.
        """
        pairs, layout, weights = self._arrange(
            list(zip(features, known, strict=True)), labels, _batch_size(features[0])
        )
        columns, known = [column for column, _ in pairs], [texts for _, texts in pairs]
        number = layout.num_queries
        # Before any forward pass: modules may change the features in place.
        codes = _codes(columns[number:], known[number:])
        guide = None
        if self.guide is not None:
            guide = self.guide.embed(columns, number, **self._guide_mini_batch())
        places = None
        if self.encode_once and codes is not None:
            found = distinct_texts(columns[number:], known[number:], codes)
            if found is not None:
                columns, known, places = (
                    [*columns[:number], found.features],
                    [*known[:number], found.known],
                    found.places,
                )
        return columns, known, Inputs(layout, weights, codes, guide, places)

    def _arrange(
        self, columns: list[Column], labels: Tensor | None, batch_size: int
    ) -> tuple[list[Column], Layout, Tensor | None]:
        layout = Layout.from_columns(len(columns), self.queries_per_negative)
        columns = layout.queries_first(columns)
        if self.penalty_weight == 0:
            # The queries of the negatives are not used, so they are not encoded.
            columns = [columns[0], *columns[layout.num_queries :]]
            return columns, Layout(layout.num_negatives, 0), None
        weights = weights_from_labels(labels, batch_size, layout)
        self._check_range(weights)
        return columns, layout, weights

    def _guide_mini_batch(self) -> dict[str, int | None]:
        return {}

    def _options(self) -> Options:
        """The current settings: as in other losses, attributes may be changed during training."""
        return Options(**{field.name: getattr(self, field.name) for field in fields(Options)})

    def _assemble(self, embeddings: list[Tensor], inputs: Inputs) -> Batch:
        if inputs.places is not None:
            embeddings = [*embeddings[:-1], *embeddings[-1][inputs.places]]
        if self.check_finite:
            check_finite(embeddings, inputs.layout.queries_first(inputs.layout.names()))
        return Batch.assemble(
            embeddings, inputs, gather=self.gather_across_devices, share_candidates=self.in_batch_negatives
        )

    def _objective(self, batch: Batch, rows: slice | None = None) -> Tensor:
        rows = slice(0, batch.size) if rows is None else rows
        return objective(batch, rows, self._options(), self.penalty, self.penalty_weight)

    def get_config_dict(self) -> dict[str, Any]:
        return {
            "scale": self.scale,
            "penalty_weight": self.penalty_weight,
            "penalty": self.penalty,
            "queries_per_negative": self.queries_per_negative,
            "in_batch_negatives": self.in_batch_negatives,
            "similarity_fct": similarity_fct_name(self.similarity_fct),
            "gather_across_devices": self.gather_across_devices,
            "directions": self.directions,
            "partition_mode": self.partition_mode,
            "hardness_mode": self.hardness_mode,
            "hardness_strength": self.hardness_strength,
            "guide": None if self.guide is None else self.guide.guide,
            "margin": self.margin,
            "margin_strategy": self.margin_strategy,
            "encode_once": self.encode_once,
            "check_finite": self.check_finite,
        }

    @property
    def temperature(self) -> float:
        return 1.0 / self.scale

    @property
    def citation(self) -> str:
        return """
@misc{yu2024efficient,
    title={Efficient Fine-tuning Methodology of Text Embedding Models for Information Retrieval:
           Contrastive Learning Penalty (CLP)},
    author={Jeongsu Yu},
    year={2024},
    eprint={2412.17364},
    archivePrefix={arXiv},
    primaryClass={cs.IR}
}
"""


def _codes(columns: list[dict[str, Any]], known: list[HostTexts | None]) -> Tensor | None:
    """``(batch, columns)``, equal numbers for equal texts; None where the inputs are not tokens."""
    there = [texts.codes for texts in known if texts is not None]
    if len(there) == len(columns):
        return on_device(np.stack(there, axis=1), columns[0]["input_ids"].device)
    codes = [text_codes(column) for column in columns]
    found = [code for code in codes if code is not None]
    return torch.stack(found, dim=1) if len(found) == len(codes) else None


def _batch_size(features: dict[str, Any]) -> int:
    # A bag of tokens has one offset for each text.
    return len(features["offsets"]) if "offsets" in features else get_batch_size(features)
