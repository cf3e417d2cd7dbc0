"""Mining during training, in this process or in a background process that gets snapshots of the model."""

from __future__ import annotations

import contextlib
import json
import os
import pickle
import shutil
import struct
import subprocess
import sys
import time
import weakref
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from sentence_transformers import SentenceTransformer

from st_clp.data import Collection
from st_clp.distributed import address_of
from st_clp.options import ClusterOptions, MiningOptions
from st_clp.refresh.generations import is_whole, mine_generation
from st_clp.refresh.rows_in_use import Layout
from st_clp.refresh.snapshot import detached_copy, random_state_kept, skeleton, write_frozen, write_trained
from st_clp.refresh.worker import Job

_START = "from st_clp.refresh.worker import main; main()"
_TAIL = 2000  # characters of its log that a failure quotes


class BackgroundMiner:
    """Mines snapshots in a separate process, one at a time.

    The process is restarted if it has ended. It does not run the training script's code.

    Args:
        job: What is the same for all refreshes.
        log: File for what the process prints.

    Raises:
        TypeError: The model, a collection or an option cannot be sent to another process.
    """

    def __init__(self, job: Job, log: Path) -> None:
        try:
            self._content = pickle.dumps(job)
        except Exception as error:  # pickle raises whatever the object's own methods raise
            raise TypeError(
                f"this model or collection cannot be sent to another process, which asynchronous refreshes need: "
                f"{error}. Refresh synchronously (asynchronous=False)"
            ) from error
        self._threads = job.threads
        self._log = log
        self._process: subprocess.Popen[bytes] | None = None
        self._folder: Path | None = None

    def start(self) -> None:
        """Start the process if there is none, so that it has imported its libraries when it is needed."""
        if self._process is not None and self._process.poll() is None:
            return
        self._log.parent.mkdir(parents=True, exist_ok=True)
        threads = str(self._threads)
        environment = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join(path for path in sys.path if path),
            "OMP_NUM_THREADS": threads,
            "MKL_NUM_THREADS": threads,
            "TOKENIZERS_PARALLELISM": "false" if self._threads == 1 else "true",
        }
        # Under torchrun, the child must not take itself for one of the process group.
        for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
            environment.pop(name, None)
        with open(self._log, "ab") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-c", _START], stdin=subprocess.PIPE, stdout=log, stderr=log, env=environment
            )
        weakref.finalize(self, _end, self._process)
        self._send(struct.pack("!Q", len(self._content)) + self._content)

    def mine(self, snapshot: Path, *, previous: Path, folder: Path) -> None:
        """Begin to mine a snapshot.

        Args:
            snapshot: The trained weights.
            previous: The generation in use.
            folder: Where to write the generation.
        """
        self.start()
        self._folder = folder
        command = {"snapshot": str(snapshot), "previous": str(previous), "folder": str(folder)}
        self._send(json.dumps(command).encode() + b"\n")

    def ready(self) -> bool:
        """Whether the generation is finished.

        Raises:
            RuntimeError: The process ended without it; the message says how, with the end of its log.
        """
        process, folder = self._process, self._folder
        if process is None or folder is None:
            raise RuntimeError("nothing is being mined")
        status = process.poll()  # before looking: what it wrote last is then seen
        if is_whole(folder):
            return True
        if status is not None:
            raise RuntimeError(f"the mining process {_ending(status)}; the end of {self._log}:\n{self._last_words()}")
        return False

    def stop(self) -> None:
        """End the process."""
        if self._process is not None:
            _end(self._process)

    @property
    def pid(self) -> int | None:
        """The process id; None if none was started."""
        return self._process.pid if self._process is not None else None

    def _send(self, content: bytes) -> None:
        stream = self._process.stdin if self._process is not None else None
        # A process that has ended already is found by ready().
        with contextlib.suppress(BrokenPipeError):
            if stream is not None:
                stream.write(content)
                stream.flush()

    def _last_words(self) -> str:
        try:
            return self._log.read_text(encoding="utf-8", errors="replace")[-_TAIL:].strip()
        except OSError as error:
            return f"(cannot be read: {error})"


def _ending(status: int) -> str:
    return f"was killed by signal {-status}" if status < 0 else f"ended with status {status}"


def _end(process: subprocess.Popen[bytes]) -> None:
    if process.poll() is None:
        process.kill()
        process.wait()
    if process.stdin is not None:
        with contextlib.suppress(OSError):
            process.stdin.close()


POLL = 0.2  # seconds


