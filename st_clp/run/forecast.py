"""Forecast a run from a sample of its texts and a few timed batches: each stage's time, memory and disk."""

from __future__ import annotations

import itertools
import shutil
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import psutil
import torch
from rich.console import Console
from sentence_transformers import SentenceTransformer
from tqdm.auto import tqdm

from st_clp.data import Collection, Corpus
from st_clp.encoding.building import Builder
from st_clp.encoding.encode import sample_of, token_counts, tokens_a_second
from st_clp.mining.estimate import search_seconds
from st_clp.options import Encoding
from st_clp.queries.own_text import is_made
from st_clp.run.averaging import number_held_out
from st_clp.run.folder import EVALUATE_AFTER, EVALUATE_BEFORE, MINE, STAGES, TRAIN, RunDirectory
from st_clp.run.splits import Collections
from st_clp.run.training import number_of_steps
from st_clp.run.training_trial import StepCost, try_steps
from st_clp.settings import RunSettings
from st_clp.terminal import duration, size

FIRST = 20_000  # documents that the sample is drawn from: reading all may take longer than the trial
TRIAL_SECONDS = 5.0  # for encoding, and for training
DEPTH = 100  # of the search when evaluating
LONG = 30 * 60.0  # seconds from which on it is said what would shorten the run
CHECKPOINTS = 2  # that are kept at a time
# Below so many operations a trial is not worth its time: any CPU does them in seconds.
TRIFLE = 2e11


@dataclass(frozen=True)
class StageCost:
    """The forecast of a stage.

    Attributes:
        name: The stage.
        seconds: Its time; None if it is finished.
        work: A description of the work.
    """

    name: str
    seconds: float | None
    work: str


@dataclass(frozen=True)
class Forecast:
    """The forecast of a run.

    Attributes:
        stages: In order.
        step: The cost of a training step; None if training is finished.
        disk: The most bytes that the run will take.
        disk_free: Free bytes in the run's folder.
        memory_free: Free bytes on the model's device.
        shorter: How the run could be shortened.
        left_out: What the figures do not include.
    """

    stages: tuple[StageCost, ...]
    step: StepCost | None
    disk: int
    disk_free: int
    memory_free: int
    shorter: tuple[str, ...]
    left_out: tuple[str, ...]

    @property
    def seconds(self) -> float:
        """The time of everything that is still to be done."""
        return sum(stage.seconds or 0.0 for stage in self.stages)

    def __str__(self) -> str:
        wide = max(len(stage.name) for stage in self.stages)
        lines = []
        for stage in self.stages:
            taken = "finished" if stage.seconds is None else duration(stage.seconds)
            lines.append(f"{stage.name.replace('-', ' '):{wide}}  {taken:>8}  {stage.work}".rstrip())
        lines.append(f"{'in all':{wide}}  {duration(self.seconds):>8}  {size(self.disk)} on disk, {self._free_disk()}")
        if self.step is not None:
            step = self.step
            lines.append(
                f"memory to train: {size(step.memory)} (weights {size(step.weights)}, gradients and optimizer "
                f"{size(step.trained)}, a batch {size(step.activations)}), of {size(self.memory_free)} that are free"
                + ("; give --mini-batch-size 4, or a smaller --batch-size" if step.memory > self.memory_free else "")
            )
        lines += [f"not in these figures: {work}" for work in self.left_out]
        if self.shorter and self.seconds > LONG:
            lines.append(f"shorter: {'; '.join(self.shorter)}")
        return "\n".join(lines)

    def _free_disk(self) -> str:
        short = ": free some, or name another --output" if self.disk > self.disk_free else ""
        return f"{size(self.disk_free)} free{short}"


def is_trifle(model: SentenceTransformer, settings: RunSettings, collections: Collections) -> bool:
    """Whether the whole run takes only seconds on any machine, so that a trial would be a large part of it."""
    longest = model.max_seq_length or 512
    texts = sum(collection.corpus.expected_size() or FIRST for collection in collections.evaluate)
    columns = 2 + settings.negatives_in_rows * (1 + settings.queries_in_rows)
    trained = sum(_rows(settings, collection) for collection in collections.train) * columns * settings.number_of_epochs
    parameters = sum(parameter.numel() for parameter in model.parameters())
    return 2.0 * parameters * longest * (2 * texts + 3 * trained) < TRIFLE


def forecast(
    settings: RunSettings, collections: Collections, model: SentenceTransformer, directory: RunDirectory
) -> Forecast:
    """Forecast what is left to do of a run. Nothing is written, and the model is not changed.

    Args:
        settings: The run's.
        collections: What it trains and evaluates on.
        model: The base model.
        directory: The run's folder, which need not exist.
    """
    return _Forecaster(settings, collections, model, directory).forecast()


