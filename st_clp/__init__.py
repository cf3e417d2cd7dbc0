"""Fine-tune text-embedding models for retrieval: CLP loss, mixture of experts, ANCE negatives.

The public names are loaded when they are first used, so that ``import st_clp`` is quick and the loss and
the mixture of experts work where faiss, beir and ir_datasets are not installed.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.2.0"

# public name -> the module that defines it
_PUBLIC = {
    "CLPLoss": "st_clp.losses",
    "CachedCLPLoss": "st_clp.losses",
    "DocumentBatchSampler": "st_clp.losses",
    "plan_on_host": "st_clp.run.planning",
    "MoETransformer": "st_clp.moe",
    "upcycle": "st_clp.moe",
    "train_only": "st_clp.moe",
    "to_dense": "st_clp.moe",
    "load": "st_clp.moe",
    "Collection": "st_clp.data",
    "average": "st_clp.run.averaging",
    "mine_hard_negatives": "st_clp.mining",
    "AnceCallback": "st_clp.refresh",
}

if TYPE_CHECKING:
    from st_clp.data import Collection
    from st_clp.losses import CachedCLPLoss, CLPLoss, DocumentBatchSampler
    from st_clp.mining import mine_hard_negatives
    from st_clp.moe import MoETransformer, load, to_dense, train_only, upcycle
    from st_clp.refresh import AnceCallback
    from st_clp.run.averaging import average
    from st_clp.run.planning import plan_on_host

__all__ = [
    "AnceCallback",
    "CLPLoss",
    "CachedCLPLoss",
    "Collection",
    "DocumentBatchSampler",
    "MoETransformer",
    "__version__",
    "average",
    "load",
    "mine_hard_negatives",
    "plan_on_host",
    "to_dense",
    "train_only",
    "upcycle",
]


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module 'st_clp' has no attribute {name!r}")
    value = getattr(importlib.import_module(_PUBLIC[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *_PUBLIC])
