"""What a step of training takes, from a few batches that are trained on a copy of the model and thrown away."""

from __future__ import annotations

import copy
import dataclasses
import itertools
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from sentence_transformers import SentenceTransformer
from torch import Tensor
from transformers import PrinterCallback, TrainerCallback

from st_clp.losses.document_batches import QUERIES_PER_DOCUMENT
from st_clp.run.modelling import prepare_model
from st_clp.run.training import make_trainer
from st_clp.settings import RunSettings

if TYPE_CHECKING:
    from datasets import Dataset

STEPS = 2  # that are timed, after one that is not
LONG_ROW = 2  # times the trial's seconds
ADAM_BYTES = 8  # its two moments of a parameter


@dataclass(frozen=True)
class StepCost:
    """What a step of training takes.

    Attributes:
        seconds: Of a step with the run's batch size.
        batch_size: Rows of the largest batch that was tried.
        weights: Bytes of all weights.
        trained: Bytes of the gradients and the optimizer's moments.
        activations: Bytes that are kept for the backward pass of a batch of the run's size.
        parameters: The numbers of weights that train, and of all.
    """

    seconds: float
    batch_size: int
    weights: int
    trained: int
    activations: int
    parameters: tuple[int, int]

    @property
    def memory(self) -> int:
        """Bytes of all of it."""
        return self.weights + self.trained + self.activations


def try_steps(
    model: SentenceTransformer,
    settings: RunSettings,
    queries: Sequence[str],
    documents: Sequence[str],
    *,
    seconds: float,
) -> StepCost:
    """Train a copy of the model for a few steps, first with very few rows a batch, then as many as the time allows.

    Args:
        model: The base model; it stays as it is.
        settings: The run's.
        queries: Texts that may stand for anchors and the queries of negatives.
        documents: Texts that may stand for positives and negatives.
        seconds: How long the trial may take, about.
    """
    trial = copy.deepcopy(model)
    trial.model_card_data.generate_widget_examples = False  # its card is never written
    trainable = prepare_model(trial, settings)
    rows = _rows(settings, queries, documents)
    weights = {parameter.untyped_storage().data_ptr() for parameter in trial.parameters()}
    few = min(QUERIES_PER_DOCUMENT, settings.rows_in_batch) if settings.of_documents else 1  # they share one document
    least = more = _try(trial, settings, rows, few, weights)
    # What a step takes besides its rows, the optimizer's part, counts once: so a larger batch is tried too, unless so
    # few rows take so long that it hardly matters.
    affordable = few * int(seconds / (least.seconds * (STEPS + 1)))
    if least.seconds <= LONG_ROW * seconds and few < settings.rows_in_batch:
        more = _try(trial, settings, rows, min(settings.rows_in_batch, max(2 * few, affordable)), weights)
    trained = [parameter for parameter in trial.parameters() if parameter.requires_grad]

    def together(rows: int) -> int:
        return min(rows, settings.mini_batch_size or rows)

    return StepCost(
        _at(settings.rows_in_batch, (least.rows, least.seconds), (more.rows, more.seconds)),
        more.rows,
        sum(parameter.nbytes for parameter in trial.parameters()),
        sum(parameter.nbytes + ADAM_BYTES * parameter.numel() for parameter in trained),
        round(_at(together(settings.rows_in_batch), (together(few), least.kept), (together(more.rows), more.kept))),
        (trainable.trainable, trainable.total),
    )


def _at(rows: int, few: tuple[int, float], more: tuple[int, float]) -> float:
    """A figure for so many rows, on the line through those for fewer and for more; through 0 where both are one."""
    if more[0] == few[0]:
        return few[1] / few[0] * rows
    return few[1] + max(0.0, more[1] - few[1]) / (more[0] - few[0]) * (rows - few[0])


