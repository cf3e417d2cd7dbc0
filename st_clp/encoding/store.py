"""Embeddings of a corpus by one model, in memory, in a folder or at an address."""

from __future__ import annotations

import os
from collections.abc import Collection as AnyCollection
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from sentence_transformers import SentenceTransformer
from tqdm.auto import tqdm

from st_clp.data import Collection, Corpus
from st_clp.declaring import takes
from st_clp.encoding.addresses import is_address
from st_clp.encoding.shards import REMEDY, ShardFiles, StoreError, read_ids, read_manifest
from st_clp.encoding.working_model import Task
from st_clp.options import Encoding

if TYPE_CHECKING:
    from st_clp.encoding.building import Builder

SHARD_ROWS = 65_536  # read together when searching


class EmbeddingStore:
    """Ids and their embeddings, in corpus order.

    Make one with :meth:`build`. In a folder it is memory-mapped and records its model and texts; see
    :mod:`st_clp.encoding.shards` for the format.

    Args:
        ids: Document ids.
        embeddings: float16 or float32, (number of documents, dim); an array, a memory map, or what reads like one.
        path: Their folder or address; None if they are in memory only.
    """

    def __init__(self, ids: Sequence[str], embeddings: Any, path: Path | str | None = None) -> None:
        self.ids = ids
        self.path = path
        self._embeddings = embeddings

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def dim(self) -> int:
        """The width of the embeddings."""
        return self._embeddings.shape[1]

    def shards(self, rows: int = SHARD_ROWS) -> Iterator[tuple[list[str], np.ndarray]]:
        """Yield (ids, float32 embeddings (at most ``rows``, dim)) in corpus order."""
        begin = 0
        for embeddings in self.blocks(rows):
            yield list(self.ids[begin : begin + len(embeddings)]), embeddings
            begin += len(embeddings)

    def blocks(self, rows: int = SHARD_ROWS, begin: int = 0, end: int | None = None) -> Iterator[np.ndarray]:
        """Yield the float32 embeddings (at most ``rows``, dim) in corpus order; not to be written to.

        Args:
            rows: How many at a time.
            begin, end: The first row, and the last and one; None ends with the store.
        """
        end = len(self) if end is None else min(end, len(self))
        for first in range(begin, end, rows):
            # By PyTorch, which converts float16 several times as fast.
            yield torch.from_numpy(self._read(first, min(first + rows, end))).float().numpy()

    def _read(self, begin: int, end: int) -> np.ndarray:
        embeddings = self._embeddings
        if not isinstance(embeddings, np.memmap) or embeddings.filename is None:
            return embeddings[begin:end]
        # Read, not mapped: pages of a map count as this process's memory until the system wants them back.
        offset = begin * self.dim * embeddings.itemsize
        number = (min(end, len(self)) - begin) * self.dim
        return np.fromfile(embeddings.filename, embeddings.dtype, number, offset=offset).reshape(-1, self.dim)

    def rows(self, positions: Iterable[int]) -> np.ndarray:
        """The embeddings at these positions of ``ids``, float32, (number of positions, dim)."""
        return np.asarray(self._embeddings[np.fromiter(positions, dtype=np.int64)], np.float32)

    def positions(self, doc_ids: AnyCollection[str]) -> dict[str, int]:
        """The positions of documents in ``ids``; unknown ids are left out."""
        wanted = set(doc_ids)
        return {doc_id: row for row, doc_id in enumerate(self.ids) if doc_id in wanted}

    @classmethod
    @takes(encoding=Encoding)
    def build(
        cls,
        model: SentenceTransformer,
        texts: Collection | Corpus,
        path: str | os.PathLike[str] | None = None,
        *,
        task: Task = "document",
        progress: tqdm | None = None,
        fingerprint: str | None = None,
        encoding: Encoding,
    ) -> EmbeddingStore:
        """Encode all documents of a collection, or open an existing store.

        It can be stopped at any moment and resumes with the unfinished shard. If several processes want the same
        folder, one encodes and the others wait for it. In a folder of the same model only what is new is encoded: texts
        that changed or were added, and shards with a wrong checksum.

        Args:
            model: Any SentenceTransformer.
            texts: A collection, whose documents are encoded, or a corpus.
            path: The folder to keep the embeddings in, or an address such as ``s3://bucket/folder``; those of another
                model are encoded anew and then replaced. None keeps them in memory.
            task: Whether the texts are encoded as documents or as queries.
            progress: A progress bar to advance in place of a new one; several stores can share it.
            fingerprint: The model's, where it is known already; otherwise it is computed from the weights.
            encoding

        Embeddings computed in bfloat16 are stored as float16: half the size of float32, and finer than bfloat16.

        Raises:
            CollectionError: There are no texts.
            ValueError: An embedding is not finite; the message names its text's id. Or the folder holds other files.
            OSError: The disk is full or cannot be written; finished shards are kept. A whole store needs no writing.
        """
        corpus = texts.corpus if isinstance(texts, Collection) else texts
        builder = builder_for(path, encoding)(model, corpus, task, encoding, progress, fingerprint)
        if path is None:
            return cls(*builder.in_memory())
        builder.write(os.fspath(path))
        return cls.open(path)

    @classmethod
    def open(cls, path: str | os.PathLike[str]) -> EmbeddingStore:
        """Open a store made by :meth:`build`, of any model. Checksums are not verified.

        Raises:
            FileNotFoundError: There is no finished store in the folder.
            StoreError: Its files are damaged, or have another number of rows than is recorded.
        """
        if is_address(path):
            from st_clp.encoding.remote_store import open_at

            return cls(*open_at(os.fspath(path)), os.fspath(path))
        folder = Path(path)
        manifest = read_manifest(folder)
        if manifest is None or "documents" not in manifest:
            raise FileNotFoundError(f"{folder} holds no finished embedding store; build it with EmbeddingStore.build")
        ids, embeddings = read_ids(folder), ShardFiles(folder, manifest).rows()
        if not len(ids) == len(embeddings) == manifest["documents"]:
            raise StoreError(
                f"{folder} is damaged: its manifest names {manifest['documents']:,} documents, and there are "
                f"{len(ids):,} ids and {len(embeddings):,} embeddings; {REMEDY}"
            )
        return cls(ids, embeddings, folder)


def builder_for(path: str | os.PathLike[str] | None, encoding: Encoding) -> type[Builder]:
    """The builder for a folder, an address or memory, on a cluster or not."""
    if path is not None and is_address(path):
        from st_clp.encoding.remote_store import AddressBuilder

        return AddressBuilder
    if path is not None and encoding.ray is not None:
        from st_clp.encoding.ray_encoding import ClusterBuilder

        return ClusterBuilder
    from st_clp.encoding.building import Builder

    return Builder
