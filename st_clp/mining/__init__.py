"""Hard negatives mined by the model itself (ANCE), and the queries that they answer."""

from st_clp.mining.account import MiningAccount
from st_clp.mining.miner import MinedNegatives, mine, mine_hard_negatives
from st_clp.mining.refresh import AnceCallback, plot_refreshes
from st_clp.mining.rows import DETAIL_COLUMNS, Negative, TrainingRow
from st_clp.options import MiningOptions

__all__ = [
    "DETAIL_COLUMNS",
    "AnceCallback",
    "MinedNegatives",
    "MiningAccount",
    "MiningOptions",
    "Negative",
    "TrainingRow",
    "mine",
    "mine_hard_negatives",
    "plot_refreshes",
]
