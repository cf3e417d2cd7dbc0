"""What to mine, checked where it is given."""

from __future__ import annotations

from dataclasses import dataclass
from numbers import Integral
from typing import Literal, get_args

from st_clp.mining.candidates import CandidateFilter

SamplingStrategy = Literal["top", "random"]
JudgedNegatives = Literal["rank", "first", "ignore"]
OnShortage = Literal["relax", "random", "fewer", "drop"]
CandidateSource = Literal["model", "bm25", "mixed"]

WHOLE_NUMBERS = (
    "num_negatives",
    "queries_per_negative",
    "range_min",
    "range_max",
    "nprobe",
    "max_queries",
    "max_positives_per_query",
    "seed",
)


@dataclass(frozen=True)
class MiningOptions:
    """What to mine; :func:`st_clp.mining.mine_hard_negatives` explains each.

    Raises:
        ValueError: An option is out of range or not known.
    """

    num_negatives: int = 4
    queries_per_negative: int = 1
    range_min: int = 0
    range_max: int = 100
    absolute_margin: float | None = None
    relative_margin: float | None = None
    max_score: float | None = None
    min_score: float | None = None
    sampling_strategy: SamplingStrategy = "top"
    judged_negatives: JudgedNegatives | None = None
    prefer_known_queries: bool = True
    duplicate_threshold: float | None = None
    ignore_identical_ids: bool = True
    on_shortage: OnShortage = "relax"
    candidates: CandidateSource = "model"
    index: str | None = None
    nprobe: int | None = None
    max_queries: int | None = None
    max_positives_per_query: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        for name in WHOLE_NUMBERS:
            value = getattr(self, name)
            if value is not None and (isinstance(value, bool) or not isinstance(value, Integral)):
                raise ValueError(f"{name} must be a whole number, got {value!r}")
        for name in ("num_negatives", "queries_per_negative"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must be at least 0, got {getattr(self, name)}")
        for name in ("nprobe", "max_queries", "max_positives_per_query"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        choices = {
            "sampling_strategy": get_args(SamplingStrategy),
            "judged_negatives": (None, *get_args(JudgedNegatives)),
            "on_shortage": get_args(OnShortage),
            "candidates": get_args(CandidateSource),
        }
        for name, known in choices.items():
            if getattr(self, name) not in known:
                listed = ", ".join(repr(choice) for choice in known if choice is not None)
                raise ValueError(f"{name} must be one of {listed}, got {getattr(self, name)!r}")
        if self.duplicate_threshold is not None and not -1 <= self.duplicate_threshold <= 1:
            raise ValueError(f"duplicate_threshold is a cosine, -1 to 1, got {self.duplicate_threshold}")
        if self.nprobe is not None and self.index is None:
            raise ValueError("nprobe is for an approximate index; name one (index) or leave nprobe out")
        if self.index is not None and self.candidates == "bm25":
            raise ValueError("BM25 ranks by itself; leave index out, or take candidates='mixed'")
        _ = self.candidate_filter  # which has checks of its own

    @property
    def candidate_filter(self) -> CandidateFilter:
        """What a candidate must satisfy."""
        return CandidateFilter(
            self.range_min,
            self.range_max,
            self.absolute_margin,
            self.relative_margin,
            self.max_score,
            self.min_score,
        )