class _Forecaster:
    def __init__(
        self, settings: RunSettings, collections: Collections, model: SentenceTransformer, directory: RunDirectory
    ) -> None:
        self._settings = settings
        self._collections = collections
        self._model = model
        self._directory = directory
        self._encoding = Encoding.of(settings, show_progress_bar=False)
        self._done = {name for name in STAGES if directory.finished(name) is not None}
        self._texts = {corpus.name: _Texts(model, corpus, settings.seed) for corpus in self._corpora()}
        self._queries = _some_queries(collections.train, settings.seed)
        mined, evaluated = (
            float(token_counts(model, queries, "query").mean())
            for queries in (self._queries, _some_queries(collections.evaluate, settings.seed))
        )
        self._query_tokens = {MINE: mined, EVALUATE_BEFORE: evaluated, EVALUATE_AFTER: evaluated}
        documents = [text for texts in self._texts.values() for text in texts.sample]
        self._rate = tokens_a_second(model, documents, self._encoding, seconds=TRIAL_SECONDS)
        self._documents = documents

    def forecast(self) -> Forecast:
        step = None
        if TRAIN not in self._done:
            step = try_steps(self._model, self._settings, self._queries, self._documents, seconds=TRIAL_SECONDS)
        stages = [StageCost(name, None, "") if name in self._done else self._stage(name, step) for name in STAGES]
        device = self._model.device
        free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else psutil.virtual_memory().available
        return Forecast(
            tuple(stages),
            step,
            self._disk(step),
            _free(self._directory.path),
            free,
            tuple(self._shorter(stages)),
            tuple(self._left_out()),
        )

    def _corpora(self) -> list[Corpus]:
        both = (*self._collections.train, *self._collections.evaluate)
        return list({collection.corpus_name: collection.corpus for collection in both}.values())

    def _stage(self, name: str, step: StepCost | None) -> StageCost:
        if name == TRAIN:
            assert step is not None
            return self._training(step)
        if name == MINE:
            # What the evaluation has encoded is used again.
            seen = {collection.corpus_name for collection in self._collections.evaluate}
            return self._searching(name, self._collections.train, seen, self._settings.range_max)
        return self._searching(name, self._collections.evaluate, set(), DEPTH)

    def _searching(self, name: str, collections: Sequence[Collection], seen: set[str], depth: int) -> StageCost:
        seconds, documents, queries = 0.0, 0, 0
        for collection in collections:
            texts = self._texts[collection.corpus_name]
            asked = len(collection.positives()) if name == MINE else len(collection.judgments)
            if collection.corpus_name not in seen:
                seen = seen | {collection.corpus_name}
                left = texts.number - (self._already(collection.corpus) if name != EVALUATE_AFTER else 0)
                documents += max(0, left)
                seconds += max(0, left) * texts.tokens / self._rate
            queries += asked
            seconds += asked * self._query_tokens[name] / self._rate
            seconds += search_seconds(self._model, self._builder(collection.corpus).dim, texts.number, asked, depth)
        tokens = np.mean([self._texts[collection.corpus_name].tokens for collection in collections])
        encoded = f"{documents:,} documents of {tokens:.0f} tokens to encode, " if documents else ""
        return StageCost(name, seconds, f"{encoded}{queries:,} queries")

    def _training(self, step: StepCost) -> StageCost:
        settings = self._settings
        rows = [_rows(settings, collection) for collection in self._collections.train]
        steps = number_of_steps(settings, rows)
        asked = [_asked(settings, collection) for collection in self._collections.train]
        if settings.of_documents and sum(asked) < sum(rows):
            steps += number_of_steps(settings, filter(None, asked))  # which come again, by themselves
        seconds = steps * step.seconds
        text = f"{steps:,} steps of {duration(step.seconds)}: about {sum(rows):,} rows, "
        trained, every_weight = (number / 1e6 for number in step.parameters)
        text += f"{settings.rows_in_batch} a batch, {trained:.1f} of {every_weight:.1f} M weights"
        every = settings.steps_between_refreshes
        epochs = int(settings.number_of_epochs)
        refreshes = 0 if every is None else epochs - 1 if every == "epoch" else (steps - 1) // every
        if refreshes > 0 and not settings.refresh_async:
            again = self._searching(MINE, self._collections.train, set(), settings.range_max).seconds
            seconds += refreshes * (again or 0.0)
            text += f", mined again {refreshes} times"
        return StageCost(TRAIN, seconds, text)

    def _builder(self, corpus: Corpus) -> Builder:
        return Builder(self._model, corpus, "document", self._encoding)

    def _already(self, corpus: Corpus) -> int:
        return self._builder(corpus).already_encoded(self._directory.store("before", corpus.name))

    def _disk(self, step: StepCost | None) -> int:
        evaluated = {collection.corpus_name for collection in self._collections.evaluate}
        # The embeddings from before training are removed before those of after are made.
        stores = sum(
            texts.number * self._builder(texts.corpus).stored_bytes
            for texts in self._texts.values()
            if MINE not in self._done or texts.corpus.name in evaluated
        )
        if step is None:
            return stores
        moments = step.trained * 2 // 3  # two of three: the third is the gradients
        return max(stores, CHECKPOINTS * (step.weights + moments)) + step.weights

    def _shorter(self, stages: Sequence[StageCost]) -> Iterator[str]:
        settings = self._settings
        taken = {stage.name: stage.seconds or 0.0 for stage in stages}
        if self._model.device.type == "cpu":
            yield "a GPU"
        lengths = np.concatenate([texts.lengths for texts in self._texts.values()])
        for length in (256, 128):
            share = float(np.minimum(lengths, length).sum() / lengths.sum())
            if share < 0.8:
                yield f"--max-seq-length {length}, {1 - share:.0%} fewer tokens"
        made = sum(map(is_made, self._train_queries()))
        queries = sum(len(collection.positives()) for collection in self._collections.train) - made
        if taken[TRAIN] > 0.3 * sum(taken.values()) and queries >= max(1000, made):
            yield f"--max-train-queries {queries // 2 // 100 * 100}, half of the training"
        if taken[TRAIN] > 0.3 * sum(taken.values()) and settings.negatives_in_rows > 2:
            yield "--num-negatives 2"
        if taken[TRAIN] > 0.3 * sum(taken.values()) and made:
            yield "--sentence-queries with fewer, or 0 to train on the queries that were asked alone"
        if taken[EVALUATE_BEFORE] + taken[EVALUATE_AFTER] > 0.3 * sum(taken.values()):
            yield "--eval-collection with a smaller corpus"

    def _train_queries(self) -> Iterator[str]:
        return (query_id for collection in self._collections.train for query_id in collection.queries)

    def _left_out(self) -> Iterator[str]:
        settings = self._settings
        if settings.ray is not None:
            yield "what the workers of a cluster save: the times are those of this process alone"
        if MINE not in self._done:
            if settings.cross_encoder is not None:
                yield "scoring by the cross-encoder (st-clp mine --dry-run tries it)"
            written = [name for name in settings.negative_queries.split(",") if ":" in name]
            if written:
                yield f"writing queries by {', '.join(written)} (st-clp queries --dry-run counts them)"
            if settings.candidates != "model":
                yield "ranking by BM25"
        if settings.share_of_trained == "auto" and TRAIN not in self._done:
            yield "choosing the share of the base's weights, some evaluations on a tenth of the training queries"
        if self._model.device.type == "cpu" and TRAIN not in self._done:
            yield "freed memory that a process on a CPU keeps, one to two times what training takes"


