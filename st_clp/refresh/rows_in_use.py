"""The rows in use: the training set, the generations of its negatives, and batches of them.

A generation is the rows that one refresh mined, as Arrow files in a folder, read through a memory map. They are in the
order of the training set, one file for each collection, so a row has the same number in every generation. Every process
that builds batches, data loader workers included, maps the same files.

A data loader builds batches ahead: one in the Trainer's own loop, and more in worker processes. When negatives change
between two steps, the waiting batches have the old ones. So a batch records its generation, and if negatives have
changed by the time it is used, it is built again from the same rows. The sampler chooses the rows of a batch and never
sees refreshed negatives.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import uuid
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import torch
from accelerate.utils import send_to_device
from torch.utils.data._utils.pin_memory import pin_memory

from st_clp.data import Collection
from st_clp.files import remove_leftovers_in, whole_folder, write_json
from st_clp.mining.miner import mine
from st_clp.mining.rows import DETAIL_COLUMNS, TrainingRow, query_column, to_dataset
from st_clp.options import MiningOptions
from st_clp.refresh.history import account_of

if TYPE_CHECKING:
    from datasets import Dataset, DatasetDict
    from sentence_transformers import SentenceTransformer


BLOCK = 1024  # rows that are written together
ACCOUNT = "account.json"
_DETAIL_TYPES = {
    "query_id": pa.string(),
    "positive_id": pa.string(),
    "positive_score": pa.float64(),
    "negative_ids": pa.list_(pa.string()),
    "negative_ranks": pa.list_(pa.int64()),
    "negative_scores": pa.list_(pa.float64()),
    "negative_sources": pa.list_(pa.string()),
    "negative_query_sources": pa.list_(pa.list_(pa.string())),
}


class Generation:
    """The rows of one refresh, of all collections one after the other.

    Args:
        folder: Where :func:`write_generation` wrote them.
        collections: How many collections there are.

    Raises:
        FileNotFoundError: The generation does not exist or is incomplete.
    """

    def __init__(self, folder: Path, collections: int) -> None:
        if not is_whole(folder):
            raise FileNotFoundError(f"{folder} holds no negatives of a refresh")
        self.parts = [_open(folder / f"{number}.arrow") for number in range(collections)]
        self._starts = [0]
        for part in self.parts:
            self._starts.append(self._starts[-1] + len(part))

    def __len__(self) -> int:
        return self._starts[-1]

    def row(self, number: int) -> dict[str, Any]:
        """One row by its number, counted through all collections: column to value."""
        part = next(i for i, start in enumerate(self._starts[1:]) if number < start)
        return self.parts[part].slice(number - self._starts[part], 1).to_pylist()[0]


def is_whole(folder: Path) -> bool:
    """Whether a complete generation is in this folder."""
    return (folder / ACCOUNT).is_file()


def read_account(folder: Path) -> dict[str, Any]:
    """The statistics of a generation: seconds, and :func:`account_of` for each collection."""
    return json.loads((folder / ACCOUNT).read_text(encoding="utf-8"))


def write_first(folder: Path, datasets: Mapping[str, Dataset]) -> None:
    """Write the rows that training begins with.

    Args:
        folder: The folder; written atomically.
        datasets: Collection name to rows with their details.
    """
    with whole_folder(folder) as unfinished:
        _write_datasets(unfinished, datasets)


def _write_datasets(folder: Path, datasets: Mapping[str, Dataset]) -> None:
    accounts = {}
    for number, (name, dataset) in enumerate(datasets.items()):
        target = folder / f"{number}.arrow"
        blocks = (dataset[begin : begin + BLOCK] for begin in range(0, len(dataset), BLOCK))
        rows = ([dict(zip(block, row, strict=True)) for row in zip(*block.values(), strict=True)] for block in blocks)
        _write(target, _schema(dataset.column_names), rows)
        accounts[name] = account_of(_open(target), None, kept=0)
    write_json(folder / ACCOUNT, {"seconds": 0.0, "collections": accounts}, indent=None)


def mine_generation(
    model: SentenceTransformer,
    collections: Mapping[str, Collection],
    options: MiningOptions,
    mining: Mapping[str, Any],
    *,
    previous: Path,
    folder: Path,
    stores: Path,
) -> None:
    """Mine with a model, and write the negatives of the training set's rows.

    Args:
        model: The model; it is left in evaluation mode.
        collections: Collection name to what its rows are of, in the order of the training set.
        options: What to mine.
        mining: Further arguments of :func:`st_clp.mining.mine`.
        previous: The generation in use, which says which rows there are.
        folder: Where to write; it appears whole or not at all.
        stores: Folder for the embeddings, so that stopped mining can be resumed.
    """
    before = Generation(previous, len(collections))
    # The training set has its rows already: which of a query's positives it took must not change with the model.
    options = replace(options, max_positives_per_query=None)
    with whole_folder(folder) as unfinished:
        accounts: dict[str, Any] = {}
        seconds: dict[str, float] = {}
        for number, (name, collection) in enumerate(collections.items()):
            mined = mine(
                model,
                collection,
                options,
                store_dir=stores / _short(collection.corpus_name),
                **{"show_progress_bar": False, **mining},
            )
            found = {(row.query_id, row.positive_id): row for row in mined.rows}
            part = before.parts[number]
            kept = 0
            columns = [column for column in part.column_names if column not in DETAIL_COLUMNS]

            def blocks(
                part: pa.Table = part, found: dict[tuple[str, str], TrainingRow] = found, columns: list[str] = columns
            ) -> Iterator[list[dict[str, Any]]]:
                nonlocal kept
                for begin in range(0, len(part), BLOCK):
                    rows = part.slice(begin, BLOCK).to_pylist()
                    at = [i for i, row in enumerate(rows) if (row["query_id"], row["positive_id"]) in found]
                    kept += len(rows) - len(at)
                    fresh = [found[rows[i]["query_id"], rows[i]["positive_id"]] for i in at]
                    for i, row in zip(at, _as_columns(fresh, options), strict=True):
                        # Only what the dataset has: a training set without labels stays one.
                        rows[i] = {column: row[column] for column in [*columns, *DETAIL_COLUMNS]}
                    yield rows

            target = unfinished / f"{number}.arrow"
            _write(target, part.schema, blocks())
            accounts[name] = account_of(_open(target), part, kept=kept)
            for what, spent in mined.account.seconds.items():
                seconds[what] = seconds.get(what, 0.0) + spent
        account = {"seconds": round(sum(seconds.values()), 3), "collections": accounts}
        write_json(unfinished / ACCOUNT, account, indent=None)


def _as_columns(rows: Sequence[TrainingRow], options: MiningOptions) -> list[dict[str, Any]]:
    if not rows:
        return []
    dataset = to_dataset(
        rows,
        num_negatives=options.num_negatives,
        queries_per_negative=options.queries_per_negative,
        details=True,
    )
    return dataset.to_list()


def _schema(columns: Sequence[str]) -> pa.Schema:
    types = {"label": pa.list_(pa.float64()), **_DETAIL_TYPES}
    return pa.schema([(column, types.get(column, pa.string())) for column in columns])


def _write(path: Path, schema: pa.Schema, blocks: Iterator[list[dict[str, Any]]]) -> None:
    with pa.OSFile(str(path), "wb") as file, pa.ipc.new_file(file, schema) as writer:
        for rows in blocks:
            writer.write_batch(pa.RecordBatch.from_pylist(rows, schema=schema))


def _open(path: Path) -> pa.Table:
    return pa.ipc.open_file(pa.memory_map(str(path))).read_all()


def _short(name: str) -> str:
    """A corpus's name as a path component; never parsed back."""
    return hashlib.blake2b(name.encode("utf-8", "surrogatepass"), digest_size=8).hexdigest()


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


