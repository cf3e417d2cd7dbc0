"""The generations of a training set's negatives on disk: the rows that each refresh mined.

A generation is a folder of Arrow files, read through a memory map. They are in the order of the training set, one file
for each collection, so a row has the same number in every generation. Every process that builds batches, data loader
workers included, maps the same files.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa

from st_clp.data import Collection
from st_clp.files import whole_folder, write_json
from st_clp.mining.miner import mine
from st_clp.mining.rows import DETAIL_COLUMNS, TrainingRow, to_dataset
from st_clp.options import MiningOptions
from st_clp.refresh.history import account_of

if TYPE_CHECKING:
    from datasets import Dataset
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
        folder: Where :func:`write_first` or :func:`mine_generation` wrote them.
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
