"""The CLP loss for sentence-transformers, uncached and gradient-cached."""

from st_clp.losses.cached import CachedCLPLoss
from st_clp.losses.clp import CLPLoss

__all__ = ["CLPLoss", "CachedCLPLoss"]
