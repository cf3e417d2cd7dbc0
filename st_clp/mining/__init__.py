"""Hard negatives mined by the model itself (ANCE), and the queries that they answer."""

import importlib
from typing import Any

from st_clp.mining.account import MiningAccount
from st_clp.mining.miner import MinedNegatives, mine, mine_hard_negatives
from st_clp.mining.rows import DETAIL_COLUMNS, Negative, TrainingRow, read_rows, to_dataset, write_rows
from st_clp.options import MiningOptions

__all__ = [
    "DETAIL_COLUMNS",
    "MinedNegatives",
    "MiningAccount",
    "MiningOptions",
    "Negative",
    "TrainingRow",
    "mine",
    "mine_hard_negatives",
    "read_rows",
    "to_dataset",
    "write_rows",
]


def __getattr__(name: str) -> Any:
    # Kept for code that imports refreshing from here, where it was in 0.1.0.
    if name in ("AnceCallback", "plot_refreshes"):
        return getattr(importlib.import_module("st_clp.refresh"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
