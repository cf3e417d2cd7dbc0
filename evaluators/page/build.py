"""What the report page shows, gathered from evaluations and runs."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from evaluators.comparison import OVERALL, Comparison, QueryChange, compare, interval, most_changed
from evaluators.evaluation import CollectionResult, Evaluation, EvaluationError
from evaluators.files import replacing
from evaluators.metrics import Metric
from evaluators.page import charts
from st_clp.data import Collection, CollectionError

CHANGES = 5  # of each collection, gained and lost
TEXT = 600  # characters of a document
BINS = 20
CURVES = ("loss", "learning_rate", "grad_norm")


@dataclass(frozen=True)
class ShownDocument:
    """A document as the page shows it; ``text`` is None where the collection could not be read."""

    doc_id: str
    text: str | None
    grade: int | None


@dataclass(frozen=True)
class ShownChange:
    """A query that changed: its text, what is relevant, and what either model ranked first."""

    change: QueryChange
    query: str | None
    judged: list[ShownDocument]
    first_before: ShownDocument | None
    first_after: ShownDocument | None


def write_page(
    path: str | os.PathLike[str],
    evaluations: Sequence[Evaluation],
    *,
    metric: str | None = None,
    runs: Mapping[str, Mapping[str, Any]] | None = None,
    texts: bool = True,
    title: str | None = None,
) -> Path:
    """Write one HTML file about evaluations, which needs no network and no other file.

    The first evaluation is compared with each of the others that is of the same collections.

    Args:
        path: The file; it appears whole or not at all.
        evaluations: One or more.
        metric: What to show, such as ``"ndcg@10"``. None: the first evaluation's primary metric.
        runs: The reports (``report.json``) of training runs, by name: their mining, curves and experts are shown.
        texts: Show the queries and documents that changed most, read from the collections that the evaluations name.
            Where one cannot be read, ids stand in their place, and the page says so.
        title: The page's title.

    Raises:
        EvaluationError: There are no evaluations, or one does not have the metric.
        OSError: The file cannot be written.
    """
    from jinja2 import Environment, PackageLoader, StrictUndefined

    if not evaluations:
        raise EvaluationError("there is nothing to report: name at least one evaluation")
    metric = evaluations[0].metrics[0] if metric is None else Metric.parse(metric).name
    comparisons, refused = _compare(evaluations, metric)
    environment = Environment(
        loader=PackageLoader("evaluators.page", "."),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    reader = _Reader(texts)
    page = environment.get_template("page.html.jinja").render(
        title=title or f"{metric}: {', '.join(evaluation.model for evaluation in evaluations)}",
        metric=metric,
        evaluations=evaluations,
        pooled=[evaluation for evaluation in evaluations if _pooled(evaluation)],
        scores=_scores(evaluations, metric),
        comparisons=[_comparison(found, before, after, reader) for found, before, after in comparisons],
        refused=refused,
        runs=[_run(name, report) for name, report in (runs or {}).items()],
        unread=reader.unread,
    )
    target = Path(path)
    with replacing(target) as file:
        file.write(page)
    return target


def _pooled(evaluation: Evaluation) -> bool:
    return any(result.pooled for result in evaluation.results.values())


def _compare(
    evaluations: Sequence[Evaluation], metric: str
) -> tuple[list[tuple[Comparison, Evaluation, Evaluation]], list[str]]:
    """(the comparisons with the first evaluation, why others cannot be compared)."""
    found, refused = [], []
    for other in evaluations[1:]:
        try:
            found.append((compare(evaluations[0], other, metric), evaluations[0], other))
        except EvaluationError as error:
            refused.append(str(error))
    return found, refused


def _scores(evaluations: Sequence[Evaluation], metric: str) -> dict[str, Any]:
    """The table of scores with intervals, and its chart."""
    keys = list(dict.fromkeys(key for evaluation in evaluations for key in evaluation.results))
    rows: list[dict[str, Any]] = []
    for key in keys:
        cells = [_interval([_values(e, key, metric)]) if key in e.results else None for e in evaluations]
        result = next(e.results[key] for e in evaluations if key in e.results)
        queries = next(len(e.query_scores[key]) for e in evaluations if key in e.results)
        rows.append({"key": key, "language": result.language, "queries": queries, "cells": cells})
    if len(keys) > 1 and all(set(keys) == set(e.results) for e in evaluations):
        cells = [_interval([_values(e, key, metric) for key in keys]) for e in evaluations]
        rows.append({"key": OVERALL, "language": None, "queries": sum(r["queries"] for r in rows), "cells": cells})
    whole = [(row["key"], row["cells"]) for row in rows if None not in row["cells"]]
    names = [evaluation.model for evaluation in evaluations]
    chart = charts.intervals(whole, names, f"{metric} with 95 % intervals, as in the table below") if whole else None
    return {"rows": rows, "chart": chart, "names": names}


def _values(evaluation: Evaluation, key: str, metric: str) -> np.ndarray:
    if metric not in evaluation.metrics:
        raise EvaluationError(f"{evaluation.path} has no {metric}; it has {', '.join(evaluation.metrics)}")
    return np.array([scores[metric] for scores in evaluation.query_scores[key].values()])


def _interval(samples: Sequence[np.ndarray]) -> charts.Interval:
    low, high = interval(samples, seed=0)
    return charts.Interval(float(np.mean([sample.mean() for sample in samples])), low, high)


def _comparison(found: Comparison, before: Evaluation, after: Evaluation, reader: _Reader) -> dict[str, Any]:
    parts = []
    for key, changes in found.changes.items():
        differences = np.array([change.difference for change in changes])
        changed = differences[differences != 0]
        largest = max(np.abs(differences).max(), 1e-9)
        # An odd number of bins keeps zero in the middle of one.
        counts, edges = np.histogram(changed, bins=BINS + 1, range=(-largest, largest))
        label = f"differences of {len(changed):,} queries of {key} that changed"
        parts.append(
            {
                "key": key,
                "language": before.results[key].language,
                "chart": charts.histogram(counts.tolist(), edges.tolist(), label) if len(changed) else None,
                "unchanged": int((differences == 0).sum()),
                "changes": reader.show(before, after, key, most_changed(changes, CHANGES)),
            }
        )
    return {"found": found, "parts": parts}


class _Reader:
    """Reads the texts of queries and documents from the collections that evaluations name."""

    def __init__(self, texts: bool) -> None:
        self._texts = texts
        self._collections: dict[tuple[str, str | None], Collection | None] = {}
        self.unread: dict[str, str] = {}  # collection to why it could not be read

    def show(
        self, before: Evaluation, after: Evaluation, key: str, changes: Sequence[QueryChange]
    ) -> list[ShownChange]:
        """The changes with their texts."""
        if not changes:
            return []
        runs = before.run(key), after.run(key)
        firsts = [[_first(run.get(change.query_id, {})) for run in runs] for change in changes]
        collection = self._collection(before.results[key])
        judged = [_relevant(collection, change.query_id) for change in changes]
        wanted = {doc_id for pair in firsts for doc_id in pair if doc_id} | {d for ids in judged for d in ids}
        documents = collection.get_documents(wanted) if collection else {}

        def shown(doc_id: str, query_id: str) -> ShownDocument:
            text = " ".join(documents[doc_id].text.split()) if doc_id in documents else None
            grade = collection.judgments.get(query_id, {}).get(doc_id) if collection else None
            return ShownDocument(doc_id, text if text is None or len(text) <= TEXT else text[:TEXT] + "…", grade)

        return [
            ShownChange(
                change,
                collection.queries.get(change.query_id) if collection else None,
                [shown(doc_id, change.query_id) for doc_id in relevant],
                *(shown(doc_id, change.query_id) if doc_id else None for doc_id in pair),
            )
            for change, relevant, pair in zip(changes, judged, firsts, strict=True)
        ]

    def _collection(self, result: CollectionResult) -> Collection | None:
        where = (result.source, result.split)
        if not self._texts:
            return None
        if where not in self._collections:
            try:
                self._collections[where] = _load(*where)
            except (CollectionError, OSError, ValueError) as error:
                self._collections[where] = None
                self.unread[result.source] = str(error)
        return self._collections[where]


def _load(source: str, split: str | None) -> Collection:
    """A collection by the name that it gave itself, which may or may not end in its split."""
    base, _, last = source.rpartition("/")
    if split and last == split and split in Collection.splits(base):
        return Collection.load(base, split=split)
    return Collection.load(source, split=split if split in Collection.splits(source) else None)


def _first(documents: Mapping[str, float]) -> str | None:
    return max(documents, key=lambda doc_id: (documents[doc_id], doc_id), default=None)


def _relevant(collection: Collection | None, query_id: str) -> list[str]:
    grades = collection.judgments.get(query_id, {}) if collection else {}
    return [doc_id for doc_id in sorted(grades, key=lambda doc_id: -grades[doc_id]) if grades[doc_id] > 0][:3]


def _run(name: str, report: Mapping[str, Any]) -> dict[str, Any]:
    history = report.get("training", {}).get("history", [])
    curves = []
    for curve in CURVES:
        points = [(float(e["step"] if "step" in e else e["epoch"]), float(e[curve])) for e in history if curve in e]
        if len(points) > 1:
            curves.append({"name": curve, "chart": charts.lines([(curve, points)], f"{curve} over training", "step")})
    return {
        "name": name,
        "mining": [_mining(account) for account in report.get("mining", {}).values()],
        "curves": curves,
        "experts": _experts(report.get("expert_usage")),
        "settings": report.get("settings", {}),
        "seconds": report.get("seconds", {}),
    }


def _mining(account: Mapping[str, Any]) -> dict[str, Any]:
    series = [
        (name, [count / found["count"] for count in found["counts"]], found["edges"])
        for name, found in account.get("scores", {}).items()
    ]
    label = f"similarity of positives and negatives of {account['collection']}"
    chart = charts.stairs(series, label, "similarity to the query") if series else None
    return {"account": account, "chart": chart, "names": [name for name, _, _ in series]}


def _experts(usage: Mapping[str, Any] | None) -> list[dict[str, Any]]:
    if usage is None:
        return []
    groups = list(usage["layers"][0]["groups"]) or ["all texts"]
    found = []
    for group in groups:
        rows = []
        for layer in usage["layers"]:
            tokens = layer["groups"].get(group, layer["tokens"])
            total = sum(tokens) or 1
            rows.append((layer["layer"], [number / total for number in tokens]))
        found.append({"group": group, "rows": rows})
    return found
