"""Whether two output folders hold the same, times aside, and what else lies in them."""

from __future__ import annotations

import contextlib
import json
import re
import shutil
import sqlite3
import tempfile
from pathlib import Path
from typing import Any

OF_THE_GO = frozenset(("created", "seconds", "query_usage"))
"""What each go has of its own, which may have found the work half done: time, and what it paid itself."""
UNFINISHED = (".partial", ".replaced", ".begun", ".tmp", "-wal", "-shm", "-journal")
KEPT_OF_QUERIES = {
    "answers": "generator, prompt, document, queries, cause, prompt_tokens, completion_tokens, cost",
    **dict.fromkeys(("generators", "prompts"), "*"),
}


def files_of(folder: Path) -> dict[str, Path]:
    """What lies in a folder and below it, folders too, by its path within."""
    return {str(path.relative_to(folder)): path for path in sorted(folder.rglob("*"))}


def leftovers(folder: Path, expected: Path | None = None) -> list[str]:
    """What an unfinished write has left, and whatever ``expected`` does not have."""
    known = None if expected is None else files_of(expected)
    return [name for name in files_of(folder) if name.endswith(UNFINISHED) or (known is not None and name not in known)]


def differences(folder: Path, expected: Path) -> list[str]:
    """The files of ``expected`` that ``folder`` lacks or has with another content, and where they begin to differ."""
    found, wrong = files_of(folder), []
    for name, path in files_of(expected).items():
        if name not in found:
            wrong.append(f"{name} is missing")
        elif path.is_file() and (one := _content_of(found[name])) != (other := _content_of(path)):
            wrong.append(f"{name} differs: {_first_difference(one, other)}")
    return wrong


def _content_of(path: Path) -> bytes | str:
    """What a file says: its bytes, but for times, and for how SQLite lays out its pages."""
    if path.suffix == ".sqlite":
        return json.dumps(_queries_in(path), sort_keys=True)
    if path.suffix == ".json":
        return json.dumps(_of_the_work(json.loads(path.read_text(encoding="utf-8"))), sort_keys=True)
    if path.name == "README.md":
        return re.sub(r"(?m)^- \*\*Training\*\*: .*$", "", path.read_text(encoding="utf-8"))
    return path.read_bytes()


def _is_dated(name: str, record: Any) -> bool:
    """Whether this is a stage's record of a file that tells times: its digest differs with them."""
    return name.endswith((".json", "README.md")) and isinstance(record, dict) and "digest" in record


def _first_difference(one: bytes | str, other: bytes | str) -> str:
    shorter = min(len(one), len(other))
    place = next((i for i in range(shorter) if one[i] != other[i]), shorter)
    return " and ".join(repr(text[max(0, place - 60) : place + 60]) for text in (one, other))


def _of_the_work(content: Any) -> Any:
    if isinstance(content, dict):
        left = {name: value for name, value in content.items() if name not in OF_THE_GO and not _is_dated(name, value)}
        return {name: _of_the_work(value) for name, value in left.items()}
    return [_of_the_work(value) for value in content] if isinstance(content, list) else content


def _queries_in(store: Path) -> dict[str, list[tuple[Any, ...]]]:
    with tempfile.TemporaryDirectory() as copy:
        # A copy: whoever opens a database that was not closed mends it.
        for path in store.parent.glob(f"{store.name}*"):
            shutil.copy(path, copy)
        with contextlib.closing(sqlite3.connect(Path(copy) / store.name)) as database:
            return {
                name: sorted(database.execute(f"SELECT {columns} FROM {name}"), key=repr)
                for name, columns in KEPT_OF_QUERIES.items()
            }
