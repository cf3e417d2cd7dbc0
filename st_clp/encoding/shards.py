"""Embeddings on disk, in shards with checksums.

A folder holds four files that only grow, and a manifest:

    embeddings.bin   rows of float16 or float32
    ids.jsonl        a document's id on each line, as JSON
    keys.bin         16 bytes for each text, by which embeddings are used again
    shards.jsonl     for each shard its number of rows and a checksum of its part of the three files
    manifest.json    what the embeddings are of

A shard is valid once its line is in ``shards.jsonl``; bytes after the last shard are cut off when a stopped run is
resumed. Its checksum also covers the model, task, precision and width, so that a shard of another model counts as
damaged. Version 0.1.0 wrote format 2, whose checksums do not; see :func:`seal_shards`.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import logging
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, overload

import numpy as np

from st_clp.files import UNFINISHED, parse_object, read_json, require_field, whole_file, write_json

SCAN_BYTES = 64 * 2**20
ITERATE_ROWS = 65_536


class FileIds(Sequence[str]):
    """Ids in a file with one JSON string a line, read when accessed; 8 bytes of memory for each.

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


logger = logging.getLogger(__name__)

MANIFEST, EMBEDDINGS, IDS, KEYS, SHARDS = "manifest.json", "embeddings.bin", "ids.jsonl", "keys.bin", "shards.jsonl"
LOCK = ".lock"  # what the name of the file beside a store ends in that is locked while it is made
FORMAT = 3
UNSEALED_FORMAT = 2
ENCODING = ("model", "task", "computed_in", "dtype", "dim")  # what must agree for an embedding to be used again


class StoreError(ValueError):
    """A store's files are invalid; the message names the file and the remedy."""


REMEDY = "what made the store makes it anew; `st-clp store rm` removes it"


@dataclass(frozen=True)
class Shard:
    """Consecutive rows: their number, the bytes of their ids, and a checksum over ids, keys and embeddings.

    ``sealed`` says whether the checksum also covers the model and the other settings of the embeddings.
    """

    rows: int
    id_bytes: int
    checksum: str
    sealed: bool = True


def write_manifest(folder: Path, manifest: dict[str, Any]) -> None:
    """Write a manifest atomically."""
    write_json(folder / MANIFEST, {"format": FORMAT, **manifest})


def read_manifest(folder: Path) -> dict[str, Any] | None:
    """Read the manifest in a folder; None if there is none, or one of an unknown format.

    Raises:
        StoreError: It cannot be read, or is invalid.
    """
    file = folder / MANIFEST
    try:
        manifest = read_json(file, error=StoreError, remedy=REMEDY)
    except (FileNotFoundError, NotADirectoryError):
        return None
    return checked_manifest(manifest, str(file))


def checked_manifest(manifest: dict[str, Any], where: str) -> dict[str, Any] | None:
    """Check a manifest; None if its format is unknown.

    Args:
        manifest: The contents of a manifest.
        where: The file.

    Raises:
        StoreError: It is invalid.
    """
    if manifest.get("format") not in (FORMAT, UNSEALED_FORMAT):
        return None

    def field(name: str, kind: type, **limits: float) -> Any:
        return require_field(manifest, name, kind, where, error=StoreError, remedy=REMEDY, **limits)

    for name in ("model", "task", "computed_in", "corpus", "corpus_fingerprint"):
        field(name, str)
    if field("dtype", str) not in ("float16", "float32"):
        raise StoreError(f"{where}: 'dtype' must be float16 or float32, not {manifest['dtype']!r:.60}; {REMEDY}")
    field("dim", int, least=1, most=1 << 24)
    if "documents" in manifest:
        field("documents", int, least=1)
    return manifest


def usable_manifest(folder: Path) -> dict[str, Any] | None:
    """The manifest in a folder; None if there is none or it cannot be read, with a warning."""
    try:
        return read_manifest(folder)
    except StoreError as error:
        logger.warning("%s; it is encoded anew", str(error).removesuffix(f"; {REMEDY}"))
        return None


