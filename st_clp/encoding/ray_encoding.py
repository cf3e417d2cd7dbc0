"""Encoding a corpus on a Ray cluster: the same shards as in one process, written by the workers.

The corpus is cut into parts of some windows each. A worker reads the documents of a part itself, encodes them, and
writes them as a small store of its own beside the one that is made, a shard at a time. What goes through the process
that asked is the files of finished parts, which it appends in the corpus's order, so that the store has the bytes that
one process would have written. Whatever is stopped, killed or lost is taken up from the shards that are on the disk: by
the same command, or by one process alone, which finds in the parts what need not be encoded again.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from sentence_transformers import SentenceTransformer

from st_clp.data import Corpus, Document
from st_clp.distributed import Workers, gpus_per_worker
from st_clp.encoding.building import BEGUN, PARTS, REPLACED, UNFINISHED, Builder
from st_clp.encoding.encode import ACCELERATOR_WINDOW, CPU_WINDOW
from st_clp.encoding.shards import (
    KnownEmbeddings,
    ShardFiles,
    StoreError,
    read_shards,
    remove_files,
    usable_manifest,
)
from st_clp.encoding.working_model import Task, copy_modules
from st_clp.options import HERE, Encoding

PART_DOCUMENTS = 4096  # of a part, about: some minutes of a processor's work, some seconds of a GPU's


class ClusterBuilder(Builder):
    """Encodes on the cluster that the encoding names; the arguments are those of :class:`Builder`."""

    def _finish(self, folder: Path, manifest: dict[str, Any], known: KnownEmbeddings | None) -> None:
        expected = self._corpus.expected_size()
        if expected is not None and expected <= PART_DOCUMENTS:
            super()._finish(folder, manifest, known)  # done before a worker is there
            return
        # Shards are windows, and windows are those of what encodes.
        self._window = ACCELERATOR_WINDOW if gpus_per_worker(self._encoding) else CPU_WINDOW
        files = self._begin(folder, manifest)
        parts = folder.with_name(folder.name.removesuffix(UNFINISHED) + PARTS)
        with self._progress() as progress:
            self._skip_finished(files, iter(self._corpus), progress)
            done = sum(shard.rows for shard in read_shards(folder))
            self._append_parts(files, parts, manifest, done, progress)
        if not self._conclude(folder, manifest):
            raise self._empty()

    def _append_parts(self, files: ShardFiles, parts: Path, manifest: dict[str, Any], done: int, progress: Any) -> None:
        """Have the parts encoded from document ``done`` on, and append each when those before it are there."""
        parts.mkdir(parents=True, exist_ok=True)
        end = [False]
        finished: dict[int, tuple[int, int]] = {}
        here = Encoding.of(self._encoding, show_progress_bar=False, **HERE)
        known_in = self._reusable_folders(files.folder)
        what = (_sendable(self._model), self._corpus, self._task, here, manifest, known_in)
        with Workers(self._encoding, PartEncoder, *what, self._encoding.cpus_per_worker) as workers:
            pieces = self._pieces(done, str(parts.absolute()), end)
            for (begin, number, _), written in workers.run(pieces):
                end[0] |= written < number
                progress.update(written)
                progress.set_postfix_str(f"{workers.number} workers", refresh=False)
                finished[begin] = number, written
                while done in finished:
                    number, written = finished.pop(done)
                    if written:
                        _append(files, _part(parts, done), manifest, written)
                    done += number

    def _pieces(self, begin: int, folder: str, end: list[bool]) -> Iterator[tuple[int, int, str]]:
        """(first document, number of documents, the folder of the parts), until the corpus has come to its end."""
        size = max(1, PART_DOCUMENTS // self._window) * self._window
        while not end[0]:
            number = size - begin % size
            yield begin, number, folder
            begin += number

    def _reusable_folders(self, unfinished: Path) -> list[str]:
        """Where embeddings of the same texts may lie."""
        folder = str(unfinished.absolute()).removesuffix(UNFINISHED)
        return [folder, folder + REPLACED, folder + BEGUN]


class PartEncoder(Builder):
    """What a worker does: it encodes parts of the corpus into folders of their own.

    Args:
        model: The model, on the processor; it is moved to the worker's device.
        corpus: The corpus, which is read here.
        task, encoding: As in :class:`Builder`.
        manifest: Of the store that the parts are of.
        known: Folders with embeddings that need not be computed again.
        threads: Of a processor.
    """

    def __init__(
        self,
        model: SentenceTransformer,
        corpus: Corpus,
        task: Task,
        encoding: Encoding,
        manifest: dict[str, Any],
        known: list[str],
        threads: int,
    ) -> None:
        if torch.cuda.is_available():
            model = model.to("cuda")
        else:
            torch.set_num_threads(threads)
        super().__init__(model, corpus, task, encoding, fingerprint=manifest["model"])
        self._whole = manifest
        if (self.computed_in, self._stored_as) != (manifest["computed_in"], manifest["dtype"]):
            raise ValueError(
                f"this worker would compute in {self.computed_in} and the others in {manifest['computed_in']}: the "
                "machines are of different kinds; name one precision for all (dtype, --encode-dtype)"
            )
        self._reusable = self._known([Path(folder) for folder in known], manifest)
        self._stream: Iterator[Document] = iter(())
        self._at: int | None = None

    def __call__(self, begin: int, number: int, folder: str) -> int:
        """Encode ``number`` documents from the ``begin``-th on; how many there were, fewer at the corpus's end."""
        path = _part(Path(folder), begin)
        manifest = {**self._whole, "part": [begin, number]}
        found = usable_manifest(path)
        if found is not None and {name: found.get(name) for name in manifest} != manifest:
            remove_files(path)
        elif found is not None and "documents" in found:
            return int(found["documents"])
        self._fill(self._begin(path, manifest), self._stretch(begin, number), self._reusable)
        return self._conclude(path, manifest)

    def _stretch(self, begin: int, number: int) -> Iterator[Document]:
        """The documents from ``begin`` on; parts come in order, so the corpus is mostly read on from where it was."""
        if self._at is None or begin < self._at:
            self._stream, self._at = iter(self._corpus), 0
        for _ in itertools.islice(self._stream, begin - self._at):
            self._at += 1
        for document in itertools.islice(self._stream, number):
            self._at += 1
            yield document


def _part(folder: Path, begin: int) -> Path:
    return folder / f"part-{begin:012d}"


def _append(files: ShardFiles, part: Path, manifest: dict[str, Any], documents: int) -> None:
    """Append a part's shards to the store's, and remove the part."""
    found = usable_manifest(part)
    if found is None or found.get("documents") != documents:
        raise StoreError(
            f"{part} was written by a worker on another machine and is not here: give the store a folder that all "
            "machines of the cluster share"
        )
    for shard, ids, keys, embeddings, right in ShardFiles(part, manifest).read():
        if not right:
            raise StoreError(f"{part} is damaged ({shard.rows} documents); remove it, and go on where this was stopped")
        files.add(ids, [key.tobytes() for key in keys], embeddings)
    remove_files(part)


def _sendable(model: SentenceTransformer) -> SentenceTransformer:
    """A copy on the processor, without the data that its card remembers."""
    copied = copy_modules(model).cpu()
    copied.model_card_data = type(model.model_card_data)()
    return copied
