"""Reading line-based files, plain or gzipped, with errors that name file and line."""

from __future__ import annotations

import gzip
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from st_clp.data.checks import require_id, require_text
from st_clp.data.errors import CollectionError
from st_clp.files import parse_object


def find_file(folder: Path, name: str) -> Path | None:
    """The file ``name`` in ``folder``, plain or with ``.gz`` after it; None where neither is there."""
    for candidate in (folder / name, folder / f"{name}.gz"):
        if candidate.is_file():
            return candidate
    return None


def read_lines(path: Path) -> Iterator[tuple[int, str]]:
    """Yield (line number from 1, line without its end) of a UTF-8 text file, skipping blank lines.

    Raises:
        CollectionError: The file is not there, is cut off, or holds bytes that are no UTF-8.
    """
    number = 0
    try:
        with gzip.open(path, "rt", encoding="utf-8") if path.suffix == ".gz" else open(path, encoding="utf-8") as file:
            for number, line in enumerate(file, start=1):
                if line.strip():
                    yield number, line.rstrip("\r\n").lstrip("\ufeff" if number == 1 else "")
    except FileNotFoundError as error:
        raise CollectionError(f"{path} is not there") from error
    except UnicodeDecodeError as error:
        raise CollectionError(
            f"{path}, after line {number}: not UTF-8 text ({error.reason}); save it as UTF-8"
        ) from error
    except (gzip.BadGzipFile, EOFError) as error:
        raise CollectionError(
            f"{path}, after line {number}: damaged or cut-off gzip file ({error}); copy it again"
        ) from error


def read_jsonl(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield (line number, object) of a JSON-lines file.

    Raises:
        CollectionError: A line that is no JSON object, named by file and line.
    """
    for number, line in read_lines(path):
        where = f"{path}, line {number}"
        yield number, parse_object(line, where, error=CollectionError, remedy="each line must be one JSON object")


def text_field(path: Path, number: int, row: dict[str, Any], name: str, *, default: str | None = None) -> str:
    """The string under ``name`` in a row; numbers become strings, since ids are often written as numbers.

    Raises:
        CollectionError: The field is missing (and has no default) or is no text, or holds half a character.
    """
    value = row.get(name, default)
    if isinstance(value, int) and not isinstance(value, bool):
        value = str(value)
    if value is None and name in row and default is not None:
        value = default
    if value is None:
        raise CollectionError(
            f"{path}, line {number}: no {name!r}; the line has {', '.join(map(repr, row)) or 'nothing'}"
        )
    return require_text(value, repr(name), f"{path}, line {number}")


def id_field(path: Path, number: int, row: dict[str, Any], what: str) -> str:
    """The id under ``_id`` of a row that is a ``what``: a query or a document.

    Raises:
        CollectionError: It is missing, or nothing that a run can carry.
    """
    value = row.get("_id")
    if value is None or (isinstance(value, int) and not isinstance(value, bool)):
        value = text_field(path, number, row, "_id")
    if not isinstance(value, str):
        raise CollectionError(f"{path}, line {number}: '_id' must be text, not {type(value).__name__}")
    return require_id(value, what, f"{path}, line {number}")
