"""The two ways to mine while training: here, with training standing still, and beside it, in another process."""

from __future__ import annotations

import shutil
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from sentence_transformers import SentenceTransformer

from st_clp.data import Collection
from st_clp.options import MiningOptions
from st_clp.refresh import snapshot
from st_clp.refresh.background import BackgroundMiner
from st_clp.refresh.generation import is_whole, mine_generation
from st_clp.refresh.layout import Layout
from st_clp.refresh.worker import Job

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
    """Mines one generation at a time. Whatever a method raises, the refresh has failed."""

    def begin(self, step: int, previous: int) -> None:
        """Begin to mine with the weights as they are, after ``step`` steps; the generation ``previous`` is in use."""

    def take_up(self, step: int, previous: int) -> None:
        """Go on with what was begun in a run that was stopped."""

    def finished(self, step: int, previous: int, *, wait: bool) -> bool:
        """Whether the generation is there; ``wait`` until it is."""

    def close(self) -> None:
        """End."""


class InProcessMiner:
    """Mines in this process when it is asked whether it has finished.

    Args:
        job: What to mine.
        layout: Where the files lie.
    """

    def __init__(self, job: MiningJob, layout: Layout) -> None:
        self._job = job
        self._layout = layout

    def begin(self, step: int, previous: int) -> None:
        """Nothing: the weights are there."""

    def take_up(self, step: int, previous: int) -> None:
        """What was begun beside an earlier run cannot be gone on with here."""
        raise RuntimeError("it was begun in another process, and this run refreshes synchronously")

    def finished(self, step: int, previous: int, *, wait: bool) -> bool:
        """Mine, with the weights as they are."""
        with snapshot.random_state_kept():
            mine_generation(
                snapshot.detached_copy(self._job.model),
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
        snapshot.write_frozen(job.model, layout.frozen)
        sent = Job(
            snapshot.skeleton(job.model),
            layout.frozen,
            dict(job.collections),
            job.options,
            {**job.mining, "show_progress_bar": False},
            device,
            threads,
            layout.embeddings,
        )
        self._process = BackgroundMiner(sent, layout.log)
        self._process.start()

    def begin(self, step: int, previous: int) -> None:
        """Copy the weights, and have them mined."""
        # A run that was stopped may have mined this step too, with weights that may differ in their last bits.
        shutil.rmtree(self._layout.negatives(step), ignore_errors=True)
        snapshot.write_trained(self._job.model, self._layout.snapshot(step))
        self.take_up(step, previous)

    def take_up(self, step: int, previous: int) -> None:
        """Have the copy of the weights mined that lies on the disk, if that is not done already."""
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


def free_device(used: torch.device) -> str:
    """A GPU that training does not use, or else what it uses."""
    if used.type != "cuda":
        return str(used)
    distributed = torch.distributed
    processes = distributed.get_world_size() if distributed.is_available() and distributed.is_initialized() else 1
    number = torch.cuda.device_count()
    return f"cuda:{number - 1}" if number > processes else str(used)
