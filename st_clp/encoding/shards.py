"""Embeddings on disk, a checked shard at a time.

A folder holds four files that only grow, and a manifest:

    embeddings.bin   rows of float16 or float32
    ids.jsonl        a document's id on each line, as JSON
    keys.bin         16 bytes for each text: what decides whether its embedding can be used again
    shards.jsonl     for each shard its number of rows and a checksum of its part of the three files
    manifest.json    what the embeddings are of

A shard counts once its line is in ``shards.jsonl``; what lies behind the last one is cut off when a stopped run goes
on.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np

from st_clp.encoding.ids import FileIds

MANIFEST, EMBEDDINGS, IDS, KEYS, SHARDS = "manifest.json", "embeddings.bin", "ids.jsonl", "keys.bin", "shards.jsonl"
LOCK = ".lock"  # what the name of the file beside a store ends in that is locked while it is made
FORMAT = 2
KEY_BYTES = 16
HELD_IDS = 1_000_000  # as Python strings, some 70 bytes each; more are read from the file as they are needed


@dataclass(frozen=True)
class Shard:
    """A run of rows: how many, how long their ids are in bytes, and a checksum over ids, keys and embeddings."""

    rows: int
    id_bytes: int
    checksum: str


def text_key(text: str) -> bytes:
    """16 bytes that are the same for the same text, and, but for one chance in 10^20, for no other."""
    return hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=KEY_BYTES).digest()


def write_manifest(folder: Path, manifest: dict[str, Any]) -> None:
    """Write a manifest so that it appears whole or not at all."""
    beside = folder / f"{MANIFEST}.{os.getpid()}.partial"
    beside.write_text(json.dumps({"format": FORMAT, **manifest}, indent=1, ensure_ascii=False), encoding="utf-8")
    beside.replace(folder / MANIFEST)


def read_manifest(folder: Path) -> dict[str, Any] | None:
    """The manifest in a folder; None where there is none or it cannot be read."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return manifest if isinstance(manifest, dict) and manifest.get("format") == FORMAT else None


def read_shards(folder: Path) -> list[Shard]:
    """The shards that are recorded, up to the first line that cannot be read."""
    found: list[Shard] = []
    try:
        lines = (folder / SHARDS).read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return found
    for line in lines:
        try:
            values = json.loads(line)
            found.append(Shard(int(values["rows"]), int(values["id_bytes"]), str(values["checksum"])))
        except (ValueError, KeyError, TypeError):
            break
    return found


