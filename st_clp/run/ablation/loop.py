"""A training loop without waiting: texts are tokenised once and stay on the model's device.

It does what sentence-transformers' Trainer does with a run's settings (AdamW, a linear schedule with warm-up, clipped
gradients, bfloat16 by autocast), and needs neither ``datasets`` nor ``accelerate``.
"""

from __future__ import annotations

import hashlib
import json
import math
import random
import shutil
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from sentence_transformers import SentenceTransformer
from torch import Tensor
from tqdm.auto import tqdm

from st_clp.encoding import hardware_has_bf16
from st_clp.encoding.attention import masks_unread
from st_clp.files import read_json, whole_folder, write_json
from st_clp.losses.document_batches import Near, document_batches, near_documents
from st_clp.losses.host_texts import KEY, HostTexts, on_device
from st_clp.memory import HAND_BACK_EVERY, hand_back_freed_memory
from st_clp.mining import TrainingRow
from st_clp.mining.rows import columns_of
from st_clp.run.ablation.variants import Variant
from st_clp.run.modelling import column_kinds, make_loss, prepare_model
from st_clp.run.splits import settle_batches
from st_clp.settings import RunSettings

# Settings that the trained weights do not depend on.
AFTERWARDS = ("average_with_base", "output")


class SharedWeights:
    """Trained weights by the settings that they depend on, for trainings that several variants share.

    Args:
        folder: The folder for the weights, until :meth:`clear`.
        variants: All variants.
    """

    def __init__(self, folder: Path, variants: Sequence[Variant]) -> None:
        self._folder = folder
        times = Counter(_trained_alike(variant.settings, ("learning_rate", "seed")) for variant in variants)
        self._shared = {key for key, number in times.items() if number > 1}

    def load(self, model: SentenceTransformer, settings: RunSettings) -> Trained | None:
        """Load the weights of such a training into the model; None, and no change, if there are none."""
        place = self._place(settings)
        if not (place / "trained.json").is_file():
            return None
        prepare_model(model, settings)
        kept = load_file(place / "weights.safetensors")
        with torch.no_grad():
            for name, tensor in _changed(model).items():
                tensor.copy_(kept[name])
        model.eval()
        return Trained(**read_json(place / "trained.json"))

    def keep(self, model: SentenceTransformer, settings: RunSettings, trained: Trained) -> None:
        """Save the weights of a training, if another variant has the same."""
        if _trained_alike(settings, ("learning_rate", "seed")) not in self._shared:
            return
        with whole_folder(self._place(settings)) as folder:
            weights = {name: tensor.detach().cpu().contiguous() for name, tensor in _changed(model).items()}
            save_file(weights, folder / "weights.safetensors")
            write_json(folder / "trained.json", asdict(trained))

    def clear(self) -> None:
        """Remove all weights."""
        shutil.rmtree(self._folder, ignore_errors=True)

    def _place(self, settings: RunSettings) -> Path:
        return self._folder / _trained_alike(settings)


def _trained_alike(settings: RunSettings, also: Sequence[str] = ()) -> str:
    """A key that is equal for settings with the same training; ``also`` names further settings that may differ."""
    what = {name: value for name, value in settings.to_dict().items() if name not in (*AFTERWARDS, *also)}
    return hashlib.blake2b(json.dumps(what, sort_keys=True).encode(), digest_size=8).hexdigest()


def _changed(model: SentenceTransformer) -> dict[str, Tensor]:
    """The tensors that training changes: trained weights and counts."""
    trained: dict[str, Tensor] = {name: weight for name, weight in model.named_parameters() if weight.requires_grad}
    return trained | dict(model.named_buffers())


Features = dict[str, Any]
Rows = Mapping[str, Sequence[TrainingRow]]
TOKENISE_TOGETHER = 4096


@dataclass(frozen=True)
class Trained:
    """The outcome of a training.

    Attributes:
        steps: The number of steps.
        seconds: The time of the steps, without mining and tokenising.
        losses: The loss of every step.
        peak_memory: The most bytes on the GPU; None elsewhere.
    """

    steps: int
    seconds: float
    losses: list[float]
    peak_memory: int | None


def joined(parts: Sequence[Trained]) -> Trained:
    """The outcome of a training of several parts."""
    return Trained(
        sum(part.steps for part in parts),
        sum(part.seconds for part in parts),
        [loss for part in parts for loss in part.losses],
        max((part.peak_memory for part in parts if part.peak_memory is not None), default=None),
    )


