"""CLPLoss: contrastive learning with a penalty that keeps a negative near the queries it does answer."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import fields
from typing import Any, Literal

import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.base.losses.gradcache import _get_batch_size
from sentence_transformers.base.losses.merged_forward import embed_columns
from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss
from sentence_transformers.util import cos_sim, similarity_fct_name
from torch import Tensor, nn

from st_clp.losses.batch import Batch, Inputs
from st_clp.losses.candidates import Options, Similarity
from st_clp.losses.columns import Column, Layout, check_finite, drop_foreign_features, weights_from_labels
from st_clp.losses.contrastive import contrastive_terms
from st_clp.losses.guide import Guide
from st_clp.losses.penalties import PENALTIES
from st_clp.losses.texts import text_codes

Direction = Literal["query_to_doc", "query_to_query", "doc_to_query", "doc_to_doc"]
HardnessMode = Literal["in_batch_negatives", "hard_negatives", "all_negatives"]


class CLPLoss(nn.Module):
    def __init__(
        self,
        model: SentenceTransformer,
        scale: float = 50.0,
        penalty_weight: float = 0.1,
        *,
        penalty: str = "cosine",
        queries_per_negative: int = 1,
        in_batch_negatives: bool = True,
        similarity_fct: Similarity = cos_sim,
        gather_across_devices: bool = False,
        directions: tuple[Direction, ...] = ("query_to_doc",),
        partition_mode: Literal["joint", "per_direction"] = "joint",
        hardness_mode: HardnessMode | None = None,
        hardness_strength: float = 0.0,
        guide: SentenceTransformer | None = None,
        margin: float | None = None,
        margin_strategy: Literal["absolute", "relative"] = "absolute",
        check_finite: bool = False,
    ) -> None:
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
        self.check_finite = check_finite
        self._check_settings()

    def _check_settings(self) -> None:
        """Refuse settings that cannot be, naming the setting and its range."""
        if not (self.scale > 0 and math.isfinite(self.scale)):
            raise ValueError(f"scale must be a positive number (it is 1 / temperature), got {self.scale}")
        if not 0 <= self.penalty_weight <= 1:
            raise ValueError(f"penalty_weight must be between 0 and 1, got {self.penalty_weight}")
        if self.penalty not in PENALTIES:
            raise ValueError(f"penalty must be one of {sorted(PENALTIES)}, got {self.penalty!r}")
        if not isinstance(self.queries_per_negative, int) or self.queries_per_negative < 0:
            raise ValueError(f"queries_per_negative must be a whole number from 0 up, got {self.queries_per_negative}")
        if not (self.hardness_strength >= 0 and math.isfinite(self.hardness_strength)):
            raise ValueError(f"hardness_strength must be 0 or a positive number, got {self.hardness_strength}")
        if self.margin is not None and not math.isfinite(self.margin):
            raise ValueError(f"margin must be a finite number, or None for no guard, got {self.margin}")
        if self.margin_strategy not in ("absolute", "relative"):
            raise ValueError(f"margin_strategy must be 'absolute' or 'relative', got {self.margin_strategy!r}")
        # Its checks of the settings that both losses share are the ones that its users know.
        MultipleNegativesRankingLoss(
            self.model,
            directions=self.directions,
            partition_mode=self.partition_mode,
            hardness_mode=self.hardness_mode,
            hardness_strength=self.hardness_strength,
        )
        if not self.in_batch_negatives and set(self.directions) != {"query_to_doc"}:
            raise ValueError(
                f"directions {self.directions} compare the rows of a batch with one another, which "
                "in_batch_negatives=False rules out; use directions=('query_to_doc',) or in_batch_negatives=True"
            )
        if not self.in_batch_negatives and self.hardness_mode == "in_batch_negatives":
            raise ValueError(
                "hardness_mode='in_batch_negatives' weighs candidates that in_batch_negatives=False leaves out; "
                "use 'hard_negatives'"
            )

    def forward(self, sentence_features: Iterable[dict[str, Any]], labels: Tensor | None = None) -> Tensor:
        columns, inputs = self._prepare(sentence_features, labels)
        num_queries = inputs.layout.num_queries
        embeddings = [
            *embed_columns(self.model, columns[:num_queries], separate_first=False),
            *embed_columns(self.model, columns[num_queries:], separate_first=False),
        ]
        return self._objective(self._assemble(embeddings, inputs))

    def compute_loss_from_embeddings(self, embeddings: list[Tensor], labels: Tensor | None = None) -> Tensor:
        """The loss of embeddings that are there already.

        Without tokens to go by, texts are taken to be the same where their embeddings are equal.

        Args:
            embeddings: ``(batch, dim)`` for each column, in the order of the dataset.
            labels: ``(batch, n * m)``, or None.

        Raises:
            ValueError: The loss has a guide, which judges texts; or the columns or labels do not fit.
        """
        if self.guide is not None:
            raise ValueError("a guide judges texts, not embeddings; for embeddings use margin without a guide")
        columns, layout, weights = self._arrange(embeddings, labels, len(embeddings[0]))
        return self._objective(self._assemble(columns, Inputs(layout, weights)))

    def _prepare(
        self, sentence_features: Iterable[dict[str, Any]], labels: Tensor | None
    ) -> tuple[list[dict[str, Any]], Inputs]:
        """Bring the columns into "queries first" order, and note what the objective needs beside embeddings."""
        features = list(sentence_features)
        drop_foreign_features(features)
        columns, layout, weights = self._arrange(features, labels, _batch_size(features[0]))
        # Before any forward pass: modules may change the features in place.
        codes = [text_codes(column) for column in columns[layout.num_queries :]]
        known = [code for code in codes if code is not None]
        texts = torch.stack(known, dim=1) if len(known) == len(codes) else None
        guide = None
        if self.guide is not None:
            guide = self.guide.embed(columns, layout.num_queries, **self._guide_mini_batch())
        return columns, Inputs(layout, weights, texts, guide)

    def _arrange(
        self, columns: list[Column], labels: Tensor | None, batch_size: int
    ) -> tuple[list[Column], Layout, Tensor | None]:
        layout = Layout.from_columns(len(columns), self.queries_per_negative)
        weights = weights_from_labels(labels, batch_size, layout)
        columns = layout.queries_first(columns)
        if self.penalty_weight == 0:
            # Nothing reads the queries of the negatives, so they need not be encoded.
            columns = [columns[0], *columns[layout.num_queries :]]
            return columns, Layout(layout.num_negatives, 0), None
        return columns, layout, weights

    def _guide_mini_batch(self) -> dict[str, int | None]:
        return {}

    def _options(self) -> Options:
        """The settings as they are now: like its neighbours', a loss's attributes may be changed while training."""
        return Options(**{field.name: getattr(self, field.name) for field in fields(Options)})

    def _assemble(self, embeddings: list[Tensor], inputs: Inputs) -> Batch:
        if self.check_finite:
            check_finite(embeddings, inputs.layout.queries_first(inputs.layout.names()))
        return Batch.assemble(
            embeddings, inputs, gather=self.gather_across_devices, share_candidates=self.in_batch_negatives
        )

    def _objective(self, batch: Batch, rows: slice | None = None) -> Tensor:
        """What some rows of this process add to the loss; all of them by default.

        The mean over processes is the loss of the joined batch, as the gradients' mean is under DDP: each process
        divides by its own rows, and its share of the penalty by the joined weights times the number of processes.
        """
        rows = slice(0, batch.size) if rows is None else rows
        options = self._options()
        # At scale 50 a cosine in bfloat16 would be off by 0.2 in the logit; beside the encoder float32 costs nothing.
        with torch.autocast(device_type=batch.weights.device.type, enabled=False):
            contrastive = contrastive_terms(batch, rows, options).sum() / batch.size
            if batch.weights.shape[1] == 0:
                return contrastive
            terms = PENALTIES[self.penalty](batch, rows, options)
            smallest = torch.finfo(terms.dtype).tiny
            penalty = (batch.weights[rows] * terms).sum() * (batch.processes / batch.weight_sum.clamp_min(smallest))
            return (1 - self.penalty_weight) * contrastive + self.penalty_weight * penalty

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


def _batch_size(features: dict[str, Any]) -> int:
    # A bag of tokens has one offset for each text.
    return len(features["offsets"]) if "offsets" in features else _get_batch_size(features)
