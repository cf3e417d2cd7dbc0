"""Looking at the embedding stores on a disk: what there is, whether it is whole, and removing it."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from st_clp.encoding.shards import LOCK, MANIFEST, ShardFiles, read_manifest, read_shards, remove_files


@dataclass(frozen=True)
class StoreInfo:
    """A store in a folder.

    Attributes:
        path: The folder.
        manifest: What its embeddings are of.
        documents: How many texts it holds.
        finished: Whether all of the corpus is in it.
        bytes_on_disk: What the folder takes.
    """

    path: Path
    manifest: dict[str, Any]
    documents: int
    finished: bool
    bytes_on_disk: int


@dataclass(frozen=True)
class Verification:
    """What a look at every byte of a store found.

    Attributes:
        path: The folder.
        documents: How many texts are recorded.
        damaged: Of each shard that does not match its checksum, the first row and the number of rows.
        missing: How many texts the manifest names that no shard holds.
    """

    path: Path
    documents: int
    damaged: list[tuple[int, int]]
    missing: int

    @property
    def whole(self) -> bool:
        """Whether everything is there and right."""
        return not self.damaged and not self.missing


def find_stores(root: str | os.PathLike[str]) -> Iterator[StoreInfo]:
    """Yield the stores in a folder and below it, finished or not, by path."""
    for folder in sorted(path.parent for path in Path(root).rglob(MANIFEST)):
        manifest = read_manifest(folder)
        if manifest is None:
            continue
        documents = sum(shard.rows for shard in read_shards(folder))
        size = sum(file.stat().st_size for file in folder.iterdir() if file.is_file())
        yield StoreInfo(folder, manifest, documents, "documents" in manifest, size)


def verify(folder: str | os.PathLike[str]) -> Verification:
    """Compare every shard of a store with its checksum. Building the store again mends what is damaged.

    Raises:
        FileNotFoundError: There is no store in the folder.
    """
    path = Path(folder)
    manifest = read_manifest(path)
    if manifest is None:
        raise FileNotFoundError(f"{path} holds no embedding store")
    damaged: list[tuple[int, int]] = []
    begin = 0
    for shard, _, _, _, right in ShardFiles(path, manifest["dim"], manifest["dtype"]).read():
        if not right:
            damaged.append((begin, shard.rows))
        begin += shard.rows
    return Verification(path, begin, damaged, max(0, manifest.get("documents", begin) - begin))


def remove(folder: str | os.PathLike[str]) -> int:
    """Remove a store, but nothing else that lies in its folder; how many bytes that gives back.

    Raises:
        FileNotFoundError: There is no store in the folder, so nothing is removed.
    """
    path = Path(folder)
    if read_manifest(path) is None:
        raise FileNotFoundError(f"{path} holds no embedding store; nothing was removed")
    size = sum(file.stat().st_size for file in path.iterdir() if file.is_file())
    remove_files(path)
    path.with_name(path.name + LOCK).unlink(missing_ok=True)
    return size - sum(file.stat().st_size for file in path.glob("*") if file.is_file())
