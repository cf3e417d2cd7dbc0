"""The rows that are trained on while their negatives are refreshed: their names, columns and numbers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from st_clp.data import Collection
from st_clp.mining.rows import DETAIL_COLUMNS, query_column
from st_clp.options import MiningOptions

if TYPE_CHECKING:
    from datasets import Dataset, DatasetDict

ROW = "row"
"""The column of a training set that says which row of a generation belongs to it."""

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