def train(
    model: SentenceTransformer,
    rows: Rows,
    settings: RunSettings,
    *,
    mine_again: Callable[[], Rows] | None = None,
    progress: str | None = None,
) -> Trained:
    """Prepare the model as the settings say, and train it, in place.

    Args:
        model: The base model, or a copy that may be changed.
        rows: Collection to its rows; a batch holds rows of one.
        settings: The run's, with its learning rate.
        mine_again: Called after each epoch but the last, returns the next epoch's rows; None without refreshes.
        progress: The title of the progress bar; None shows none.
    """
    settings = settle_batches(settings, (row.query_id for found in rows.values() for row in found))
    prepare_model(model, settings)
    loss = make_loss(model, settings)
    on_gpu = model.device.type == "cuda"
    if on_gpu:
        torch.cuda.reset_peak_memory_stats(model.device)
    batches = {name: _Batches(model, found, settings) for name, found in rows.items()}
    steps_an_epoch = sum(part.number for part in batches.values())
    steps = max(1, math.ceil(steps_an_epoch * settings.number_of_epochs))
    optimizer, schedule = _optimizer(model, settings, steps)
    generator = random.Random(settings.seed)
    torch.manual_seed(settings.seed)
    losses: list[Tensor] = []
    seconds = 0.0
    model.train()
    bar = tqdm(total=steps, desc=progress, unit=" steps", disable=progress is None, leave=False)
    while len(losses) < steps:
        if losses and mine_again is not None:
            batches = {name: _Batches(model, found, settings) for name, found in mine_again().items()}
            model.train()
        started = time.perf_counter()
        with masks_unread(model) if on_gpu else nullcontext():
            for features, labels in _in_order(batches, generator):
                losses.append(_step(model, loss, features, labels, optimizer, settings))
                schedule.step()
                bar.update()
                if not on_gpu and (len(losses) % HAND_BACK_EVERY == 0 or len(losses) == steps):
                    hand_back_freed_memory()
                if len(losses) == steps:
                    break
        if on_gpu:
            torch.cuda.synchronize(model.device)
        seconds += time.perf_counter() - started
    bar.close()
    model.eval()
    peak = torch.cuda.max_memory_allocated(model.device) if on_gpu else None
    return Trained(steps, seconds, torch.stack(losses).tolist(), peak)


def _step(
    model: SentenceTransformer,
    loss: torch.nn.Module,
    features: list[Features],
    labels: Tensor | None,
    optimizer: torch.optim.Optimizer,
    settings: RunSettings,
) -> Tensor:
    bf16 = settings.bf16 if settings.bf16 is not None else hardware_has_bf16(model.device)
    with torch.autocast(model.device.type, dtype=torch.bfloat16, enabled=bf16):
        value = loss(features, labels)
    value.backward()
    trained = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    most = settings.training_arg.get("max_grad_norm", 1.0)
    if most:
        torch.nn.utils.clip_grad_norm_(trained, most)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    found: Tensor = value.detach().float()
    return found


def _optimizer(
    model: SentenceTransformer, settings: RunSettings, steps: int
) -> tuple[torch.optim.Optimizer, torch.optim.lr_scheduler.LRScheduler]:
    given = settings.training_arg
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    # As in the Trainer, biases and norms' weights do not decay.
    decaying = [parameter for parameter in trained if parameter.ndim > 1]
    others = [parameter for parameter in trained if parameter.ndim <= 1]
    groups = [
        {"params": decaying, "weight_decay": given.get("weight_decay", 0.0)},
        {"params": others, "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(
        [group for group in groups if group["params"]],
        lr=settings.peak_learning_rate,
        betas=(given.get("adam_beta1", 0.9), given.get("adam_beta2", 0.999)),
        eps=given.get("adam_epsilon", 1e-8),
        fused=model.device.type == "cuda",
    )
    warmup = math.ceil(settings.warmup * steps) if settings.warmup < 1 else int(settings.warmup)

    def share(step: int) -> float:
        if step < warmup:
            return step / max(1, warmup)
        return max(0.0, (steps - step) / max(1, steps - warmup))

    return optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, share)


def _in_order(
    batches: Mapping[str, _Batches], generator: random.Random
) -> Iterator[tuple[list[Features], Tensor | None]]:
    """An epoch's batches: each collection's rows in a new order, and the batches of all collections mixed."""
    order = []
    for name in sorted(batches):
        order += [(name, chosen) for chosen in batches[name].shuffled(generator)]
    generator.shuffle(order)
    for name, chosen in order:
        yield batches[name].take(chosen)