def _some_queries(collections: Iterable[Collection], seed: int) -> list[str]:
    """A uniform sample of their queries: those made of sentences are longer than those that people ask."""
    return sample_of((query for collection in collections for query in collection.queries.values()), seed)[0]


class _Texts:
    """Statistics of a corpus's texts from a sample."""

    def __init__(self, model: SentenceTransformer, corpus: Corpus, seed: int) -> None:
        self.corpus = corpus
        self.number = _count(corpus)
        first = (document.text for document in itertools.islice(iter(corpus), FIRST))
        self.sample, _ = sample_of(first, seed)
        self.lengths = token_counts(model, self.sample, "document")
        self.tokens = float(self.lengths.mean())


def _count(corpus: Corpus) -> int:
    """The number of documents; counted if the corpus does not know it, and remembered for progress bars."""
    known = corpus.expected_size()
    if known is not None:
        return known
    return sum(1 for _ in tqdm(corpus, desc=f"Counting {corpus.name}", unit=" documents"))


def _rows(settings: RunSettings, collection: Collection) -> int:
    """About how many rows will be trained on: one for each known answer of queries that are not held out."""
    return sum(map(is_made, collection.positives())) + _asked(settings, collection)


def _asked(settings: RunSettings, collection: Collection) -> int:
    """How many of them belong to queries that people asked."""
    asked = [len(found) for query_id, found in collection.positives().items() if not is_made(query_id)]
    held_out = number_held_out(len(asked)) if settings.share_of_trained == "auto" else 0
    return round(sum(asked) * (1 - held_out / max(1, len(asked))))


def _free(folder: Path) -> int:
    there = next(place for place in (folder.absolute(), *folder.absolute().parents) if place.exists())
    return shutil.disk_usage(there).free


def print_forecast(console: Console, found: Forecast) -> None:
    """Print the forecast, indented, as the first lines of a run."""
    console.print("[bold]What it will take[/bold], estimated from a few batches timed on this machine")
    for line in str(found).splitlines():
        console.print(f"  {line}", markup=False, soft_wrap=True)
