"""Measure the cost of a training step with a few batches on a copy of the model."""

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

import numpy as np
import torch
from sentence_transformers import SentenceTransformer
from torch import Tensor
from transformers import PrinterCallback, TrainerCallback

from st_clp.encoding.encode import token_counts
from st_clp.losses.document_batches import QUERIES_PER_DOCUMENT
from st_clp.losses.forward import tokens_to_embed
from st_clp.run.modelling import column_kinds, prepare_model
from st_clp.run.training import make_trainer
from st_clp.settings import RunSettings

if TYPE_CHECKING:
    from datasets import Dataset

STEPS = 2  # that are timed, after one that is not
LONG_ROW = 2  # times the trial's seconds
ADAM_BYTES = 8  # its two moments of a parameter


@dataclass(frozen=True)
class StepCost:
    """The cost of a training step.

    Attributes:
        seconds: The time of a step with the run's batch size.
        batch_size: Rows of the largest batch that was tried.
        weights: Bytes of all weights.
        trained: Bytes of gradients and optimizer moments.
        activations: Bytes kept for the backward pass of a batch of the run's size.
        parameters: The number of trained weights, and of all weights.
    """

    seconds: float
    batch_size: int
    weights: int
    trained: int
    activations: int
    parameters: tuple[int, int]

    @property
    def memory(self) -> int:
        """The sum of all bytes."""
        return self.weights + self.trained + self.activations


def try_steps(
    model: SentenceTransformer,
    settings: RunSettings,
    queries: Sequence[str],
    documents: Sequence[str],
    *,
    seconds: float,
) -> StepCost:
    """Train a copy of the model for a few steps, first with very few rows a batch, then with as many as time allows.

    Args:
        model: The base model; it is not changed.
        settings: The run's.
        queries: Sample texts for anchors and queries of negatives.
        documents: Sample texts for positives and negatives.
        seconds: About how long the trial may take.
    """
    trial = copy.deepcopy(model)
    trial.model_card_data.generate_widget_examples = False  # its card is never written
    trainable = prepare_model(trial, settings)
    rows = _rows(settings, queries, documents)
    weights = {parameter.untyped_storage().data_ptr() for parameter in trial.parameters()}
    all_rows = settings.rows_in_batch
    few = min(QUERIES_PER_DOCUMENT, all_rows) if settings.of_documents else 1  # they share one document
    least = more = _try(trial, settings, rows, few, weights)
    # The optimizer's part of a step does not depend on the rows, so a larger batch is tried too, unless few rows take
    # so long that it hardly matters.
    affordable = few * int(seconds / (least.seconds * (STEPS + 1)))
    if least.seconds <= LONG_ROW * seconds and few < all_rows:
        more = _try(trial, settings, rows, min(all_rows, max(2 * few, affordable)), weights)
    trained = [parameter for parameter in trial.parameters() if parameter.requires_grad]
    tokens = {number: _tokens(model, settings, rows, number) for number in {few, more.rows, all_rows}}
    together = {number: min(number, settings.mini_batch_size or number) for number in tokens}
    most = {number: max(_tokens(model, settings, rows, together[number])) for number in tokens}
    mean = {number: float(np.mean(of_batches)) for number, of_batches in tokens.items()}
    return StepCost(
        _at(mean[all_rows], (mean[few], least.seconds), (mean[more.rows], more.seconds)),
        more.rows,
        sum(parameter.nbytes for parameter in trial.parameters()),
        sum(parameter.nbytes + ADAM_BYTES * parameter.numel() for parameter in trained),
        round(_at(most[all_rows], (most[few], least.kept), (most[more.rows], more.kept))),
        (trainable.trainable, trainable.total),
    )


def _at(tokens: float, few: tuple[float, float], more: tuple[float, float]) -> float:
    """Interpolate linearly between the figures for two numbers of tokens; through 0 if these are equal."""
    if more[0] <= few[0]:
        return few[1] / few[0] * tokens
    return few[1] + max(0.0, more[1] - few[1]) / (more[0] - few[0]) * (tokens - few[0])


def _tokens(model: SentenceTransformer, settings: RunSettings, rows: Dataset, number: int) -> list[int]:
    """The tokens of sample batches of so many rows, padding included: larger batches have more of it."""
    found = []
    for begin in range(0, len(rows) - number + 1, number)[: STEPS + 1]:
        columns = rows[begin : begin + number]
        queries: list[str] = []
        documents: list[str] = []
        for name, kind in column_kinds([name for name in columns if name != "label"], "query", "document").items():
            (queries if kind == "query" else documents).extend(columns[name])
        if settings.of_documents:
            documents = sorted(set(documents))
        lengths = token_counts(model, queries, "query"), token_counts(model, documents, "document")
        found.append(max(1, tokens_to_embed(lengths, model.device)))
    return found


def _rows(settings: RunSettings, queries: Sequence[str], documents: Sequence[str]) -> Dataset:
    """Rows for the trials, with the run's columns."""
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
    """The cost of a step of so many rows: seconds, and the bytes that autograd keeps."""

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
    """Counts the bytes that autograd keeps for the backward pass.

    Args:
        apart: Storages that do not count: those of the weights.
    """

    def __init__(self, apart: set[int]) -> None:
        self._apart = apart
        self._held: Counter[int] = Counter()
        self._bytes = 0
        self.most = 0

    def pack(self, tensor: Tensor) -> Any:
        """Record a tensor that is kept."""
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
