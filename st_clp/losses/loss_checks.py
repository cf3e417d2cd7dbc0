"""Refusing settings that cannot be, by name and range."""

from __future__ import annotations

import math
from typing import Any

from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss

from st_clp.losses.penalties import PENALTIES


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
