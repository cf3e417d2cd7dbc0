"""Build an embedding store: resume where it was stopped, and never encode a text twice."""

from __future__ import annotations

import contextlib
import itertools
import logging
from collections import deque
from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from sentence_transformers import SentenceTransformer
from tqdm.auto import tqdm

from st_clp.data import CollectionError, Corpus, Document
from st_clp.encoding.encode import Encoder, embedding_dimension, window_size
from st_clp.encoding.inspection import verify
from st_clp.encoding.shards import (
    ENCODING,
    FORMAT,
    KEY_BYTES,
    LOCK,
    KnownEmbeddings,
    ShardFiles,
    foreign_files,
    read_shards,
    remove_files,
    seal_shards,
    start,
    text_key,
    usable_manifest,
    write_manifest,
)
from st_clp.encoding.working_model import Task, model_fingerprint, resolve_dtype
from st_clp.files import locked
from st_clp.options import ComputeDtype, Encoding

logger = logging.getLogger(__name__)

LARGEST = {"float16": 65_504.0, "float32": float(np.finfo(np.float32).max)}
# Suffixes of the folders beside a store: the one being built, the one to be replaced, and an unfinished one of another
# collection.
UNFINISHED, REPLACED, BEGUN = ".partial", ".replaced", ".begun"
# The folder that workers of a cluster write parts to, each itself a small store.
PARTS = UNFINISHED + ".parts"
LOCK_NAME = "lock-"  # what the names of files begin with that keep a second worker from a part


