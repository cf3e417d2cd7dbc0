"""Which of the documents that a model ranks for a query may be its negatives, and why the others may not."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple


@dataclass(frozen=True)
class Candidate:
    """A document that the model ranked for a query.

    Attributes:
        doc_id: Its id.
        rank: Its place in the ranking, the query's relevant documents left out, from 0.
        score: Its similarity to the query by the model, or the cross-encoder's score where one rescored.
    """

    doc_id: str
    rank: int
    score: float


class Refusal(NamedTuple):
    """Why a candidate may not be a negative, and by how much its score is on the wrong side of a limit."""

    reason: str
    excess: float


@dataclass(frozen=True)
class CandidateFilter:
    """What a candidate must satisfy. The meanings are those of ``sentence_transformers.util.mine_hard_negatives``.

    Attributes:
        range_min: Skip this many of the best candidates that pass the other limits.
        range_max: Look no further than this rank.
        absolute_margin: A negative must score at least this much below the query's lowest-scoring positive.
        relative_margin: A negative must score below that positive by at least this share of its score's size.
        max_score: A negative must score at most this.
        min_score: A negative must score at least this.
    """

    range_min: int = 0
    range_max: int = 100
    absolute_margin: float | None = None
    relative_margin: float | None = None
    max_score: float | None = None
    min_score: float | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.range_min < self.range_max:
            raise ValueError(
                f"range_min must be at least 0 and below range_max, got range_min={self.range_min} "
                f"and range_max={self.range_max}"
            )
        for name in ("absolute_margin", "relative_margin"):
            value = getattr(self, name)
            if value is not None and not value >= 0:
                raise ValueError(f"{name} must be at least 0, got {value}")
        for name in ("max_score", "min_score"):
            value = getattr(self, name)
            if value is not None and math.isnan(value):
                raise ValueError(f"{name} must be a number, got {value}")
        if self.max_score is not None and self.min_score is not None and self.min_score > self.max_score:
            raise ValueError(
                f"min_score must not be above max_score, got min_score={self.min_score} and max_score={self.max_score}"
            )

    def refusal(self, candidate: Candidate, positive_score: float) -> Refusal | None:
        """Why this candidate may not be a negative for its score; None where it may."""
        limits: list[tuple[str, float]] = []
        if self.absolute_margin is not None:
            limits.append(("within absolute_margin of the positive", positive_score - self.absolute_margin))
        if self.relative_margin is not None:
            # The margin is a share of the positive's size, so that it points downwards for negative scores too.
            margin = self.relative_margin * abs(positive_score)
            limits.append(("within relative_margin of the positive", positive_score - margin))
        if self.max_score is not None:
            limits.append(("above max_score", self.max_score))
        for reason, limit in limits:
            if candidate.score > limit:
                return Refusal(reason, candidate.score - min(limit for _, limit in limits))
        if self.min_score is not None and candidate.score < self.min_score:
            return Refusal("below min_score", self.min_score - candidate.score)
        return None