def _rows(settings: RunSettings, queries: Sequence[str], documents: Sequence[str]) -> Dataset:
    """As many rows as the trials need, in the columns of a run's."""
    from datasets import Dataset

    number = settings.rows_in_batch * (STEPS + 1)
    times = QUERIES_PER_DOCUMENT if settings.of_documents else 1
    asked = itertools.cycle(queries)
    answering = itertools.cycle([text for text in documents for _ in range(times)])

    def column(texts: Any) -> list[str]:
        return list(itertools.islice(texts, number))

    columns: dict[str, Any] = {"anchor": column(asked), "positive": column(answering)}
    for place in range(1, settings.negatives_in_rows + 1):
        columns[f"negative_{place}"] = column(answering)
    weights = settings.negatives_in_rows * settings.queries_in_rows
    for place in range(1, weights + 1):
        columns[f"negative_query_{place}"] = column(asked)
    if weights:
        columns["label"] = [[1.0] * weights] * number
    return Dataset.from_dict(columns)


class _Trial(NamedTuple):
    """What a step of so many rows takes: seconds, and the bytes that autograd keeps meanwhile."""

    rows: int
    seconds: float
    kept: int


def _try(
    model: SentenceTransformer, settings: RunSettings, rows: Dataset, batch_size: int, weights: set[int]
) -> _Trial:
    saved = _SavedBytes(weights)
    with torch.autograd.graph.saved_tensors_hooks(saved.pack, saved.unpack):
        return _Trial(batch_size, _seconds_a_step(model, settings, rows, batch_size), saved.most)


def _seconds_a_step(model: SentenceTransformer, settings: RunSettings, rows: Dataset, batch_size: int) -> float:
    steps = STEPS + 1
    own = {**settings.training_arg, "max_steps": steps, "save_strategy": "no", "eval_strategy": "no"}
    own |= {"disable_tqdm": True, "logging_strategy": "no", "gradient_accumulation_steps": 1, "push_to_hub": False}
    trying = dataclasses.replace(settings, batch_size=batch_size, training_arg=own)
    clock = _Clock()
    with tempfile.TemporaryDirectory() as folder:
        trainer = make_trainer(model, {"trial": rows}, trying, Path(folder))
        trainer.remove_callback(PrinterCallback)
        trainer.add_callback(clock)
        trainer.train()
    return min(clock.steps[1:])  # the first one allocates, and others on the machine only ever make it longer


class _Clock(TrainerCallback):
    """Times each step."""

    def __init__(self) -> None:
        self.steps: list[float] = []

    def on_step_begin(self, *arguments: Any, **kwargs: Any) -> None:
        self._wait()
        self._begun = time.perf_counter()

    def on_step_end(self, *arguments: Any, **kwargs: Any) -> None:
        self._wait()
        self.steps.append(time.perf_counter() - self._begun)

    @staticmethod
    def _wait() -> None:
        if torch.cuda.is_available():
            torch.cuda.synchronize()


class _SavedBytes:
    """Counts what autograd keeps for the backward pass, while it does.

    Args:
        apart: The storages that are there anyway: the weights'.
    """

    def __init__(self, apart: set[int]) -> None:
        self._apart = apart
        self._held: Counter[int] = Counter()
        self._bytes = 0
        self.most = 0

    def pack(self, tensor: Tensor) -> Any:
        """Note a tensor that is kept."""
        storage = tensor.untyped_storage()
        place, size = storage.data_ptr(), storage.nbytes()
        if place in self._apart:
            return tensor
        self._held[place] += 1
        if self._held[place] == 1:
            self._bytes += size
            self.most = max(self.most, self._bytes)
        return _Kept(tensor, lambda: self._let_go(place, size))

    def unpack(self, kept: Any) -> Tensor:
        """The tensor, for the backward pass."""
        tensor: Tensor = kept.tensor if isinstance(kept, _Kept) else kept
        return tensor

    def _let_go(self, place: int, size: int) -> None:
        self._held[place] -= 1
        if not self._held[place]:
            self._bytes -= size


class _Kept:
    """A tensor that reports when its last reference is gone."""

    def __init__(self, tensor: Tensor, let_go: Callable[[], None]) -> None:
        self.tensor = tensor
        self._let_go = let_go

    def __del__(self) -> None:
        self._let_go()
