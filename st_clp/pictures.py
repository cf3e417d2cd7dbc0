"""The figure that a picture is drawn into."""

from __future__ import annotations

import importlib
from typing import Any


def new_figure(width: float, height: float) -> Any:
    """An empty figure of matplotlib's, of this size in inches.

    Raises:
        ModuleNotFoundError: matplotlib is not installed; the message says how to.
    """
    try:
        figures = importlib.import_module("matplotlib.figure")
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError("a plot needs matplotlib: pip install 'st-clp[plots]'") from error
    return figures.Figure(figsize=(width, height), layout="constrained")