@dataclass(frozen=True)
class MiningJob:
    """What is mined.

    Attributes:
        model: The model that is trained.
        collections: Collection name to collection, in the order of the training set.
        options: What to mine.
        mining: Further arguments of ``mine``.
    """

    model: SentenceTransformer
    collections: Mapping[str, Collection]
    options: MiningOptions
    mining: Mapping[str, Any]


class Miner(Protocol):
    """Mines one generation at a time. An exception means that the refresh has failed."""

    def begin(self, step: int, previous: int) -> None:
        """Begin to mine with the current weights, after ``step`` steps; the generation ``previous`` is in use."""

    def take_up(self, step: int, previous: int) -> None:
        """Continue what a stopped run had begun."""

    def finished(self, step: int, previous: int, *, wait: bool) -> bool:
        """Whether the generation is finished; ``wait`` until it is."""

    def close(self) -> None:
        """End."""


class InProcessMiner:
    """Mines in this process, when asked whether it has finished.

    Args:
        job: What to mine.
        layout: Where the files lie.
    """

    def __init__(self, job: MiningJob, layout: Layout) -> None:
        self._job = job
        self._layout = layout

    def begin(self, step: int, previous: int) -> None:
        """Nothing to do: the weights are here."""

    def take_up(self, step: int, previous: int) -> None:
        """Not supported: what a background process of an earlier run had begun cannot be continued here."""
        raise RuntimeError("it was begun in another process, and this run refreshes synchronously")

    def finished(self, step: int, previous: int, *, wait: bool) -> bool:
        """Mine with the current weights."""
        with random_state_kept():
            mine_generation(
                detached_copy(self._job.model),
                self._job.collections,
                self._job.options,
                self._job.mining,
                previous=self._layout.negatives(previous),
                folder=self._layout.negatives(step),
                stores=self._layout.embeddings,
            )
        return True

    def close(self) -> None:
        """Nothing to end."""


class SubprocessMiner:
    """Mines a copy of the weights in another process.

    Args:
        job: What to mine.
        layout: Where the files lie.
        device: What to mine on.
        threads: Threads on a processor.

    Raises:
        TypeError: The model or a collection cannot be sent to another process.
        OSError: The weights cannot be written.
    """

    def __init__(self, job: MiningJob, layout: Layout, *, device: str, threads: int) -> None:
        self._job = job
        self._layout = layout
        write_frozen(job.model, layout.frozen)
        sent = Job(
            skeleton(job.model),
            layout.frozen,
            dict(job.collections),
            job.options,
            {**job.mining, **_same_cluster(job.mining), "show_progress_bar": False},
            device,
            threads,
            layout.embeddings,
        )
        self._process = BackgroundMiner(sent, layout.log)
        self._process.start()

    def begin(self, step: int, previous: int) -> None:
        """Copy the weights, and let the process mine."""
        # A run that was stopped may have mined this step too, with weights that may differ in their last bits.
        shutil.rmtree(self._layout.negatives(step), ignore_errors=True)
        write_trained(self._job.model, self._layout.snapshot(step))
        self.take_up(step, previous)

    def take_up(self, step: int, previous: int) -> None:
        """Mine with the copy of the weights on disk, unless that is done already."""
        if is_whole(self._layout.negatives(step)):
            return
        weights = self._layout.snapshot(step)
        if not weights.is_file():
            raise FileNotFoundError(f"the weights that it was to mine with are not in {weights}")
        self._process.mine(weights, previous=self._layout.negatives(previous), folder=self._layout.negatives(step))

    def finished(self, step: int, previous: int, *, wait: bool) -> bool:
        """Whether the other process has mined it."""
        while not is_whole(self._layout.negatives(step)) and not self._process.ready():
            if not wait:
                return False
            time.sleep(POLL)
        return True

    def close(self) -> None:
        """End the process."""
        self._process.stop()


def _same_cluster(mining: Mapping[str, Any]) -> dict[str, Any]:
    """Options that let the mining process join this process's cluster, if mining uses one."""
    if mining.get("ray") is None:
        return {}
    return {"ray": address_of(ClusterOptions(ray=mining["ray"]))}


def free_device(used: torch.device) -> str:
    """A GPU that training does not use, otherwise the one that it uses."""
    if used.type != "cuda":
        return str(used)
    distributed = torch.distributed
    processes = distributed.get_world_size() if distributed.is_available() and distributed.is_initialized() else 1
    number = torch.cuda.device_count()
    return f"cuda:{number - 1}" if number > processes else str(used)