class Builder:
    """Encodes a corpus into memory or a folder; the arguments are those of ``EmbeddingStore.build``.

    Attributes:
        computed_in: What ``dtype`` resolves to for this model on its device.
    """

    def __init__(
        self,
        model: SentenceTransformer,
        corpus: Corpus,
        task: Task,
        encoding: Encoding,
        progress: Any = None,
        fingerprint: str | None = None,
    ) -> None:
        self._model = model
        self._corpus = corpus
        self._task: Task = task
        self.computed_in: ComputeDtype = resolve_dtype(model, encoding.encode_dtype)
        self._encoding = encoding
        self._shared_progress = progress
        self._fingerprint = fingerprint
        self._stored_as = "float16" if self.computed_in == "bfloat16" else "float32"
        self._window = window_size(model)

    def in_memory(self) -> tuple[list[str], np.ndarray]:
        """(ids, embeddings (documents, dim)).

        Raises:
            CollectionError, ValueError: As in ``EmbeddingStore.build``.
        """
        ids: list[str] = []
        shards: list[np.ndarray] = []
        with self._progress() as progress:
            for documents, embeddings in self._encode(iter(self._corpus)):
                ids += [document.doc_id for document in documents]
                shards.append(embeddings.astype(self._stored_as))
                progress.update(len(documents))
        if not ids:
            raise self._empty()
        return ids, np.concatenate(shards)

    def write(self, place: str) -> None:
        """Make the folder ``place`` the store of this model and corpus.

        Raises:
            CollectionError, ValueError, OSError: As in ``EmbeddingStore.build``.
        """
        folder, manifest = Path(place), self._manifest()
        if _is_whole(folder, manifest):
            self._seal_if_need_be(folder)
            return
        _require_own(folder)
        try:
            folder.parent.mkdir(parents=True, exist_ok=True)
            with _alone(folder):
                # The process that held the lock may have built this very store.
                if not _is_whole(folder, manifest):
                    self._make(folder, manifest)
        except OSError as error:
            if error.filename is not None or error.errno is None:
                raise
            # A failed write does not say which file.
            raise OSError(error.errno, error.strerror, str(folder)) from error

    def _seal_if_need_be(self, folder: Path) -> None:
        """Convert a finished store of version 0.1.0 into the present format, if it is writable."""
        found = usable_manifest(folder)
        if found is None or found["format"] == FORMAT:
            return
        with contextlib.suppress(OSError), _alone(folder):
            if (found := usable_manifest(folder)) is not None and found["format"] != FORMAT:
                seal_shards(folder, found)
                logger.info("%s was of version 0.1.0: its shards now say which model they are of", folder)

    def _make(self, folder: Path, manifest: dict[str, Any]) -> None:
        beside, replaced, begun = _beside(folder), *(_named(folder, ending) for ending in (REPLACED, BEGUN))
        found = usable_manifest(beside)
        if found is not None and not _agree(found, manifest):
            # An unfinished store of something else: texts that both have need not be encoded again.
            remove_files(begun)
            beside.rename(begun)
        known = self._known([folder, replaced, begun, *parts_of(folder)], manifest)
        self._finish(beside, manifest, known)
        # It was written beside and is renamed: a folder of this name is always a finished store.
        remove_files(replaced)
        if folder.exists():
            folder.rename(replaced)
        beside.rename(folder)
        remove_files(replaced)
        remove_files(begun)
        _remove_parts(folder)

    def _known(self, folders: list[Path], manifest: dict[str, Any]) -> KnownEmbeddings | None:
        """The embeddings in these folders that can be used again."""
        of_use = []
        for folder in folders:
            found = usable_manifest(folder)
            if found is None:
                continue
            if all(found.get(name) == manifest[name] for name in ENCODING):
                of_use.append(ShardFiles(folder, found))
            else:
                logger.info("%s is of another model or task; encoding anew", folder)
        if not of_use:
            return None
        known = KnownEmbeddings(*of_use)
        if known.damaged:
            logger.warning("%s is damaged: what does not match its checksum is encoded anew", folders[0])
        return known

    @cached_property
    def _encoder(self) -> Encoder:
        return Encoder(self._model, self._task, replace(self._encoding, encode_dtype=self.computed_in))

    @property
    def dim(self) -> int:
        """The width of the embeddings."""
        return embedding_dimension(self._model)

    @property
    def stored_bytes(self) -> int:
        """Bytes of an embedding on disk, with its key and id."""
        return self.dim * np.dtype(self._stored_as).itemsize + KEY_BYTES + 24

    def already_encoded(self, place: str | Path) -> int:
        """How many texts in this folder, finished or not, need not be encoded again; checksums are not verified."""
        folder, manifest = Path(place), self._manifest()

        def rows_in(place: Path) -> int:
            found = usable_manifest(place)
            if found is None or any(found.get(name) != manifest[name] for name in ENCODING):
                return 0
            return sum(shard.rows for shard in read_shards(place))

        # Parts hold documents that are not in the unfinished store yet.
        unfinished = rows_in(_beside(folder)) + sum(map(rows_in, parts_of(folder)))
        return max(rows_in(folder), unfinished, rows_in(_named(folder, BEGUN)))

    def _finish(self, folder: Path, manifest: dict[str, Any], known: KnownEmbeddings | None) -> None:
        """Encode what is missing in ``folder``, which may hold the beginning of this store."""
        files = self._begin(folder, manifest)
        with self._progress() as progress:
            self._fill(files, iter(self._corpus), known, progress)
        if not self._conclude(folder, manifest):
            raise self._empty()

    def _begin(self, folder: Path, manifest: dict[str, Any]) -> ShardFiles:
        """Open the files in ``folder``, or make them."""
        begun = usable_manifest(folder)
        if begun is None:
            remove_files(folder)
            start(folder, manifest)
        elif begun["format"] != FORMAT:
            seal_shards(folder, begun)
        return ShardFiles(folder, manifest)

    def _fill(
        self, files: ShardFiles, stream: Iterator[Document], known: KnownEmbeddings | None, progress: Any = None
    ) -> None:
        """Encode those of the documents that are not in the files yet."""
        first = self._skip_finished(files, stream, progress)
        for shard, embeddings in self._encode(itertools.chain(first, stream), known):
            files.add([d.doc_id for d in shard], [text_key(d.text) for d in shard], embeddings)
            if progress is not None:
                progress.update(len(shard))

    def _conclude(self, folder: Path, manifest: dict[str, Any]) -> int:
        """Record that ``folder`` is complete, and how many documents it has; an empty one is removed."""
        total = sum(shard.rows for shard in read_shards(folder))
        if total:
            write_manifest(folder, {**manifest, "documents": total})
        else:
            remove_files(folder)
        return total

    def _skip_finished(self, files: ShardFiles, stream: Iterator[Document], progress: Any) -> list[Document]:
        """Skip the documents of valid shards; return those that were read beyond them."""
        kept, read_further = 0, []
        for shard, ids, keys, _, right in files.read():
            # Shards are whole windows, except the last: a short one in the middle would shift the others.
            if not right or shard.rows != self._window:
                break
            documents = list(itertools.islice(stream, shard.rows))
            if [d.doc_id for d in documents] != ids or [text_key(d.text) for d in documents] != list(map(bytes, keys)):
                read_further = documents
                break
            kept += 1
            if progress is not None:
                progress.update(len(documents))
        files.keep(kept)
        return read_further

    def _encode(
        self, documents: Iterator[Document], known: KnownEmbeddings | None = None
    ) -> Iterator[tuple[list[Document], np.ndarray]]:
        """Yield (a window's documents, their embeddings), encoding only texts without known embeddings.

        Args:
            documents: The rest of the corpus.
            known: Embeddings to use again.
        """
        waiting: deque[tuple[list[Document], np.ndarray]] = deque()

        def unknown_texts() -> Iterator[list[str]]:
            while window := list(itertools.islice(documents, self._window)):
                self._require_text(window)
                rows = known.find([text_key(d.text) for d in window]) if known else np.full(len(window), -1)
                waiting.append((window, rows))
                yield [document.text for document, row in zip(window, rows, strict=True) if row < 0]

        for encoded in self._encoder.encode_windows(unknown_texts()):
            window, rows = waiting.popleft()
            embeddings = np.empty((len(window), encoded.shape[1]), dtype=np.float32)
            embeddings[rows < 0] = encoded
            if known is not None:
                embeddings[rows >= 0] = known.at(rows[rows >= 0])
            self._require_storable(window, embeddings)
            yield window, embeddings

    def _require_text(self, documents: list[Document]) -> None:
        for document in documents:
            doc_id, text = document.doc_id, document.text
            if not isinstance(text, str):
                raise CollectionError(
                    f"{self._corpus.name}: {self._task} {doc_id!r} has no text but {type(text).__name__} ({text!r:.60})"
                )
            try:
                text.encode()
            except UnicodeEncodeError as error:
                raise CollectionError(
                    f"{self._corpus.name}: {self._task} {doc_id!r} is no valid text: it has half a character "
                    f"({text[error.start]!r}) at place {error.start}; remove it, and go on where this was stopped"
                ) from None

    def _require_storable(self, documents: list[Document], embeddings: np.ndarray) -> None:
        largest = LARGEST[self._stored_as]
        wrong = np.flatnonzero(~(np.abs(embeddings).max(axis=1, initial=0) <= largest))
        if not len(wrong):
            return
        doc_id = documents[wrong[0]].doc_id
        if np.isfinite(embeddings[wrong]).all():
            raise ValueError(
                f"{self._corpus.name}: the embedding of {self._task} {doc_id!r} is too large for {self._stored_as}; "
                'encode with dtype="model"'
            )
        raise ValueError(
            f"{self._corpus.name}: the embedding of {self._task} {doc_id!r} is not finite (NaN or infinite): "
            "the model is broken, or its precision too low"
        )

    def _manifest(self) -> dict[str, Any]:
        return {
            "model": self._fingerprint or model_fingerprint(self._model),
            "task": self._task,
            "computed_in": self.computed_in,
            "dtype": self._stored_as,
            "dim": self.dim,
            "corpus": self._corpus.name,
            "corpus_fingerprint": self._corpus.fingerprint(),
        }

    def _progress(self) -> Any:
        if self._shared_progress is not None:
            return contextlib.nullcontext(self._shared_progress)  # its owner closes it
        return tqdm(
            total=self._corpus.expected_size(),
            desc=f"Encoding {self._corpus.name}",
            unit=f" {'queries' if self._task == 'query' else 'documents'}",
            disable=not self._encoding.show_progress_bar,
        )

    def _empty(self) -> CollectionError:
        return CollectionError(f"{self._corpus.name}: the corpus is empty; there is nothing to encode")


