"""What the report page shows, gathered from evaluations and runs."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from evaluators.comparison import OVERALL, Comparison, compare, interval, most_changed
from evaluators.evaluation import Evaluation, EvaluationError, pooled_label, with_distinct_names
from evaluators.metrics import Metric
from evaluators.page import charts
from evaluators.page.summary import (
    Summary,
    best_search,
    names_of_collections,
    sentence_of_scores,
    sentences_of_comparison,
)
from evaluators.page.texts import TextReader
from evaluators.page.training import show_run
from st_clp.files import whole_file

CHANGES = 5  # of each collection, gained and lost
BINS = 20


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
    evaluations = with_distinct_names(evaluations)
    metric = evaluations[0].metrics[0] if metric is None else Metric.parse(metric).name
    comparisons, refused = _compare(evaluations, metric)
    environment = Environment(
        loader=PackageLoader("evaluators.page", "."),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    reader = TextReader(read=texts)
    scores = _scores(evaluations, metric)
    shown = [_comparison(found, before, after, reader) for found, before, after in comparisons]
    page = environment.get_template("page.html.jinja").render(
        title=title or _title(evaluations, metric),
        metric=metric,
        evaluations=evaluations,
        pooled=[evaluation for evaluation in evaluations if evaluation.pooled],
        summary=_summary(evaluations, metric, scores, shown),
        scores=scores,
        comparisons=shown,
        refused=refused,
        runs=[show_run(name, report) for name, report in (runs or {}).items()],
        unread=reader.unread,
    )
    target = Path(path)
    with whole_file(target) as file:
        file.write(page)
    return target


def _summary(
    evaluations: Sequence[Evaluation], metric: str, scores: dict[str, Any], shown: Sequence[dict[str, Any]]
) -> Summary:
    """What is said first: of the last comparison, which is that with the newest model; else of the only evaluation."""
    names = names_of_collections(evaluations[0])
    if not shown:
        value = next((row["cells"][0].value for row in reversed(scores["rows"]) if row["cells"][0]), 0.0)
        return Summary([sentence_of_scores(evaluations[0], metric, value, names)], None)
    last = shown[-1]
    searches = [(found, part["language"]) for part in last["parts"] if (found := best_search(part["gained"]))]
    # The clearest case among the collections.
    search = max(searches, key=lambda pair: pair[0].change.difference, default=None)
    return Summary(sentences_of_comparison(last["found"], names), search)


def _title(evaluations: Sequence[Evaluation], metric: str) -> str:
    names = ", ".join(dict.fromkeys(evaluation.model for evaluation in evaluations))
    return f"{pooled_label(metric) if any(e.pooled for e in evaluations) else metric}: {names}"


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
    """The table of scores with intervals, and its chart.

    Figures over a pool stand in rows of their own: no row holds them beside figures over a whole corpus.
    """
    names = {evaluations[0].results[key].label: name for key, name in names_of_collections(evaluations[0]).items()}
    by_label = [{result.label: result for result in evaluation.results.values()} for evaluation in evaluations]
    rows: list[dict[str, Any]] = []
    for label in dict.fromkeys(label for results in by_label for label in results):
        samples = [
            _values(evaluation, results[label].key, metric) if label in results else None
            for evaluation, results in zip(evaluations, by_label, strict=True)
        ]
        rows.append(
            {
                "label": label,
                "name": names.get(label, label),
                "queries": next(len(sample) for sample in samples if sample is not None),
                "cells": [None if sample is None else _interval([sample]) for sample in samples],
                "mean": False,
            }
        )
    if len(rows) > 1 and all(len(results) == len(rows) for results in by_label):
        label = pooled_label(OVERALL) if evaluations[0].pooled else OVERALL
        cells: list[charts.Interval | None] = [
            _interval([_values(evaluation, key, metric) for key in evaluation.results]) for evaluation in evaluations
        ]
        queries = sum(row["queries"] for row in rows)
        rows.append({"label": label, "name": label, "queries": queries, "cells": cells, "mean": True})
    models = [evaluation.model for evaluation in evaluations]
    chart = charts.intervals([(row["name"], row["cells"]) for row in rows], models, f"{metric} with 95 % intervals")
    return {"rows": rows, "chart": chart, "names": models}


def _values(evaluation: Evaluation, key: str, metric: str) -> np.ndarray:
    if metric not in evaluation.metrics:
        raise EvaluationError(f"{evaluation.path} has no {metric}; it has {', '.join(evaluation.metrics)}")
    return np.array([scores[metric] for scores in evaluation.query_scores[key].values()])


def _interval(samples: Sequence[np.ndarray]) -> charts.Interval:
    low, high = interval(samples, seed=0)
    return charts.Interval(float(np.mean([sample.mean() for sample in samples])), low, high)


def _comparison(found: Comparison, before: Evaluation, after: Evaluation, reader: TextReader) -> dict[str, Any]:
    parts = []
    names = names_of_collections(before)
    for key, changes in found.changes.items():
        shown = reader.show(before, after, key, most_changed(changes, CHANGES))
        parts.append(
            {
                "label": before.results[key].label,
                "name": names[key],
                "language": before.results[key].language,
                "chart": _distribution(key, np.array([change.difference for change in changes])),
                "unchanged": sum(change.difference == 0 for change in changes),
                "gained": [item for item in shown if item.change.difference > 0],
                "lost": [item for item in shown if item.change.difference < 0],
            }
        )
    whole = {OVERALL: pooled_label(OVERALL) if found.pooled else OVERALL}
    labels = {key: result.label for key, result in before.results.items()}
    return {"found": found, "parts": parts, "names": names | whole, "labels": labels | whole}


def _distribution(key: str, differences: np.ndarray) -> charts.Chart | None:
    """How many of the queries that changed gained or lost how much; None where none did."""
    changed = differences[differences != 0]
    if not len(changed):
        return None
    # An odd number of bins keeps zero in the middle of one.
    largest = np.abs(changed).max()
    counts, edges = np.histogram(changed, bins=BINS + 1, range=(-largest, largest))
    label = f"differences of the {len(changed):,} queries of {key} that changed"
    return charts.histogram(counts.tolist(), edges.tolist(), label)
