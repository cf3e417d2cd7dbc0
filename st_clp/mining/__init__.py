"""Hard negatives mined by the model itself (ANCE), and the queries that they answer."""

from st_clp.mining.miner import MinedNegatives, MiningAccount, mine, mine_hard_negatives

__all__ = ["MinedNegatives", "MiningAccount", "mine", "mine_hard_negatives"]
