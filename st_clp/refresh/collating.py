"""Batches with the negatives that are in use when they are trained on.

A data loader builds batches ahead: one in the Trainer's own loop, and more in worker processes. When negatives change
between two steps, the batches that are waiting have the old ones. So a batch knows of which generation it is, and
where it is asked for and negatives have changed since, it is built again, from the rows that it came from. Which rows
make a batch is the sampler's choice, and the sampler never sees the negatives that refreshes bring.
"""

from __future__ import annotations

import uuid
import weakref
from collections.abc import Callable
from typing import Any

import torch
from accelerate.utils import send_to_device
from torch.utils.data._utils.pin_memory import pin_memory

from st_clp.refresh.generation import Generation
from st_clp.refresh.layout import Layout

ROW = "row"
"""The column of a training set that says which row of a generation belongs to it."""

Features = list[dict[str, Any]]


class Negatives:
    """Which generation is in use, for this process and the data loader's workers.

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
        """Give the rows of this generation from now on, in every process that shares it.

        Raises:
            FileNotFoundError: That generation is not there.
        """
        self._generation(step)
        self._step[0] = step

    def fill(self, features: Features, step: int) -> Features:
        """The rows with the negatives of a generation, and without their number."""
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
        """None of step 0: the dataset itself has those negatives."""
        if self._open[0] != step:
            self._open = (
                step,
                Generation(self._layout.negatives(step), self._collections) if step else None,
            )
        return self._open[1]

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
        given: The generation of the batch that was asked for last; None before the first.
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
        """A batch of these rows with the negatives of one generation."""
        return self._collate(self.negatives.fill(features, step))


class WaitingBatch:
    """A batch that was built ahead. The Trainer's data loader moves it to the device when it is asked for."""

    def __init__(self, collator: str, features: Features, step: int, content: Any) -> None:
        self._collator = collator
        self._features = features
        self._step = step
        self._content = content

    def to(self, device: Any, non_blocking: bool = False) -> Any:
        """The batch on the device, built again if negatives have changed since."""
        collator = _COLLATORS[self._collator]
        step = collator.negatives.step
        content = self._content if step == self._step else collator.collate(self._features, step)
        collator.given = step
        return send_to_device(content, device, non_blocking=non_blocking)

    def pin_memory(self) -> WaitingBatch:
        """In memory that an accelerator reads without a copy."""
        self._content = pin_memory(self._content)
        return self
