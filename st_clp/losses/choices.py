"""The settings that the terms of the loss read."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

Similarity = Callable[[Tensor, Tensor], Tensor]
Direction = Literal["query_to_doc", "query_to_query", "doc_to_query", "doc_to_doc"]
PartitionMode = Literal["joint", "per_direction"]
HardnessMode = Literal["in_batch_negatives", "hard_negatives", "all_negatives"]
MarginStrategy = Literal["absolute", "relative"]


@dataclass(frozen=True)
class Options:
    """The settings that the terms of the loss read; see CLPLoss for their meaning."""

    scale: float
    in_batch_negatives: bool
    similarity_fct: Similarity
    directions: tuple[str, ...]
    partition_mode: str
    hardness_mode: str | None
    hardness_strength: float
    margin: float | None
    margin_strategy: MarginStrategy

    def false_negatives(self, similarity: Tensor, threshold: Tensor) -> Tensor:
        """True where a candidate is so similar that it is likely to be relevant, after GISTEmbed (Solatorio 2024).

        Args:
            similarity: ``(queries, candidates)``, the guide's, or the model's own without one.
            threshold: ``(queries,)``, the similarity of each query and its positive.
        """
        assert self.margin is not None
        slack = self.margin if self.margin_strategy == "absolute" else threshold.abs() * self.margin
        return similarity > (threshold - slack)[:, None]
