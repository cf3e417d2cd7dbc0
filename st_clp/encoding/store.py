"""The embeddings of a corpus by one model, in memory or in a folder, read a shard at a time."""

from __future__ import annotations

import json
import logging
import os
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import BinaryIO

import numpy as np
from sentence_transformers import SentenceTransformer
from tqdm.auto import tqdm

from st_clp.data import Collection, CollectionError
from st_clp.encoding.encode import embedding_dimension, encode_documents
from st_clp.encoding.fingerprint import model_fingerprint

logger = logging.getLogger(__name__)

MANIFEST, EMBEDDINGS, IDS = "manifest.json", "embeddings.npy", "ids.json"
SHARD_ROWS = 65_536


class EmbeddingStore:
    """Document ids and their embeddings, in corpus order.

    Make one with :meth:`build`. In a folder it is a float32 ``.npy`` file that is memory-mapped, the ids, and a
    manifest that says which model and which corpus they belong to.

    Args:
        ids: Document ids.
        embeddings: float32, (number of documents, dim); may be a memory map.
    """

    def __init__(self, ids: list[str], embeddings: np.ndarray) -> None:
        self.ids = ids
        self._embeddings = embeddings

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def dim(self) -> int:
        """The width of the embeddings."""
        return self._embeddings.shape[1]

    def shards(self, rows: int = SHARD_ROWS) -> Iterator[tuple[list[str], np.ndarray]]:
        """Yield (ids, embeddings (at most ``rows``, dim)) in corpus order."""
        for begin in range(0, len(self.ids), rows):
            yield self.ids[begin : begin + rows], np.asarray(self._embeddings[begin : begin + rows])

    def rows(self, positions: Iterable[int]) -> np.ndarray:
        """The embeddings at these positions of ``ids``, (number of positions, dim)."""
        return np.asarray(self._embeddings[np.fromiter(positions, dtype=np.int64)])

    @classmethod
    def build(
        cls,
        model: SentenceTransformer,
        collection: Collection,
        path: str | os.PathLike[str] | None = None,
        *,
        batch_size: int = 32,
        show_progress_bar: bool = True,
    ) -> EmbeddingStore:
        """Encode all documents of a collection, or open what is there.

        Args:
            model: Any SentenceTransformer.
            collection: Its documents are encoded; queries and judgments do not matter.
            path: The folder to keep the embeddings in. A folder of the same model and corpus is opened as it is;
                one of another model or corpus is encoded anew and then replaced. None keeps them in memory.
            batch_size: Texts in one forward pass.
            show_progress_bar: Show progress, rate and remaining time.

        Raises:
            CollectionError: The corpus is empty.
        """
        chunks = _encode(model, collection, batch_size, show_progress_bar)
        if path is None:
            ids, embeddings = [], []
            for chunk_ids, chunk in chunks:
                ids += chunk_ids
                embeddings.append(chunk)
            _require_documents(ids, collection)
            return cls(ids, np.concatenate(embeddings))
        folder = Path(path)
        manifest = {
            "model": model_fingerprint(model),
            "corpus": collection.corpus_name,
            "corpus_fingerprint": collection.corpus.fingerprint(),
        }
        if (store := cls._open(folder, manifest)) is not None:
            return store
        # Written beside and renamed: a folder of this name is always a whole store.
        beside = folder.with_name(folder.name + ".partial")
        shutil.rmtree(beside, ignore_errors=True)
        beside.mkdir(parents=True)
        ids = _write_embeddings(beside / EMBEDDINGS, chunks, embedding_dimension(model))
        _require_documents(ids, collection)
        (beside / IDS).write_text(json.dumps(ids, ensure_ascii=False), encoding="utf-8")
        (beside / MANIFEST).write_text(json.dumps({**manifest, "documents": len(ids)}, indent=1), encoding="utf-8")
        shutil.rmtree(folder, ignore_errors=True)
        beside.rename(folder)
        return cls(ids, np.load(folder / EMBEDDINGS, mmap_mode="r"))

    @classmethod
    def open(cls, path: str | os.PathLike[str]) -> EmbeddingStore:
        """Open a store that :meth:`build` left in a folder, whatever model it is of.

        Raises:
            FileNotFoundError: There is no finished store in the folder.
        """
        folder = Path(path)
        if not (folder / MANIFEST).is_file():
            raise FileNotFoundError(f"{folder} holds no finished embedding store; build it with EmbeddingStore.build")
        ids = json.loads((folder / IDS).read_text(encoding="utf-8"))
        return cls(ids, np.load(folder / EMBEDDINGS, mmap_mode="r"))

    @classmethod
    def _open(cls, folder: Path, manifest: dict[str, str]) -> EmbeddingStore | None:
        """The store in ``folder`` if it is whole and of this model and corpus."""
        try:
            found = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
            store = cls.open(folder)
        except FileNotFoundError:
            return None
        except (OSError, ValueError) as error:
            logger.warning("%s cannot be read (%s); encoding anew", folder, error)
            return None
        if any(found.get(key) != value for key, value in manifest.items()):
            logger.info("%s is of another model or corpus; encoding anew", folder)
            return None
        if not found.get("documents") == len(store.ids) == len(store._embeddings):
            logger.warning("%s is damaged: its ids and embeddings do not match; encoding anew", folder)
            return None
        return store


def _encode(
    model: SentenceTransformer, collection: Collection, batch_size: int, show_progress_bar: bool
) -> Iterator[tuple[list[str], np.ndarray]]:
    """Yield (ids, embeddings) chunk by chunk, with a progress bar."""
    waiting: list[str] = []

    def texts() -> Iterator[str]:
        for document in collection.documents():
            waiting.append(document.doc_id)
            yield document.text

    with tqdm(
        total=collection.corpus.expected_size(),
        desc=f"Encoding {collection.corpus_name}",
        unit=" documents",
        disable=not show_progress_bar,
    ) as progress:
        for embeddings in encode_documents(model, texts(), batch_size=batch_size):
            ids = waiting[: len(embeddings)]
            del waiting[: len(embeddings)]
            progress.update(len(ids))
            yield ids, embeddings


def _write_embeddings(path: Path, chunks: Iterable[tuple[list[str], np.ndarray]], dim: int) -> list[str]:
    """Write a ``.npy`` of unknown length: the rows first, the header once their number is known."""
    ids: list[str] = []
    # numpy pads a header to 64 bytes and more; one for the largest number of rows leaves room for any smaller one.
    with open(path, "wb") as file:
        room = _write_header(file, 2**62, dim)
        for chunk_ids, embeddings in chunks:
            ids += chunk_ids
            file.write(np.ascontiguousarray(embeddings, dtype="<f4").data)
        file.seek(0)
        if _write_header(file, len(ids), dim) != room:
            raise RuntimeError(f"{path}: the header of the embeddings changed its length")
        file.flush()
        os.fsync(file.fileno())
    return ids


def _write_header(file: BinaryIO, rows: int, dim: int) -> int:
    np.lib.format.write_array_header_1_0(file, {"descr": "<f4", "fortran_order": False, "shape": (rows, dim)})
    return file.tell()


def _require_documents(ids: list[str], collection: Collection) -> None:
    if not ids:
        raise CollectionError(f"{collection.corpus_name}: the corpus is empty; there is nothing to encode")