def read_shards(folder: Path) -> list[Shard]:
    """The recorded shards, up to the first invalid line."""
    found: list[Shard] = []
    try:
        lines = (folder / SHARDS).read_bytes().splitlines()
    except OSError:
        return found
    for number, line in enumerate(lines, start=1):
        where = f"{folder / SHARDS}, line {number}"
        try:
            values = parse_object(line, where, error=StoreError)
            rows = require_field(values, "rows", int, where, error=StoreError, least=1)
            id_bytes = require_field(values, "id_bytes", int, where, error=StoreError, least=1)
            kind = "sealed" if "sealed" in values else "checksum"
            checksum = require_field(values, kind, str, where, error=StoreError)
        except StoreError:
            break
        found.append(Shard(rows, id_bytes, checksum, kind == "sealed"))
    return found


def record_line(shard: Shard) -> bytes:
    """A shard's line in the record."""
    kind = "sealed" if shard.sealed else "checksum"
    return json.dumps({"rows": shard.rows, "id_bytes": shard.id_bytes, kind: shard.checksum}).encode() + b"\n"


KEY_BYTES = 16
HELD_IDS = 1_000_000  # as Python strings, some 70 bytes each; more are read from the file as they are needed


def text_key(text: str) -> bytes:
    """A hash of 16 bytes; the chance that two texts share one is about 1 in 10^20."""
    return hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=KEY_BYTES).digest()


