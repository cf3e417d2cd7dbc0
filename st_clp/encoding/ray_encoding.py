"""Encode a corpus on a Ray cluster: the workers write the same shards as one process would.

The corpus is cut into parts of some windows each. A worker reads the documents of a part itself, encodes them, and
writes them as a small store of its own beside the one that is made, a shard at a time. What goes through the process
that asked is the files of finished parts, which it appends in the corpus's order, so that the store has the bytes that
one process would have written. After a stop, a kill or a loss, work resumes from the shards that are on the disk: by
the same command, or by one process alone, which finds in the parts what need not be encoded again.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from st_clp.distributed import gpus_per_worker
from st_clp.encoding.building import BEGUN, PARTS, REPLACED, UNFINISHED, Builder
from st_clp.encoding.encode import ACCELERATOR_WINDOW, CPU_WINDOW
from st_clp.encoding.parts import part_path, part_size, pieces, write_parts
from st_clp.encoding.shards import (
    KnownEmbeddings,
    ShardFiles,
    StoreError,
    read_shards,
    remove_files,
    usable_manifest,
)


class ClusterBuilder(Builder):
    """Encodes on a cluster; the arguments are those of :class:`Builder`."""

    def _finish(self, folder: Path, manifest: dict[str, Any], known: KnownEmbeddings | None) -> None:
        expected = self._corpus.expected_size()
        if expected is not None and expected <= part_size(self._window):
            super()._finish(folder, manifest, known)  # done before a worker is there
            return
        # Shards are windows, and the workers' device decides their size.
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
        """Encode the parts from document ``done`` on, and append each when those before it are complete."""
        parts.mkdir(parents=True, exist_ok=True)
        end = [False]
        finished: dict[int, tuple[int, int]] = {}
        wanted = pieces(done, part_size(self._window), str(parts.absolute()), end)
        what = self._model, self._corpus, self._task, self._encoding, manifest, wanted
        known = self._reusable_folders(files.folder)
        for (begin, number, _), written in write_parts(*what, known=known, progress=progress):
            end[0] |= written < number
            finished[begin] = number, written
            while done in finished:
                number, written = finished.pop(done)
                if written:
                    _append(files, part_path(parts, done), manifest, written)
                done += number

    def _reusable_folders(self, unfinished: Path) -> list[str]:
        """Folders that may hold embeddings of the same texts."""
        folder = str(unfinished.absolute()).removesuffix(UNFINISHED)
        return [folder, folder + REPLACED, folder + BEGUN]


def _append(files: ShardFiles, part: Path, manifest: dict[str, Any], documents: int) -> None:
    """Append a part's shards to the store, and remove the part."""
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