class _Batches:
    """A collection's rows, tokenised, in batches."""

    def __init__(self, model: SentenceTransformer, rows: Sequence[TrainingRow], settings: RunSettings) -> None:
        self._size = settings.rows_in_batch
        self._anchors, self._positives = [row.query for row in rows], [row.positive for row in rows]
        self._near: Near | None = None
        if settings.of_documents:
            self._near = near_documents(
                self._positives, [[negative.text for negative in row.negatives] for row in rows]
            )
        columns = columns_of(
            rows, num_negatives=settings.negatives_in_rows, queries_per_negative=settings.queries_in_rows
        )
        labels = columns.pop("label", None)
        self._labels = None if labels is None else torch.tensor(labels, device=model.device)
        prompts = column_kinds(list(columns), model.prompts.get("query"), model.prompts.get("document"))
        tasks = column_kinds(list(columns), "query", "document")
        # Many rows share negatives, and queries of negatives are other rows' anchors.
        by_kind: dict[tuple[str | None, str], list[str]] = {}
        for name, texts in columns.items():
            by_kind.setdefault((prompts.get(name), tasks[name]), []).extend(texts)
        tables = {kind: _Texts(model, texts, *kind) for kind, texts in by_kind.items()}
        self._columns = [
            (tables[prompts.get(name), tasks[name]], tables[prompts.get(name), tasks[name]].places(texts))
            for name, texts in columns.items()
        ]
        self._rows = len(rows)

    @property
    def number(self) -> int:
        """The number of batches."""
        return math.ceil(self._rows / self._size)

    def shuffled(self, generator: random.Random) -> list[list[int]]:
        """The rows of each batch, in a new order."""
        if self._near is not None:
            return document_batches(
                self._anchors, self._positives, self._near, batch_size=self._size, generator=generator
            )
        order = list(range(self._rows))
        generator.shuffle(order)
        return [order[begin : begin + self._size] for begin in range(0, len(order), self._size)]

    def take(self, rows: Sequence[int]) -> tuple[list[Features], Tensor | None]:
        """(the features of each column, labels) of these rows."""
        chosen = torch.tensor(rows)
        features = [table.take(places[chosen]) for table, places in self._columns]
        return features, None if self._labels is None else self._labels[chosen.to(self._labels.device)]


class _Texts:
    """Distinct texts, tokenised once and kept on the model's device."""

    def __init__(self, model: SentenceTransformer, texts: Iterable[str], prompt: str | None, task: str) -> None:
        self._place = {text: place for place, text in enumerate(dict.fromkeys(texts))}
        known = list(self._place)
        parts = [
            model.preprocess(known[begin : begin + TOKENISE_TOGETHER], prompt=prompt, task=task)
            for begin in range(0, len(known), TOKENISE_TOGETHER)
        ]
        if any("input_ids" not in part or part["input_ids"].ndim != 2 for part in parts):
            raise ValueError("an ablation trains models whose texts become tokens; this one's do not")
        width = max(part["input_ids"].shape[1] for part in parts)
        self._from_left = any(not bool(part["attention_mask"][:, 0].all()) for part in parts)
        # What is not a row for each text, such as the prompt's length, is the same for all.
        self._same = {
            name: value for name, value in parts[0].items() if not isinstance(value, Tensor) or value.ndim < 2
        }
        features = {
            name: torch.cat([_widened(part[name], width, self._from_left) for part in parts])
            for name in parts[0]
            if name not in self._same
        }
        self._lengths = features["attention_mask"].sum(dim=1)
        self._host = HostTexts.of(features)
        self._features = {name: value.to(model.device) for name, value in features.items()}

    def places(self, texts: Iterable[str]) -> Tensor:
        """The positions of texts."""
        return torch.tensor([self._place[text] for text in texts])

    def take(self, places: Tensor) -> Features:
        """The features of the texts at these positions, as wide as the longest of them."""
        width = max(1, int(self._lengths[places].max()))
        there = on_device(places.numpy(), next(iter(self._features.values())).device)
        columns = slice(-width, None) if self._from_left else slice(0, width)
        known = {} if self._host is None else {KEY: self._host[places.numpy()]}
        return {**self._same, **{name: value[there, columns] for name, value in self._features.items()}, **known}


def _widened(tensor: Tensor, width: int, from_left: bool) -> Tensor:
    """Pad to the width; the attention mask excludes the padding."""
    more = width - tensor.shape[1]
    return torch.nn.functional.pad(tensor, (more, 0) if from_left else (0, more))
