"""The CLP loss for sentence-transformers, uncached and gradient-cached, and batches of near documents for it."""

from st_clp.losses.cached import CachedCLPLoss
from st_clp.losses.clp import CLPLoss
from st_clp.losses.document_batches import DocumentBatchSampler
from st_clp.losses.host_texts import plan_on_host

__all__ = ["CLPLoss", "CachedCLPLoss", "DocumentBatchSampler", "plan_on_host"]