class ShardFiles:
    """The files of a folder, open for reading shard by shard or for adding shards.

    Args:
        folder: Where they are.
        dim: The width of the embeddings.
        dtype: ``"float16"`` or ``"float32"``.
    """

    def __init__(self, folder: Path, dim: int, dtype: str) -> None:
        self.folder = folder
        self.dim = dim
        self.dtype = np.dtype(dtype).newbyteorder("<")
        self._row_bytes = dim * self.dtype.itemsize

    def read(self) -> Iterator[tuple[Shard, list[str], np.ndarray, np.ndarray, bool]]:
        """Yield (shard, ids, keys (rows, 16), embeddings (rows, dim), whether the checksum is right) in order.

        A file that is not there makes every shard wrong. Nothing is written: the disk may be read-only.
        """
        with self._open(IDS) as ids, self._open(KEYS) as keys, self._open(EMBEDDINGS) as embeddings:
            for shard in read_shards(self.folder):
                parts = ids.read(shard.id_bytes), keys.read(shard.rows * KEY_BYTES)
                matrix = embeddings.read(shard.rows * self._row_bytes)
                if _checksum(*parts, matrix) != shard.checksum:
                    yield shard, [], _no_keys(), np.zeros((0, self.dim), self.dtype), False
                    continue
                yield (
                    shard,
                    [json.loads(line) for line in parts[0].splitlines()],
                    np.frombuffer(parts[1], dtype=np.uint8).reshape(-1, KEY_BYTES),
                    np.frombuffer(matrix, dtype=self.dtype).reshape(-1, self.dim),
                    True,
                )

    def _open(self, name: str) -> IO[bytes]:
        try:
            return open(self.folder / name, "rb")
        except FileNotFoundError:
            return io.BytesIO()

    def rows(self) -> np.ndarray:
        """All embeddings, (rows, dim), memory-mapped."""
        total = sum(shard.rows for shard in read_shards(self.folder))
        path = self.folder / EMBEDDINGS
        # A file that was cut off, or removed, holds fewer rows than are recorded.
        total = min(total, path.stat().st_size // self._row_bytes if path.exists() else 0)
        if not total:
            return np.zeros((0, self.dim), self.dtype)
        return np.memmap(path, self.dtype, "r", shape=(total, self.dim))

    def keep(self, number: int) -> None:
        """Cut the files to the first ``number`` shards."""
        kept = read_shards(self.folder)[:number]
        rows = sum(shard.rows for shard in kept)
        sizes = {
            IDS: sum(shard.id_bytes for shard in kept),
            KEYS: rows * KEY_BYTES,
            EMBEDDINGS: rows * self._row_bytes,
            SHARDS: sum(len(_line(shard)) for shard in kept),
        }
        # The record first: a shard that is recorded is always there.
        for name in (SHARDS, IDS, KEYS, EMBEDDINGS):
            with open(self.folder / name, "ab") as file:
                file.truncate(sizes[name])

    def add(self, ids: Sequence[str], keys: Sequence[bytes], embeddings: np.ndarray) -> None:
        """Add a shard; it counts once everything is on the disk.

        Raises:
            OSError: The disk is full or cannot be written; the shards before are as they were.
        """
        id_part = b"".join(json.dumps(identifier).encode("ascii") + b"\n" for identifier in ids)
        key_part = b"".join(keys)
        matrix = np.ascontiguousarray(embeddings, dtype=self.dtype).tobytes()
        for name, part in ((IDS, id_part), (KEYS, key_part), (EMBEDDINGS, matrix)):
            with open(self.folder / name, "ab") as file:
                file.write(part)
                _to_disk(file)
        shard = Shard(len(ids), len(id_part), _checksum(id_part, key_part, matrix))
        with open(self.folder / SHARDS, "ab") as file:
            file.write(_line(shard))
            _to_disk(file)


class KnownEmbeddings:
    """The embeddings of some folders' shards by the text that they are of; shards that are damaged are left out.

    Args:
        folders: The files of each, all with embeddings of the same width and dtype.

    Attributes:
        damaged: How many shards do not match their checksum.
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
                    sources.append(np.full(shard.rows, number, dtype=np.int8))
                    rows.append(np.arange(begin, begin + shard.rows))
                begin += shard.rows
        self._keys = np.concatenate([*keys, _no_keys()])
        self._sources = np.concatenate([*sources, np.zeros(0, dtype=np.int8)])
        self._rows = np.concatenate([*rows, np.zeros(0, dtype=np.int64)])
        # Found by half of the key and checked by all of it: texts that share the half are encoded again, no more.
        halves = _half(self._keys)
        self._order = np.argsort(halves, kind="stable")
        self._sorted = halves[self._order]

    def __len__(self) -> int:
        return len(self._rows)

    def find(self, keys: Sequence[bytes]) -> np.ndarray:
        """For each key the place of its embedding, for :meth:`at`; -1 where it is not known."""
        if not len(self):
            return np.full(len(keys), -1)
        asked = np.frombuffer(b"".join(keys), dtype=np.uint8).reshape(-1, KEY_BYTES)
        places = np.minimum(np.searchsorted(self._sorted, _half(asked)), len(self) - 1)
        found = self._order[places]
        return np.where((self._keys[found] == asked).all(axis=1), found, -1)

    def at(self, places: np.ndarray) -> np.ndarray:
        """The embeddings in these places, float32, (places, dim)."""
        found = np.empty((len(places), self._matrices[0].shape[1]), dtype=np.float32)
        for number, matrix in enumerate(self._matrices):
            own = self._sources[places] == number
            found[own] = matrix[self._rows[places[own]]]
        return found


def _half(keys: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(keys[:, :8]).view("<u8").ravel()


def foreign_files(folder: Path) -> list[str]:
    """What lies in a folder and is no part of a store; empty where there is no such folder.

    Raises:
        NotADirectoryError: It is a file.
    """
    try:
        names = sorted(path.name for path in folder.iterdir())
    except FileNotFoundError:
        return []
    return [name for name in names if not _is_own(name)]


def remove_files(folder: Path) -> None:
    """Remove a store's files and, where nothing else lies in it, its folder. One that is not there is left alone."""
    if not folder.is_dir():
        return
    # The manifest last: stopped before, this is still a store, which can be removed again.
    for path in sorted(folder.iterdir(), key=lambda path: path.name == MANIFEST):
        if _is_own(path.name):
            path.unlink()
    with contextlib.suppress(OSError):  # not empty: what is left is not ours
        folder.rmdir()


def _is_own(name: str) -> bool:
    unfinished_manifest = name.startswith(f"{MANIFEST}.") and name.endswith(".partial")
    return name in (MANIFEST, EMBEDDINGS, IDS, KEYS, SHARDS) or unfinished_manifest


def start(folder: Path, manifest: dict[str, Any]) -> None:
    """Make an empty set of files with this manifest."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in (SHARDS, IDS, KEYS, EMBEDDINGS):
        (folder / name).write_bytes(b"")
    write_manifest(folder, manifest)


def read_ids(folder: Path) -> Sequence[str]:
    """All ids of the recorded shards, in order."""
    ids = FileIds(folder / IDS, sum(shard.rows for shard in read_shards(folder)))
    return ids if len(ids) > HELD_IDS else list(ids)


def _line(shard: Shard) -> bytes:
    return json.dumps(asdict(shard)).encode() + b"\n"


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
