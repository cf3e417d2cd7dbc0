"""The ids of a store that is too large to hold them as Python strings."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import overload

import numpy as np

SCAN_BYTES = 64 * 2**20
ITERATE_ROWS = 65_536


class FileIds(Sequence[str]):
    """The ids in a file of JSON strings, a line each: 8 bytes of memory for each, read as they are asked for.

    Args:
        path: The file.
        number: How many of its lines to read.
    """

    def __init__(self, path: Path, number: int) -> None:
        self._bytes = np.memmap(path, np.uint8, "r") if path.stat().st_size else np.zeros(0, np.uint8)
        ends: list[np.ndarray] = []
        found = 0
        for begin in range(0, len(self._bytes), SCAN_BYTES):
            if found >= number:
                break
            ends.append(np.flatnonzero(self._bytes[begin : begin + SCAN_BYTES] == ord("\n")) + begin + 1)
            found += len(ends[-1])
        self._ends = np.concatenate([np.zeros(1, np.int64), *ends])[: number + 1]

    def __len__(self) -> int:
        return len(self._ends) - 1

    @overload
    def __getitem__(self, index: int) -> str: ...
    @overload
    def __getitem__(self, index: slice) -> list[str]: ...
    def __getitem__(self, index: int | slice) -> str | list[str]:
        if isinstance(index, slice):
            begin, end, step = index.indices(len(self))
            if step != 1:
                return [self[row] for row in range(begin, end, step)]
            return [json.loads(line) for line in self._read(begin, max(begin, end)).splitlines()]
        row = range(len(self))[index]
        return json.loads(self._read(row, row + 1))

    def __iter__(self) -> Iterator[str]:
        for begin in range(0, len(self), ITERATE_ROWS):
            yield from self[begin : begin + ITERATE_ROWS]

    def _read(self, begin: int, end: int) -> bytes:
        return self._bytes[self._ends[begin] : self._ends[end]].tobytes()
