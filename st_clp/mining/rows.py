"""Training rows: a query, its positive, its hard negatives, and the queries that those negatives answer."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from st_clp.data.checks import CollectionError
from st_clp.data.corpus import read_jsonl
from st_clp.files import whole_file

if TYPE_CHECKING:
    from datasets import Dataset


GIVEN = "given"  # the source of a query in a file that does not say
DETAIL_COLUMNS = [
    "query_id",
    "positive_id",
    "positive_score",
    "negative_ids",
    "negative_ranks",
    "negative_scores",
    "negative_sources",
    "negative_query_sources",
]


@dataclass(frozen=True)
class Negative:
    """A hard negative of one row.

    Attributes:
        doc_id: Its id in the corpus.
        text: Its text.
        rank: Its place in the ranking without the relevant documents, from 0; None if it was not ranked.
        score: Its similarity to the row's query, or a cross-encoder's score; None if it was not ranked.
        source: How it was chosen: ``"ranking"``, ``"judged"``, ``"relaxed"`` (a filter refused it, but there was no
            other) or ``"random"``.
        queries: Queries that it answers, none of them the row's own.
        query_sources: Where each of those comes from: ``"judgments"``, ``"local"``, ``"openai"``, ``"title"``,
            ``"lead"``; ``"given"`` in a file that does not say.
        query_weights: The weight of each in the loss's penalty; 1 by default.

    Raises:
        ValueError: There is not one source and one weight for each query.
    """

    doc_id: str
    text: str
    rank: int | None
    score: float | None
    source: str
    queries: tuple[str, ...] = ()
    query_sources: tuple[str, ...] = ()
    query_weights: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        for name, default in (("query_sources", GIVEN), ("query_weights", 1.0)):
            marks = getattr(self, name)
            if not marks:
                object.__setattr__(self, name, (default,) * len(self.queries))
            elif len(marks) != len(self.queries):
                raise ValueError(f"document {self.doc_id!r}: {len(self.queries)} queries and {len(marks)} {name}")


@dataclass(frozen=True)
class TrainingRow:
    """A query, one relevant document, and hard negatives.

    Attributes:
        query_id: The query's id.
        query: Its text.
        positive_id: The relevant document's id.
        positive: Its text.
        positive_score: The model's similarity of the two.
        negatives: The hard negatives.
    """

    query_id: str
    query: str
    positive_id: str
    positive: str
    positive_score: float
    negatives: tuple[Negative, ...] = field(default=())


def to_dataset(
    rows: Iterable[TrainingRow],
    *,
    num_negatives: int,
    queries_per_negative: int = 1,
    details: bool = False,
    description: str = "",
) -> Dataset:
    """The columns that CLPLoss reads, as a ``datasets.Dataset``.

    Columns, in order: ``anchor``, ``positive``, ``negative_1`` … ``negative_n``, then the queries of the negatives,
    m for each in order, and ``label``: for each of those n·m queries its weight, or 0 where the negative has no known
    query (its column then holds an empty text). Without negative queries (m = 0) there is no label.

    A row with fewer negatives than columns has its positive in the others, with weight 0: CLPLoss, which knows a copy
    of the positive by its text, never takes it for this row's negative. To the other rows of a batch it is one more
    copy of an in-batch negative.

    Args:
        rows: The rows.
        num_negatives: n.
        queries_per_negative: m.
        details: Add ``query_id``, ``positive_id``, ``positive_score``, and for each row's negatives lists of their
            ``negative_ids``, ``negative_ranks``, ``negative_scores``, ``negative_sources`` and
            ``negative_query_sources``. No loss reads these: take them out before training
            (``dataset.remove_columns(DETAIL_COLUMNS)``).
        description: Kept as ``dataset.info.description``.
    """
    from datasets import Dataset, DatasetInfo

    kept = list(rows)
    columns = columns_of(kept, num_negatives=num_negatives, queries_per_negative=queries_per_negative)
    if details:
        found = [_details(row) for row in kept]
        columns |= {name: [detail[name] for detail in found] for name in DETAIL_COLUMNS}
    return Dataset.from_dict(columns, info=DatasetInfo(description=description))


def columns_of(
    rows: Iterable[TrainingRow], *, num_negatives: int, queries_per_negative: int = 1
) -> dict[str, list[Any]]:
    """The columns of :func:`to_dataset` without the details, name to values."""
    columns: dict[str, list[Any]] = {"anchor": [], "positive": []}
    for n in range(1, num_negatives + 1):
        columns[f"negative_{n}"] = []
    for n in range(1, num_negatives + 1):
        for m in range(1, queries_per_negative + 1):
            columns[query_column(n, m, queries_per_negative)] = []
    weighted = bool(num_negatives and queries_per_negative)
    if weighted:
        columns["label"] = []
    for row in rows:
        columns["anchor"].append(row.query)
        columns["positive"].append(row.positive)
        weights: list[float] = []
        for n in range(1, num_negatives + 1):
            negative = row.negatives[n - 1] if n <= len(row.negatives) else None
            columns[f"negative_{n}"].append(negative.text if negative else row.positive)
            known = negative.queries[:queries_per_negative] if negative else ()
            for m in range(1, queries_per_negative + 1):
                columns[query_column(n, m, queries_per_negative)].append(known[m - 1] if m <= len(known) else "")
                weights.append(negative.query_weights[m - 1] if negative and m <= len(known) else 0.0)
        if weighted:
            columns["label"].append(weights)
    return columns


def _details(row: TrainingRow) -> dict[str, Any]:
    return {
        "query_id": row.query_id,
        "positive_id": row.positive_id,
        "positive_score": row.positive_score,
        "negative_ids": [negative.doc_id for negative in row.negatives],
        "negative_ranks": [negative.rank for negative in row.negatives],
        "negative_scores": [negative.score for negative in row.negatives],
        "negative_sources": [negative.source for negative in row.negatives],
        "negative_query_sources": [list(negative.query_sources) for negative in row.negatives],
    }


def query_column(negative: int, query: int, queries_per_negative: int) -> str:
    """The name of the column of a negative's query, both counted from 1."""
    return f"negative_query_{negative}" if queries_per_negative == 1 else f"negative_query_{negative}_{query}"