class ShardFiles:
    """The files of a store, for reading or adding shards.

    Args:
        folder: Where they are.
        manifest: The manifest. In the former format, shards without a seal are valid too.
    """

    def __init__(self, folder: Path, manifest: dict[str, Any]) -> None:
        self.folder = folder
        self.dim: int = manifest["dim"]
        self.dtype = np.dtype(manifest["dtype"]).newbyteorder("<")
        self._row_bytes = self.dim * self.dtype.itemsize
        self._seal = json.dumps([manifest[name] for name in ENCODING]).encode()
        self._all_sealed = manifest.get("format", FORMAT) != UNSEALED_FORMAT

    def read(self) -> Iterator[tuple[Shard, list[str], np.ndarray, np.ndarray, bool]]:
        """Yield (shard, ids, keys (rows, 16), embeddings (rows, dim), whether the checksum is right) in order.

        If a file is missing, every shard is wrong. Nothing is written: the disk may be read-only.
        """
        with self._open(IDS) as ids, self._open(KEYS) as keys, self._open(EMBEDDINGS) as embeddings:
            for shard in read_shards(self.folder):
                sizes = shard.id_bytes, shard.rows * KEY_BYTES, shard.rows * self._row_bytes
                files = ids, keys, embeddings
                left = [_left(file) for file in files]
                if any(size > number for size, number in zip(sizes, left, strict=True)):
                    # not read, nor room made for a number of rows that nothing can hold
                    for file, size, number in zip(files, sizes, left, strict=True):
                        file.seek(min(size, number), io.SEEK_CUR)
                    yield shard, [], _no_keys(), np.zeros((0, self.dim), self.dtype), False
                    continue
                parts = [file.read(size) for file, size in zip(files, sizes, strict=True)]
                if not self._is_right(shard, *parts):
                    yield shard, [], _no_keys(), np.zeros((0, self.dim), self.dtype), False
                    continue
                yield (
                    shard,
                    [json.loads(line) for line in parts[0].splitlines()],
                    np.frombuffer(parts[1], dtype=np.uint8).reshape(-1, KEY_BYTES),
                    np.frombuffer(parts[2], dtype=self.dtype).reshape(-1, self.dim),
                    True,
                )

    def _is_right(self, shard: Shard, *parts: bytes) -> bool:
        if shard.sealed:
            return shard.checksum == _checksum(self._seal, *parts)
        return not self._all_sealed and shard.checksum == _checksum(*parts)

    def _open(self, name: str) -> IO[bytes]:
        try:
            return open(self.folder / name, "rb")
        except FileNotFoundError:
            return io.BytesIO()

    def rows(self) -> np.ndarray:
        """All embeddings, (rows, dim), memory-mapped."""
        total = sum(shard.rows for shard in read_shards(self.folder))
        path = self.folder / EMBEDDINGS
        # A file that was truncated or removed has fewer rows than are recorded.
        total = min(total, path.stat().st_size // self._row_bytes if path.exists() else 0)
        if not total:
            return np.zeros((0, self.dim), self.dtype)
        return np.memmap(path, self.dtype, "r", shape=(total, self.dim))

    def keep(self, number: int) -> None:
        """Truncate the files to the first ``number`` shards."""
        kept = read_shards(self.folder)[:number]
        rows = sum(shard.rows for shard in kept)
        sizes = {
            IDS: sum(shard.id_bytes for shard in kept),
            KEYS: rows * KEY_BYTES,
            EMBEDDINGS: rows * self._row_bytes,
        }
        # The record comes first: a recorded shard always exists.
        self._record(kept)
        for name, size in sizes.items():
            with open(self.folder / name, "ab") as file:
                file.truncate(size)

    def _record(self, shards: Sequence[Shard]) -> None:
        with whole_file(self.folder / SHARDS, "wb") as file:
            file.writelines(map(record_line, shards))
            _to_disk(file)

    def seal(self) -> None:
        """Give every valid shard a checksum that also covers the manifest's settings."""
        self._record(
            [
                Shard(shard.rows, shard.id_bytes, self._checksum_of(ids, keys, embeddings)) if right else shard
                for shard, ids, keys, embeddings, right in self.read()
            ]
        )

    def _checksum_of(self, ids: Sequence[str], keys: np.ndarray, embeddings: np.ndarray) -> str:
        return _checksum(self._seal, _id_lines(ids), keys.tobytes(), embeddings.tobytes())

    def add(self, ids: Sequence[str], keys: Sequence[bytes], embeddings: np.ndarray) -> None:
        """Append a shard; it is valid once everything is on disk.

        Raises:
            OSError: The disk is full or cannot be written; earlier shards are unchanged.
        """
        id_part = _id_lines(ids)
        key_part = b"".join(keys)
        matrix = np.ascontiguousarray(embeddings, dtype=self.dtype).tobytes()
        for name, part in ((IDS, id_part), (KEYS, key_part), (EMBEDDINGS, matrix)):
            with open(self.folder / name, "ab") as file:
                file.write(part)
                _to_disk(file)
        shard = Shard(len(ids), len(id_part), _checksum(self._seal, id_part, key_part, matrix))
        with open(self.folder / SHARDS, "ab") as file:
            file.write(record_line(shard))
            _to_disk(file)


class KnownEmbeddings:
    """Embeddings of several folders, looked up by text; damaged shards are left out.

    Args:
        folders: The files of each, all with embeddings of the same width and dtype.

    Attributes:
        damaged: How many shards have a wrong checksum.
    """

    def __init__(self, *folders: ShardFiles) -> None:
        self.damaged = 0
        self._matrices: list[np.ndarray] = []
        keys: list[np.ndarray] = []
        sources: list[np.ndarray] = []
        rows: list[np.ndarray] = []
        for number, files in enumerate(folders):
            self._matrices.append(files.rows())
            begin = 0
            for shard, _, shard_keys, _, right in files.read():
                self.damaged += not right
                if right:
                    keys.append(shard_keys)
                    sources.append(np.full(shard.rows, number, dtype=np.int32))
                    rows.append(np.arange(begin, begin + shard.rows))
                begin += shard.rows
        self._keys = np.concatenate([*keys, _no_keys()])
        self._sources = np.concatenate([*sources, np.zeros(0, dtype=np.int32)])
        self._rows = np.concatenate([*rows, np.zeros(0, dtype=np.int64)])
        # Looked up by half of the key and checked by all of it: texts that share a half are merely encoded again.
        halves = _half(self._keys)
        self._order = np.argsort(halves, kind="stable")
        self._sorted = halves[self._order]

    def __len__(self) -> int:
        return len(self._rows)

    def find(self, keys: Sequence[bytes]) -> np.ndarray:
        """For each key the position of its embedding, for :meth:`at`; -1 if it is unknown."""
        if not len(self):
            return np.full(len(keys), -1)
        asked = np.frombuffer(b"".join(keys), dtype=np.uint8).reshape(-1, KEY_BYTES)
        places = np.minimum(np.searchsorted(self._sorted, _half(asked)), len(self) - 1)
        found = self._order[places]
        return np.where((self._keys[found] == asked).all(axis=1), found, -1)

    def at(self, places: np.ndarray) -> np.ndarray:
        """The embeddings at these positions, float32, (positions, dim)."""
        found = np.empty((len(places), self._matrices[0].shape[1]), dtype=np.float32)
        for number, matrix in enumerate(self._matrices):
            own = self._sources[places] == number
            found[own] = matrix[self._rows[places[own]]]
        return found


def _half(keys: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(keys[:, :8]).view("<u8").ravel()


def foreign_files(folder: Path) -> list[str]:
    """The names of files in a folder that do not belong to a store; empty if there is no such folder.

    Raises:
        NotADirectoryError: It is a file.
    """
    try:
        names = sorted(path.name for path in folder.iterdir())
    except FileNotFoundError:
        return []
    return [name for name in names if not _is_own(name)]


def remove_files(folder: Path) -> None:
    """Remove a store's files, and its folder if nothing else is in it; nothing happens if there is none."""
    if not folder.is_dir():
        return
    # The manifest last: stopped before, this is still a store, which can be removed again.
    for path in sorted(folder.iterdir(), key=lambda path: path.name == MANIFEST):
        if _is_own(path.name):
            path.unlink()
    with contextlib.suppress(OSError):  # not empty: what is left is not ours
        folder.rmdir()


def _is_own(name: str) -> bool:
    unfinished = name.startswith((f"{MANIFEST}.", f"{SHARDS}.")) and name.endswith(UNFINISHED)
    return name in (MANIFEST, EMBEDDINGS, IDS, KEYS, SHARDS) or unfinished


def start(folder: Path, manifest: dict[str, Any]) -> None:
    """Make empty files with this manifest."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in (SHARDS, IDS, KEYS, EMBEDDINGS):
        (folder / name).write_bytes(b"")
    write_manifest(folder, manifest)


def seal_shards(folder: Path, manifest: dict[str, Any]) -> None:
    """Convert a store of version 0.1.0, whose checksums do not cover the manifest, into the present format.

    If it is stopped between the two writes, the store has the old format still, in which shards of both kinds are
    valid.
    """
    ShardFiles(folder, manifest).seal()
    write_manifest(folder, {name: value for name, value in manifest.items() if name != "format"})


def read_ids(folder: Path) -> Sequence[str]:
    """All ids of the recorded shards, in order.

    Raises:
        StoreError: The file of the ids is invalid, or has fewer.
    """
    return ids_in(folder / IDS, sum(shard.rows for shard in read_shards(folder)), str(folder / IDS))


def ids_in(file: Path, rows: int, where: str) -> Sequence[str]:
    """The ids in a file, checked against their expected number.

    Raises:
        StoreError: There are fewer, or they are invalid; the message names ``where``.
    """
    ids = FileIds(file, rows)
    if len(ids) != rows:
        raise StoreError(f"{where} holds {len(ids):,} ids and not the {rows:,} that are recorded; {REMEDY}")
    if len(ids) > HELD_IDS:
        return ids
    try:
        found = list(ids)
    except (ValueError, RecursionError):
        found = []
    if len(found) != rows or not all(isinstance(identifier, str) for identifier in found):
        raise StoreError(f"{where} holds lines that are no ids in JSON; {REMEDY}")
    return found


def _id_lines(ids: Sequence[str]) -> bytes:
    return b"".join(json.dumps(identifier).encode("ascii") + b"\n" for identifier in ids)


def _left(file: IO[bytes]) -> int:
    """How many bytes are left to read in a file."""
    here = file.tell()
    end = file.seek(0, io.SEEK_END)
    file.seek(here)
    return end - here


def _checksum(*parts: bytes) -> str:
    digest = hashlib.blake2b(digest_size=16)
    for part in parts:
        digest.update(len(part).to_bytes(8, "little"))
        digest.update(part)
    return digest.hexdigest()


def _no_keys() -> np.ndarray:
    return np.zeros((0, KEY_BYTES), dtype=np.uint8)


def _to_disk(file: IO[bytes]) -> None:
    file.flush()
    os.fsync(file.fileno())
