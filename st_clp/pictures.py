"""The figure that a picture is drawn into, and the file that it is written to."""

from __future__ import annotations

import importlib
import os
from pathlib import Path
from typing import Any

from st_clp.files import whole_file


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


def save_figure(figure: Any, path: str | os.PathLike[str]) -> None:
    """Write a figure, whole or not at all; the file's ending (``.png``, ``.svg``, ``.pdf``) says what kind of picture.

    Raises:
        OSError: The file cannot be written.
        ValueError: matplotlib does not know the ending.
    """
    target = Path(path)
    with whole_file(target, "wb") as file:
        figure.savefig(file, format=target.suffix[1:] or None)
