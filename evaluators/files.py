"""The files that an evaluation leaves: a CSV line for every call, and the last call in full as JSON."""

from __future__ import annotations

import csv
import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO


def file_part(name: str) -> str:
    """A name as part of a file name: at most its last 100 characters, letters, digits and a few signs only."""
    return re.sub(r"[^\w.@+-]+", "_", name)[-100:].strip("_.")


@contextmanager
def replacing(path: Path) -> Iterator[TextIO]:
    """Write a text file beside ``path`` and rename it when it is whole."""
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(path.name + ".partial")
    try:
        with open(beside, "w", encoding="utf-8", newline="\n") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        beside.replace(path)
    finally:
        beside.unlink(missing_ok=True)


def write_json(path: Path, content: Any) -> None:
    """Write JSON so that the file appears whole or not at all."""
    with replacing(path) as file:
        json.dump(content, file, indent=1, ensure_ascii=False)
        file.write("\n")


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
