"""Run files and results on disk."""

from __future__ import annotations

import csv
import itertools
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from st_clp.files import whole_file
from st_clp.search import is_own_document


def file_part(name: str) -> str:
    """Make a name safe for file names: its last 100 characters, only letters, digits and a few others."""
    return re.sub(r"[^\w.@+-]+", "_", name)[-100:].strip("_.")


def require_columns(path: Path, columns: Sequence[str]) -> None:
    """Refuse to append to a CSV file with other columns.

    Raises:
        ValueError: The file exists and its first line is not ``columns``.
    """
    try:
        with open(path, encoding="utf-8", newline="") as file:
            found = next(csv.reader(file), [])
    except FileNotFoundError:
        return
    if found and found != list(columns):
        raise ValueError(
            f"{path} has the columns {', '.join(found)}, but this evaluator writes {', '.join(columns)}; "
            "choose another output_path or name, or move the file away"
        )


def append_row(path: Path, row: Mapping[str, Any]) -> None:
    """Append a line to a CSV file, with a header if it is new."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "a", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(row), lineterminator="\n")
        if file.tell() == 0:
            writer.writeheader()
        writer.writerow(row)


Run = dict[str, dict[str, float]]  # query id -> {document id: score}


def make_run(query_ids: Sequence[str], scores: np.ndarray, doc_ids: Sequence[Sequence[str]]) -> Run:
    """Make a run from search results.

    Args:
        query_ids: (queries,).
        scores: (queries, k).
        doc_ids: (queries, k).
    """
    return {
        query_id: dict(zip(ids, row.tolist(), strict=True))
        for query_id, row, ids in zip(query_ids, scores, doc_ids, strict=True)
    }


def cut_run(run: Run, depth: int) -> Run:
    """The first ``depth`` documents of each query, not counting its own id.

    The documents of each query must be best first.
    """
    return {
        query_id: dict(itertools.islice(documents.items(), depth + (query_id in documents)))
        for query_id, documents in run.items()
    }


def without_identical_ids(run: Run) -> tuple[Run, int]:
    """Remove each query's own id from the run; also return how many documents that removed."""
    kept = {
        query_id: {doc_id: score for doc_id, score in documents.items() if not is_own_document(query_id, doc_id)}
        for query_id, documents in run.items()
    }
    return kept, sum(len(documents) - len(kept[query_id]) for query_id, documents in run.items())


def ranked(documents: Mapping[str, float]) -> list[tuple[str, float]]:
    """(document id, score) in trec_eval's order: best score first, equal scores by descending document id.

    trec_eval keeps scores as float32, so they are equal where their float32 values are, and those are returned.
    """
    scores = np.fromiter(documents.values(), np.float64, len(documents)).astype(np.float32).tolist()
    return sorted(zip(documents, scores, strict=True), key=lambda item: (item[1], item[0]), reverse=True)


def write_run(run: Mapping[str, Mapping[str, float]], path: str | os.PathLike[str], *, tag: str = "st_clp") -> None:
    """Write a TREC run file: query id, ``Q0``, document id, rank from 1, score, tag.

    Documents stand in trec_eval's order: best score first, equal scores by descending document id. Scores have the nine
    digits that tell any two float32 numbers apart, so that the file gives the same metrics as the run.

    Args:
        run: Query id to {document id: score}.
        path: The file; missing folders are made, and an existing file is replaced once the new one is whole.
        tag: The name of the run in the last column.

    Raises:
        ValueError: An id or the tag is empty or contains white space, which separates the columns.
    """
    _require_word(tag, "the tag")
    with whole_file(path) as file:
        for query_id, documents in run.items():
            _require_word(query_id, "the query id")
            for rank, (doc_id, score) in enumerate(ranked(documents), 1):
                _require_word(doc_id, "the document id")
                file.write(f"{query_id} Q0 {doc_id} {rank} {score:.9g} {tag}\n")


def read_run(path: str | os.PathLike[str]) -> Run:
    """Read a TREC run file: query id, ``Q0``, document id, rank, score, tag, separated by white space.

    As for trec_eval, only the scores count, not the ranks.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: A line is broken, a score is not finite, or a document comes twice for a query; the message names
            the file and the line.
    """
    run: Run = {}
    with open(path, "rb") as file:
        for number, raw in enumerate(file, start=1):
            where = f"{os.fspath(path)}, line {number}"
            try:
                columns = raw.decode("utf-8-sig" if number == 1 else "utf-8").split()  # some editors begin with a mark
            except UnicodeDecodeError as error:
                raise ValueError(f"{where}: not UTF-8 text ({error.reason})") from None
            if not columns:
                continue
            if len(columns) != 6:
                raise ValueError(
                    f"{where}: a run's lines have 6 columns (query Q0 document rank score tag), this one {len(columns)}"
                )
            query_id, _, doc_id, _, score, _ = columns
            try:
                value = float(score)
            except ValueError:
                raise ValueError(f"{where}: the score {score!r} is no number") from None
            if not np.isfinite(value):
                raise ValueError(f"{where}: the score {score!r} is not finite")
            if doc_id in run.setdefault(query_id, {}):
                raise ValueError(f"{where}: the document {doc_id!r} comes twice for the query {query_id!r}")
            run[query_id][doc_id] = value
    if not run:
        raise ValueError(f"{os.fspath(path)} is empty: a run has a line for each retrieved document")
    return run


def _require_word(text: str, what: str) -> None:
    if text.split() != [text]:
        raise ValueError(
            f"{what} {text!r} is empty or holds white space, which a TREC run file cannot carry; "
            "give the collection ids without white space"
        )
