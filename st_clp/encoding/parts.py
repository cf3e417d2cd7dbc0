"""Parts of a corpus's embeddings. Each is a small store that any process with access to the documents can write.

The workers of a cluster write parts, and a store at an address consists of them.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock
from sentence_transformers import SentenceTransformer
from tqdm.auto import tqdm

from st_clp.data import Corpus, Document
from st_clp.distributed import Workers
from st_clp.encoding.addresses import Place, is_address
from st_clp.encoding.building import LOCK_NAME, Builder
from st_clp.encoding.shards import remove_files, usable_manifest
from st_clp.encoding.working_model import Task, copy_modules
from st_clp.options import HERE, Encoding

PART_DOCUMENTS = 4096  # of a part, about: some minutes of a processor's work, some seconds of a GPU's


def part_size(window: int) -> int:
    """The number of documents in a part: whole windows."""
    return max(1, PART_DOCUMENTS // window) * window


class PartEncoder(Builder):
    """Encodes parts of a corpus into folders of their own.

    Args:
        model: The model.
        corpus: The corpus, which is read here.
        task, encoding: As in :class:`Builder`.
        manifest: Of the whole store.
        known: Folders with embeddings that can be used again.
        progress: A bar to advance by each document.

    Raises:
        ValueError: This machine would compute in another precision than the manifest's.
    """

    def __init__(
        self,
        model: SentenceTransformer,
        corpus: Corpus,
        task: Task,
        encoding: Encoding,
        manifest: dict[str, Any],
        known: list[str],
        progress: tqdm | None = None,
    ) -> None:
        super().__init__(model, corpus, task, encoding, progress, fingerprint=manifest["model"])
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
        """Encode ``number`` documents from the ``begin``-th on; return how many there were (fewer at the end)."""
        if is_address(folder):
            with tempfile.TemporaryDirectory() as scratch:
                written = self(begin, number, scratch)
                if written:
                    Place(folder).put(part_path(Path(scratch), begin), part_name(begin, self._whole))
                return written
        # A worker that was given up may still be alive, and two that append to the same files would corrupt them.
        with FileLock(Path(folder, f"{LOCK_NAME}{begin:012d}")):
            return self._write(begin, number, part_path(Path(folder), begin))

    def _write(self, begin: int, number: int, path: Path) -> int:
        """Complete the part's folder; return how many documents it has."""
        manifest = {**self._whole, "part": [begin, number]}
        found = usable_manifest(path)
        if found is not None and {name: found.get(name) for name in manifest} != manifest:
            remove_files(path)
        elif found is not None and "documents" in found:
            return int(found["documents"])
        self._fill(self._begin(path, manifest), self._stretch(begin, number), self._reusable, self._shared_progress)
        return self._conclude(path, manifest)

    def _stretch(self, begin: int, number: int) -> Iterator[Document]:
        """The documents from ``begin`` on. Parts come in order, so reading mostly continues where it was."""
        if self._at is None or begin < self._at:
            self._stream, self._at = iter(self._corpus), 0
        for _ in itertools.islice(self._stream, begin - self._at):
            self._at += 1
        for document in itertools.islice(self._stream, number):
            self._at += 1
            yield document


Piece = tuple[int, int, str]  # the first document, how many documents, and where the parts lie


def pieces(begin: int, size: int, place: str, end: list[bool]) -> Iterator[Piece]:
    """The parts from document ``begin`` on, until ``end`` holds True: a part has met the corpus's end."""
    while not end[0]:
        number = size - begin % size
        yield begin, number, place
        begin += number


def write_parts(
    model: SentenceTransformer,
    corpus: Corpus,
    task: Task,
    encoding: Encoding,
    manifest: dict[str, Any],
    wanted: Iterator[Piece],
    *,
    known: Sequence[str],
    progress: tqdm,
) -> Iterator[tuple[Piece, int]]:
    """Write parts, here or on a cluster; yield (part, its number of documents) as each is finished.

    Args:
        model, corpus, task, encoding: As in :class:`Builder`.
        manifest: Of the store that the parts are of.
        wanted: The parts.
        known: Folders with embeddings that need not be computed again.
        progress: A bar over the documents.
    """
    what = corpus, task, Encoding.of(encoding, show_progress_bar=False, **HERE), manifest, list(known)
    if encoding.ray is None:
        encoder = PartEncoder(model, *what, progress=progress)
        for piece in wanted:
            yield piece, encoder(*piece)
        return
    with Workers(encoding, _in_worker, encoding.cpus_per_worker, _sendable(model), *what) as workers:
        for piece, written in workers.run(wanted):
            progress.update(written)
            progress.set_postfix_str(f"{workers.number} workers", refresh=False)
            yield piece, written


def _in_worker(threads: int, model: SentenceTransformer, *rest: Any) -> PartEncoder:
    """Move the model, which was sent on the CPU, to the worker's GPU if it has one."""
    if torch.cuda.is_available():
        model = model.to("cuda")
    else:
        torch.set_num_threads(threads)
    return PartEncoder(model, *rest)


def part_name(begin: int, manifest: dict[str, Any]) -> str:
    """The name of a part at an address, from its first document and the store's manifest."""
    content = json.dumps(manifest, sort_keys=True).encode()
    return f"part-{hashlib.blake2b(content, digest_size=6).hexdigest()}-{begin:012d}"


def part_path(folder: Path, begin: int) -> Path:
    """The folder of a part, from its first document."""
    return folder / f"part-{begin:012d}"


def _sendable(model: SentenceTransformer) -> SentenceTransformer:
    """A copy of the model on the CPU, without the data in its card, to be sent to a worker."""
    copied = copy_modules(model).cpu()
    copied.model_card_data = type(model.model_card_data)()
    return copied
