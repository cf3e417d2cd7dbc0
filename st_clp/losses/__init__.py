"""The CLP loss for sentence-transformers, uncached and gradient-cached, and batches of near documents for it."""

from st_clp.losses.cached import CachedCLPLoss
from st_clp.losses.clp import CLPLoss
from st_clp.losses.document_batches import DocumentBatchSampler

__all__ = ["CLPLoss", "CachedCLPLoss", "DocumentBatchSampler"]
