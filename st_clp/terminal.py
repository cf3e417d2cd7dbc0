"""What goes to the terminal and into pictures: progress, notices, figures."""

from __future__ import annotations

import codecs
import io
import logging
import os
import sys
from pathlib import Path
from typing import Any

from rich.cells import cell_len
from rich.console import Console
from rich.table import Table

from st_clp.extras import import_package
from st_clp.files import whole_file

NARROWEST = 12  # columns, of names in a table

SHOW_OTHERWISE = "st-clp-show-otherwise"

# Replacements for characters that we print, for outputs whose encoding lacks them.
OTHERWISE = {"→": "->", "…": "...", "−": "-", "–": "-", "×": "x", "“": '"', "”": '"', "≥": ">=", "≤": "<="}


def _show_otherwise(error: UnicodeError) -> tuple[str, int]:
    if not isinstance(error, UnicodeEncodeError):
        raise error
    return "".join(OTHERWISE.get(sign, "?") for sign in error.object[error.start : error.end]), error.end


codecs.register_error(SHOW_OTHERWISE, _show_otherwise)


def show_what_can_be_shown() -> None:
    """Replace characters that the output's encoding cannot print, so that none of them ends a command with an error."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors=SHOW_OTHERWISE)


class Once(logging.Filter):
    """A log filter that shows each message of st_clp once: several stages read a collection and warn of the same."""

    def __init__(self) -> None:
        super().__init__()
        self._seen: set[tuple[str, int, str]] = set()

    def filter(self, record: logging.LogRecord) -> bool:
        """Whether to show this record."""
        if record.name.partition(".")[0] not in ("st_clp", "evaluators"):
            return True
        message = (record.name, record.levelno, record.getMessage())
        new = message not in self._seen
        self._seen.add(message)
        return new


def log_to_terminal() -> None:
    """Let warnings be seen as plain lines, each once."""
    handler = logging.StreamHandler()
    handler.addFilter(Once())
    logging.basicConfig(level=logging.WARNING, format="%(message)s", handlers=[handler])


def print_whole(console: Console, table: Table) -> None:
    """Print a table with all of its figures, wider than the terminal if it has to be.

    Columns that may be folded are; give those with names ``min_width=NARROWEST``.
    """
    frame = 3  # columns for padding and rule
    least = 1 + sum(
        frame + (max(cell_len(str(cell)) for cell in (column.header, *column.cells)) if column.no_wrap else NARROWEST)
        for column in table.columns
    )
    seen = console.width
    console.width = max(least, seen)
    try:
        console.print(table)
    finally:
        console.width = seen


def new_console(**options: Any) -> Console:
    """A console that does not colour numbers or turn ``:name:`` into an emoji; other options are rich's.

    Give ``markup=False`` where all of the text comes from outside; elsewhere text from outside goes through
    :func:`rich.markup.escape`.
    """
    return Console(highlight=False, emoji=False, **options)


def duration(seconds: float) -> str:
    """A time as it is read: ``"12.0 s"``, ``"3.5 min"``, ``"2.1 h"``."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, hours = seconds / 60, seconds / 3600
    return f"{minutes:.1f} min" if minutes < 60 else f"{hours:.1f} h"


def size(number: float) -> str:
    """A number of bytes as it is read: ``"12.0 MB"``."""
    for unit in ("B", "kB", "MB", "GB"):
        if number < 1000:
            return f"{number:.1f} {unit}"
        number /= 1000
    return f"{number:.1f} TB"


def new_figure(width: float, height: float) -> Any:
    """An empty figure of matplotlib's, of this size in inches.

    Raises:
        ModuleNotFoundError: matplotlib is not installed; the message says how to.
    """
    figures = import_package("matplotlib.figure", "a picture", "st-clp[plots]")
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