def parts_of(folder: Path) -> list[Path]:
    """Parts written by workers of a cluster that are not in the store yet, in corpus order."""
    return sorted(_named(folder, PARTS).glob("part-*"))


def _remove_parts(folder: Path) -> None:
    for part in parts_of(folder):
        remove_files(part)
    for lock in _named(folder, PARTS).glob(f"{LOCK_NAME}*"):
        lock.unlink(missing_ok=True)
    with contextlib.suppress(OSError):  # there are none, or another file lies beside them
        _named(folder, PARTS).rmdir()


def _beside(folder: Path) -> Path:
    return _named(folder, UNFINISHED)


def _named(folder: Path, ending: str) -> Path:
    return folder.with_name(folder.name + ending)


def _agree(found: dict[str, Any], manifest: dict[str, Any]) -> bool:
    return all(found.get(name) == value for name, value in manifest.items())


def _is_whole(folder: Path, manifest: dict[str, Any]) -> bool:
    """Whether this is the finished store of this manifest, with correct checksums."""
    found = usable_manifest(folder)
    if found is None or "documents" not in found or not _agree(found, manifest):
        return False
    return verify(folder).whole


def _require_own(folder: Path) -> None:
    """Refuse a folder with other files in it, which the store would replace."""
    for place in (folder, _beside(folder)):
        if foreign := foreign_files(place):
            raise ValueError(
                f"{place} holds files that are no part of an embedding store ({foreign[0]!r}"
                f"{' and others' if len(foreign) > 1 else ''}); give the store a folder of its own"
            )


def _alone(folder: Path) -> AbstractContextManager[None]:
    """Hold the lock for building this store."""
    return locked(_named(folder, LOCK), f"making {folder}")
