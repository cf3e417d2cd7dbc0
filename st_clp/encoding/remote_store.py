"""Embedding stores at an address, such as ``s3://bucket/embeddings/ko``, where no file can grow.

    manifest.json              what the embeddings are of, and how many rows each part has
    part-DIGEST-000000000000/  the corpus's first documents, and so on: each a store of its own (``shards.py``)

A part is one shard, so that a worker that is lost costs no more. It is encoded into a temporary folder and copied, its
manifest last; the store's manifest is written when all parts are there. The digest is of what the embeddings are of, so
that a store is whole until another has taken its place. Writers need no lock: two that encode the same part write the
same bytes.
"""

from __future__ import annotations

import bisect
import json
import tempfile
from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, overload

import numpy as np
from tqdm.auto import tqdm

from st_clp.distributed import gpus_per_worker
from st_clp.encoding.addresses import Place
from st_clp.encoding.building import Builder
from st_clp.encoding.encode import ACCELERATOR_WINDOW, CPU_WINDOW
from st_clp.encoding.parts import Piece, part_name, write_parts
from st_clp.encoding.shards import (
    EMBEDDINGS,
    FORMAT,
    IDS,
    KEY_BYTES,
    KEYS,
    MANIFEST,
    StoreError,
    checked_manifest,
    ids_in,
)
from st_clp.files import parse_object, require_field

NEAR_BYTES = 1 << 16  # rows that lie nearer to each other are read with what is between them


class AddressBuilder(Builder):
    """Encodes to an address, in this process or on a cluster; the arguments are those of :class:`Builder`."""

    def write(self, place: str) -> None:
        """Make the store of this model and corpus at an address.

        Raises:
            CollectionError, ValueError, OSError: As in ``EmbeddingStore.build``.
        """
        there, manifest = Place(place), self._manifest()
        sizes = there.sizes()
        if self._is_whole(there, manifest, sizes):
            return
        if foreign := [name for name in sizes if name != MANIFEST and not name.startswith("part-")]:
            raise ValueError(
                f"{place} holds files that are no part of an embedding store ({foreign[0]!r}); give the store an "
                "address of its own"
            )
        if self._encoding.ray is not None:
            self._window = ACCELERATOR_WINDOW if gpus_per_worker(self._encoding) else CPU_WINDOW
        done = dict(self._finished(there, manifest, sizes))
        used: dict[int, int] = {}  # the first document of each part to its rows
        with self._progress() as progress:
            end = [False]
            wanted = _missing(done, self._window, place, end, used, progress)
            what = self._model, self._corpus, self._task, self._encoding, manifest, wanted
            for (begin, number, _), written in write_parts(*what, known=[], progress=progress):
                end[0] |= written < number
                used[begin] = written
        parts = sorted((begin, rows) for begin, rows in used.items() if rows)
        if not parts:
            raise self._empty()
        content = {"format": FORMAT, **manifest, "documents": sum(rows for _, rows in parts), "parts": parts}
        there.write(MANIFEST, json.dumps(content).encode())
        own = {part_name(begin, manifest) for begin, _ in parts}
        for name in {name.partition("/")[0] for name in sizes if name.startswith("part-")} - own:
            there.remove(name)

    def already_encoded(self, place: str | Path) -> int:
        """How many texts at this address need not be encoded again."""
        there, manifest = Place(str(place)), self._manifest()
        return sum(rows for _, (_, rows) in self._finished(there, manifest, there.sizes()))

    def _is_whole(self, place: Place, manifest: dict[str, Any], sizes: dict[str, int]) -> bool:
        """Whether the finished store of this manifest exists, every file with its full length."""
        try:
            found = _read_manifest(place)
        except StoreError:
            return False
        if found is None or any(found.get(name) != value for name, value in manifest.items()):
            return False
        return all(self._is_long_enough(part_name(begin, manifest), rows, sizes) for begin, rows in found["parts"])

    def _is_long_enough(self, name: str, rows: int, sizes: dict[str, int]) -> bool:
        row_bytes = self.dim * np.dtype(self._stored_as).itemsize
        wanted = {EMBEDDINGS: rows * row_bytes, KEYS: rows * KEY_BYTES}
        return f"{name}/{IDS}" in sizes and all(sizes.get(f"{name}/{file}") == size for file, size in wanted.items())

    def _finished(
        self, place: Place, manifest: dict[str, Any], sizes: dict[str, int]
    ) -> Iterator[tuple[int, tuple[int, int]]]:
        """(first document, (documents asked for, rows)) of the existing parts of this store."""
        begins = part_name(0, manifest).removesuffix(f"{0:012d}")
        names = [name for name in sizes if name.startswith(begins) and name.endswith(f"/{MANIFEST}")]
        for name, content in place.read(names).items():
            try:
                found = parse_object(content, f"{place.address}/{name}", error=StoreError)
            except StoreError:
                continue
            begin, number = found.get("part", (0, 0))
            rows, part = found.get("documents", 0), name.partition("/")[0]
            if part == part_name(begin, manifest) and self._is_long_enough(part, rows, sizes):
                yield begin, (number, rows)


