"""The files that an evaluation leaves: what they are called, and a CSV line for every call."""

from __future__ import annotations

import csv
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any


def file_part(name: str) -> str:
    """A name as part of a file name: at most its last 100 characters, letters, digits and a few signs only."""
    return re.sub(r"[^\w.@+-]+", "_", name)[-100:].strip("_.")


def require_columns(path: Path, columns: Sequence[str]) -> None:
    """Refuse a CSV file of other columns: lines added to it would stand under the wrong headings.

    Raises:
        ValueError: The file is there and its first line is not ``columns``.
    """
    try:
        with open(path, encoding="utf-8", newline="") as file:
            found = next(csv.reader(file), [])
    except FileNotFoundError:
        return
    if found and found != list(columns):
        raise ValueError(
            f"{path} has the columns {', '.join(found)}, but this evaluator writes {', '.join(columns)}; "
            "choose another output_path or name, or move the file away"
        )


def append_row(path: Path, row: Mapping[str, Any]) -> None:
    """Add a line to a CSV file, with the headings first if it is new."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "a", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(row), lineterminator="\n")
        if file.tell() == 0:
            writer.writeheader()
        writer.writerow(row)