def require_writable(path: str | os.PathLike[str]) -> None:
    """Make the folder of an output file, and check that it can be written.

    Raises:
        OSError: The folder cannot be made or written, or the path of the file is a folder.
    """
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    if target.is_dir():
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(target))
    # Opening and leaving a file shows whether it can be written, and removes what killed writers left.
    with suppress(_OnlyTried), whole_file(target):
        raise _OnlyTried


class _OnlyTried(Exception):
    pass


def write_rows(path: str | os.PathLike[str], rows: Iterable[TrainingRow]) -> int:
    """Write rows as JSON lines in the format of the paper's code, with ids, ranks and scores beside.

    ``query``, ``pos``, ``neg`` and ``neg_q`` are what the paper's code reads, and
    :meth:`st_clp.Collection.load` too, which also minds ``neg_q_source`` and ``neg_q_weight``, a list for each
    negative. The file appears whole or not at all.

    Returns:
        How many rows there were.
    """
    number = 0
    try:
        with whole_file(path) as file:
            for row in rows:
                file.write(json.dumps(_to_json(row), ensure_ascii=False) + "\n")
                number += 1
    except OSError as error:
        # A failed write does not say which file.
        raise OSError(error.errno, error.strerror, os.fspath(path)) from error
    return number


def read_rows(path: str | os.PathLike[str]) -> list[TrainingRow]:
    """Read what :func:`write_rows` wrote.

    Raises:
        CollectionError: A line does not belong to such a file; the message names file and line.
    """
    found = []
    for number, row in read_jsonl(Path(path)):
        try:
            found.append(_from_json(row))
        except (KeyError, TypeError, ValueError, IndexError, AttributeError) as error:
            what = f"it has no {error}" if isinstance(error, KeyError) else str(error)
            raise CollectionError(
                f"{path}, line {number}: this is no file that st-clp mine wrote, or it was changed since ({what}); "
                "mine again, or name another file"
            ) from error
    return found


def _to_json(row: TrainingRow) -> dict[str, Any]:
    return {
        "query": row.query,
        "pos": [row.positive],
        "neg": [negative.text for negative in row.negatives],
        "neg_q": [_query_entry(negative.queries) for negative in row.negatives],
        "query_id": row.query_id,
        "pos_id": row.positive_id,
        "pos_score": row.positive_score,
        "neg_id": [negative.doc_id for negative in row.negatives],
        "neg_rank": [negative.rank for negative in row.negatives],
        "neg_score": [negative.score for negative in row.negatives],
        "neg_source": [negative.source for negative in row.negatives],
        "neg_q_source": [list(negative.query_sources) for negative in row.negatives],
        "neg_q_weight": [list(negative.query_weights) for negative in row.negatives],
    }


def _query_entry(queries: tuple[str, ...]) -> str | list[str] | None:
    """A text, as the paper's code has it; a list where there are several; null where there is none."""
    if len(queries) > 1:
        return list(queries)
    return queries[0] if queries else None


def _from_json(row: dict[str, Any]) -> TrainingRow:
    for name in ("neg", "pos", "neg_id", "neg_rank", "neg_score", "neg_source", "neg_q"):
        if not isinstance(row[name], list):
            raise TypeError(f"{name!r} must be a list, not {type(row[name]).__name__}")
    texts = [row["query"], row["query_id"], row["pos_id"], *row["pos"], *row["neg"], *row["neg_id"]]
    if not all(isinstance(text, str) for text in texts):
        raise TypeError("queries, documents and ids must be texts")
    number = len(row["neg"])
    nothing: list[list[Any]] = [[] for _ in range(number)]  # files from before there were marks
    negatives = zip(
        row["neg_id"],
        row["neg"],
        row["neg_rank"],
        row["neg_score"],
        row["neg_source"],
        [tuple([known] if isinstance(known, str) else known or ()) for known in row["neg_q"]],
        map(tuple, row.get("neg_q_source", nothing)),
        map(tuple, row.get("neg_q_weight", nothing)),
        strict=True,
    )
    return TrainingRow(
        query_id=row["query_id"],
        query=row["query"],
        positive_id=row["pos_id"],
        positive=row["pos"][0],
        positive_score=row["pos_score"],
        negatives=tuple(Negative(*values) for values in negatives),
    )