def _missing(
    done: dict[int, tuple[int, int]], size: int, place: str, end: list[bool], used: dict[int, int], progress: tqdm
) -> Iterator[Piece]:
    """The missing parts, until ``end`` holds True or an existing part contains the corpus's end.

    Existing parts may have another size, if another kind of device wrote them.

    Args:
        done: (documents asked for, rows) of the existing parts, by their first documents.
        size: Documents of a part.
        place: The store's address.
        end: Whether the corpus's end was met.
        used: Filled with the rows of the existing parts.
        progress: A bar to advance by them.
    """
    begins = sorted(done)
    begin = 0
    while not end[0]:
        if begin in done:
            number, used[begin] = done[begin]
            progress.update(used[begin])
            if used[begin] < number:
                return
        else:
            number = size - begin % size
            if (later := bisect.bisect(begins, begin)) < len(begins):
                number = min(number, begins[later] - begin)
            yield begin, number, place
        begin += number


def _read_manifest(place: Place) -> dict[str, Any] | None:
    """The manifest of the finished store at an address; None if there is none.

    Raises:
        StoreError: It cannot be read, or is invalid.
    """
    content = place.read([MANIFEST]).get(MANIFEST)
    if content is None:
        return None
    where = f"{place.address}/{MANIFEST}"
    found = checked_manifest(parse_object(content, where, error=StoreError), where)
    if found is None or "documents" not in found:
        return None
    parts = require_field(found, "parts", list, where, error=StoreError)
    if not all(isinstance(part, list) and len(part) == 2 and all(isinstance(n, int) for n in part) for part in parts):
        raise StoreError(f"{where}: 'parts' must be pairs of numbers")
    if sum(rows for _, rows in parts) != found["documents"]:
        raise StoreError(f"{where} names {found['documents']:,} documents, and its parts have another number")
    return found


def open_at(address: str) -> tuple[RemoteIds, RemoteRows]:
    """(ids, embeddings) of the store at an address, which are read when needed.

    Raises:
        FileNotFoundError: There is no finished store.
        StoreError: Its manifest is invalid.
    """
    place = Place(address)
    manifest = _read_manifest(place)
    if manifest is None:
        raise FileNotFoundError(f"{address} holds no finished embedding store; build it with EmbeddingStore.build")
    own = {name: value for name, value in manifest.items() if name not in ("format", "documents", "parts")}
    parts = [(part_name(begin, own), rows) for begin, rows in manifest["parts"]]
    return RemoteIds(place, parts), RemoteRows(place, parts, manifest["dim"], manifest["dtype"])


class RemoteIds(Sequence[str]):
    """The ids of a store at an address, copied to a temporary file when first needed.

    Args:
        place: The store's.
        parts: (name, rows) of each part.
    """

    def __init__(self, place: Place, parts: Sequence[tuple[str, int]]) -> None:
        self._place, self._parts = place, parts
        self._number = sum(rows for _, rows in parts)

    @cached_property
    def _ids(self) -> Sequence[str]:
        with tempfile.NamedTemporaryFile(suffix=IDS) as file:
            for begin in range(0, len(self._parts), 64):
                names = [f"{name}/{IDS}" for name, _ in self._parts[begin : begin + 64]]
                found = self._place.read(names)
                file.writelines(found.get(name, b"") for name in names)
            file.flush()
            # The memory map stays valid after the file is removed.
            return ids_in(Path(file.name), self._number, self._place.address)

    def __len__(self) -> int:
        return self._number

    @overload
    def __getitem__(self, index: int) -> str: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[str]: ...
    def __getitem__(self, index: int | slice) -> str | Sequence[str]:
        return self._ids[index]

    def __iter__(self) -> Iterator[str]:
        return iter(self._ids)


class RemoteRows:
    """The embeddings of a store at an address, read by ranges of bytes.

    Args:
        place: The store's.
        parts: (name, rows) of each part.
        dim: The width.
        dtype: As in the manifest.

    Attributes:
        shape: (rows, dim).
    """

    def __init__(self, place: Place, parts: Sequence[tuple[str, int]], dim: int, dtype: str) -> None:
        self._place = place
        self._names = [name for name, _ in parts]
        self._ends = np.cumsum([rows for _, rows in parts])
        self._dtype = np.dtype(dtype).newbyteorder("<")
        self._row_bytes = dim * self._dtype.itemsize
        self.shape = (int(self._ends[-1]), dim)

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, index: slice | np.ndarray) -> np.ndarray:
        """The rows of a slice without a step, or with these numbers."""
        if isinstance(index, slice):
            begin, end, _ = index.indices(len(self))
            return self._read(self._stretches(begin, end))
        places, back = np.unique(index, return_inverse=True)
        apart = np.diff(places) * self._row_bytes > NEAR_BYTES
        groups = np.split(places, np.flatnonzero(apart) + 1) if len(places) else []
        read = [self._read(self._stretches(int(group[0]), int(group[-1]) + 1))[group - group[0]] for group in groups]
        return np.concatenate([np.zeros((0, self.shape[1]), self._dtype), *read])[back]

    def _stretches(self, begin: int, end: int) -> list[tuple[str, int, int]]:
        """(file, first byte, last byte and one) of the rows from ``begin`` to ``end``."""
        found = []
        part = int(np.searchsorted(self._ends, begin, side="right"))
        while begin < end:
            first = int(self._ends[part - 1]) if part else 0
            last = min(end, int(self._ends[part]))
            where = (begin - first) * self._row_bytes, (last - first) * self._row_bytes
            found.append((f"{self._names[part]}/{EMBEDDINGS}", *where))
            begin, part = last, part + 1
        return found

    def _read(self, stretches: list[tuple[str, int, int]]) -> np.ndarray:
        content = bytearray().join(self._place.read_ranges(stretches))  # which PyTorch may take as it is
        return np.frombuffer(content, self._dtype).reshape(-1, self.shape[1])
