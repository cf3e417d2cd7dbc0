"""The negatives in use: the files of a training's refreshes, and batches with the rows of the current generation.

A data loader builds batches ahead: one in the Trainer's own loop, and more in worker processes. When negatives change
between two steps, the waiting batches have the old ones. So a batch records its generation, and if negatives have
changed by the time it is used, it is built again from the same rows. The sampler chooses the rows of a batch and never
sees refreshed negatives.
"""

from __future__ import annotations

import shutil
import uuid
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import send_to_device

from st_clp.files import remove_leftovers_in
from st_clp.memory import pinned
from st_clp.refresh.generations import Generation
from st_clp.refresh.training_set import ROW

Features = list[dict[str, Any]]


@dataclass(frozen=True)
class Layout:
    """The files of a run's refreshes.

    Args:
        folder: The folder; all processes of a training must see the same one.
    """

    folder: Path

    def negatives(self, step: int) -> Path:
        """The generation mined by the weights after so many steps; training begins with that of step 0."""
        return self.folder / "negatives" / f"step-{step:08d}"

    def snapshot(self, step: int) -> Path:
        """The trained weights after so many steps."""
        return self.folder / "snapshots" / f"step-{step:08d}.safetensors"

    @property
    def frozen(self) -> Path:
        """The weights that do not train."""
        return self.folder / "snapshots" / "frozen.safetensors"

    @property
    def embeddings(self) -> Path:
        """The embeddings of the latest mining, so that stopped mining can be resumed."""
        return self.folder / "embeddings"

    @property
    def journal(self) -> Path:
        """The current history, newer than that of a checkpoint."""
        return self.folder / "refreshes.json"

    @property
    def log(self) -> Path:
        """The output of the background mining process."""
        return self.folder / "mining.log"

    def remove_leftovers(self) -> None:
        """Remove unfinished files of killed processes."""
        for folder in (self.folder, self.folder / "negatives", self.folder / "snapshots"):
            remove_leftovers_in(folder)

    def clear(self) -> None:
        """Remove the files of an earlier run."""
        for name in ("negatives", "snapshots", "embeddings"):
            shutil.rmtree(self.folder / name, ignore_errors=True)
        self.journal.unlink(missing_ok=True)
        self.log.unlink(missing_ok=True)

    def remove_before(self, step: int) -> None:
        """Remove the generations older than that of a step, except the first."""
        for path in (self.folder / "negatives").glob("step-*"):
            number = path.name.removeprefix("step-").partition(".")[0]
            if number.isdigit() and 0 < int(number) < step:
                shutil.rmtree(path, ignore_errors=True)


class Negatives:
    """The generation in use, shared with the data loader's workers.

    Args:
        layout: Where the files lie.
        collections: How many collections there are.
        columns: The columns that a refresh replaces.
    """

    def __init__(self, layout: Layout, collections: int, columns: list[str]) -> None:
        self._layout = layout
        self._collections = collections
        self._columns = columns
        # Shared memory: a worker process sees at once what this one uses.
        self._step = torch.zeros(1, dtype=torch.int64).share_memory_()
        self._open: tuple[int, Generation | None] = (0, None)

    @property
    def step(self) -> int:
        """The generation in use, by the step whose weights mined it."""
        return int(self._step)

    def use(self, step: int) -> None:
        """Use this generation from now on, in every process that shares it.

        Raises:
            FileNotFoundError: That generation does not exist.
        """
        self._generation(step)
        self._step[0] = step

    def fill(self, features: Features, step: int) -> Features:
        """The rows with the negatives of a generation, without their numbers."""
        generation = self._generation(step)
        filled = []
        for feature in features:
            row = {name: value for name, value in feature.items() if name != ROW}
            if generation is not None:
                found = generation.row(int(feature[ROW]))
                row.update({column: found[column] for column in self._columns})
            filled.append(row)
        return filled

    def _generation(self, step: int) -> Generation | None:
        """The generation; None for step 0, whose negatives are in the dataset itself."""
        number, generation = self._open  # a thread that collates may replace it meanwhile
        if number != step:
            generation = Generation(self._layout.negatives(step), self._collections) if step else None
            self._open = step, generation
        return generation

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_open": (0, None)}


# Batches come from worker processes, so they name their collator instead of holding it.
_COLLATORS: weakref.WeakValueDictionary[str, RefreshingCollator] = weakref.WeakValueDictionary()


class RefreshingCollator:
    """Collates with the negatives in use.

    Args:
        collate: The data loader's own collator.
        negatives: The negatives in use.

    Attributes:
        given: The generation of the latest batch; None before the first.
    """

    def __init__(self, collate: Callable[[Features], Any], negatives: Negatives) -> None:
        self._collate = collate
        self.negatives = negatives
        self.given: int | None = None
        self._name = uuid.uuid4().hex
        _COLLATORS[self._name] = self

    def __call__(self, features: Features) -> WaitingBatch:
        for feature in features:
            if ROW not in feature:
                raise ValueError(
                    f"the rows have no column {ROW!r}, so their negatives cannot be refreshed: give the Trainer "
                    "AnceCallback.train_dataset as its train_dataset"
                )
        step = self.negatives.step
        return WaitingBatch(self._name, features, step, self.collate(features, step))

    def collate(self, features: Features, step: int) -> Any:
        """Collate these rows with the negatives of one generation."""
        return self._collate(self.negatives.fill(features, step))


class WaitingBatch:
    """A batch that was built ahead. The Trainer's data loader moves it to the device when it is used."""

    def __init__(self, collator: str, features: Features, step: int, content: Any) -> None:
        self._collator = collator
        self._features = features
        self._step = step
        self._content = content

    def to(self, device: Any, non_blocking: bool = False) -> Any:
        """Move the batch to the device, built again if negatives have changed."""
        collator = _COLLATORS[self._collator]
        step = collator.negatives.step
        content = self._content if step == self._step else collator.collate(self._features, step)
        collator.given = step
        return send_to_device(content, device, non_blocking=non_blocking)

    def pin_memory(self) -> WaitingBatch:
        """Pin the batch's memory."""
        self._content = pinned(self._content)
        return self
