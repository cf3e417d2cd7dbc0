"""List, verify and remove embedding stores on disk."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from st_clp.encoding.shards import (
    LOCK,
    MANIFEST,
    ShardFiles,
    StoreError,
    foreign_files,
    read_manifest,
    read_shards,
    remove_files,
)


@dataclass(frozen=True)
class StoreInfo:
    """A store in a folder.

    Attributes:
        path: The folder.
        manifest: Its manifest; None if it cannot be read.
        documents: How many texts it holds.
        finished: Whether all of the corpus is in it.
        bytes_on_disk: The size of the folder.
    """

    path: Path
    manifest: dict[str, Any] | None
    documents: int
    finished: bool
    bytes_on_disk: int


@dataclass(frozen=True)
class Verification:
    """The result of verifying a store.

    Attributes:
        path: The folder.
        documents: How many texts are recorded.
        damaged: The first row and number of rows of each shard with a wrong checksum.
        missing: How many texts the manifest names that no shard holds.
        unnamed: How many texts the shards hold beside those that the manifest names.
        wrong: Why the manifest cannot be read; empty if it can.
    """

    path: Path
    documents: int
    damaged: list[tuple[int, int]]
    missing: int
    unnamed: int = 0
    wrong: str = ""

    @property
    def whole(self) -> bool:
        """Whether the store is complete and correct."""
        return not (self.damaged or self.missing or self.unnamed or self.wrong)


def find_stores(root: str | os.PathLike[str]) -> Iterator[StoreInfo]:
    """Yield all stores below a folder, finished or not, sorted by path."""
    for folder in sorted(path.parent for path in Path(root).rglob(MANIFEST)):
        manifest: dict[str, Any] | None = None
        try:
            if (manifest := read_manifest(folder)) is None:
                continue
        except StoreError:
            if not foreign_files(folder):
                yield StoreInfo(folder, None, sum(s.rows for s in read_shards(folder)), True, _size(folder))
            continue
        documents = sum(shard.rows for shard in read_shards(folder))
        yield StoreInfo(folder, manifest, documents, "documents" in manifest, _size(folder))


def verify(folder: str | os.PathLike[str]) -> Verification:
    """Compare every shard of a store with its checksum. Building the store again repairs damaged shards.

    Raises:
        FileNotFoundError: There is no store in the folder.
    """
    path = Path(folder)
    try:
        manifest = read_manifest(path)
    except StoreError as error:
        return Verification(path, 0, [], 0, wrong=str(error))
    if manifest is None:
        raise FileNotFoundError(f"{path} holds no embedding store")
    damaged: list[tuple[int, int]] = []
    begin = 0
    for shard, _, _, _, right in ShardFiles(path, manifest).read():
        if not right:
            damaged.append((begin, shard.rows))
        begin += shard.rows
    named = manifest.get("documents", begin)
    return Verification(path, begin, damaged, max(0, named - begin), max(0, begin - named))


def remove(folder: str | os.PathLike[str]) -> int:
    """Remove a store, but no other files in its folder; return the number of bytes freed.

    Raises:
        FileNotFoundError: There is no store in the folder; nothing is removed.
    """
    path = Path(folder)
    if path not in [info.path for info in find_stores(path)]:
        raise FileNotFoundError(f"{path} holds no embedding store; nothing was removed")
    size = _size(path)
    remove_files(path)
    path.with_name(path.name + LOCK).unlink(missing_ok=True)
    return size - sum(file.stat().st_size for file in path.glob("*") if file.is_file())


def _size(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.iterdir() if file.is_file())