ROW = "row"
"""The column of a training set that says which row of a generation belongs to it."""

Features = list[dict[str, Any]]


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
        self._content = pin_memory(self._content)
        return self


ONLY = "collection"  # the name of a collection that needs none


def named(
    collections: Collection | Mapping[str, Collection], rows: Dataset | Mapping[str, Dataset]
) -> tuple[dict[str, Collection], dict[str, Dataset]]:
    """Collections and rows by name, in the same order.

    Raises:
        ValueError: They do not match, or the rows lack the detail columns.
    """
    if isinstance(collections, Collection) != (not isinstance(rows, Mapping)):
        raise ValueError("give one collection and its rows, or two mappings with the same names")
    found = {ONLY: collections} if isinstance(collections, Collection) else dict(collections)
    sets: dict[str, Dataset] = dict(rows) if isinstance(rows, Mapping) else {ONLY: rows}
    if set(found) != set(sets) or not found:
        raise ValueError(
            f"collections and rows must have the same names, got {', '.join(found) or 'none'} and "
            f"{', '.join(sets) or 'none'}"
        )
    first = next(iter(sets.values())).column_names
    for name, dataset in sets.items():
        missing = [column for column in DETAIL_COLUMNS if column not in dataset.column_names]
        if missing:
            raise ValueError(
                f"the rows of {name} have no {', '.join(missing)}, which say what to refresh: mine them with "
                "mine_hard_negatives(…, output_details=True)"
            )
        if dataset.column_names != first:
            raise ValueError(f"the rows of {name} have other columns than those of {next(iter(sets))}")
    return {name: found[name] for name in sets}, sets


def mining_options_of(rows: Mapping[str, Dataset], options: MiningOptions | None) -> MiningOptions:
    """The options, with the rows' numbers of negatives and queries.

    Raises:
        ValueError: The options do not fit the rows' columns.
    """
    columns = [column for column in next(iter(rows.values())).column_names if column not in DETAIL_COLUMNS]
    negatives = sum(c.startswith("negative_") and c.removeprefix("negative_").isdigit() for c in columns)
    queries = sum(column.startswith("negative_query_") for column in columns)
    each = queries // negatives if negatives else 0
    if options is None:
        return MiningOptions(num_negatives=negatives, queries_per_negative=each)
    wanted = [f"negative_{n}" for n in range(1, options.num_negatives + 1)]
    m = options.queries_per_negative
    wanted += [query_column(n, q, m) for n in range(1, options.num_negatives + 1) for q in range(1, m + 1)]
    if wanted != [column for column in columns if column.startswith("negative_")]:
        raise ValueError(
            f"the rows have {negatives} negatives with {each} queries each, and the options ask for "
            f"{options.num_negatives} with {options.queries_per_negative}"
        )
    return options


def columns_to_refresh(rows: Mapping[str, Dataset]) -> list[str]:
    """The columns that a refresh replaces: negatives, their queries and weights."""
    columns = next(iter(rows.values())).column_names
    return [c for c in columns if c not in DETAIL_COLUMNS and (c.startswith("negative_") or c == "label")]


def to_train_on(rows: Mapping[str, Dataset]) -> Dataset | DatasetDict:
    """The rows with the columns that a loss reads, and their numbers across all collections."""
    from datasets import DatasetDict

    sets, start = {}, 0
    for name, dataset in rows.items():
        numbers = list(range(start, start + len(dataset)))
        sets[name] = dataset.remove_columns(DETAIL_COLUMNS).add_column(ROW, numbers)
        start += len(dataset)
    return sets[ONLY] if list(sets) == [ONLY] else DatasetDict(sets)
