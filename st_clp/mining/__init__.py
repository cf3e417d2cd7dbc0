"""Hard negatives mined by the model itself (ANCE), and the queries that they answer."""

from st_clp.mining.account import MiningAccount
from st_clp.mining.miner import MinedNegatives, mine, mine_hard_negatives
from st_clp.mining.rows import Negative, TrainingRow

__all__ = ["MinedNegatives", "MiningAccount", "Negative", "TrainingRow", "mine", "mine_hard_negatives"]
