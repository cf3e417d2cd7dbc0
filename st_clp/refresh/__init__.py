"""Refresh hard negatives: mine again during training with the current model.

Names are loaded on first use: the background mining process must start to listen before it has imported its libraries.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from st_clp.refresh.callback import AnceCallback
    from st_clp.refresh.history import plot_refreshes

__all__ = ["AnceCallback", "plot_refreshes"]

_HOMES = {"AnceCallback": "callback", "plot_refreshes": "history"}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
