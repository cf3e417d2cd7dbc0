"""Gather the contents of the report page from evaluations and runs."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from evaluators.comparison import OVERALL, Comparison, Difference, compare, interval, most_changed
from evaluators.evaluation import Evaluation, EvaluationError, pooled_label, with_distinct_names
from evaluators.metrics import Metric
from evaluators.page import charts
from evaluators.page.run_parts import show_run
from evaluators.page.texts import ShownChange, TextReader
from st_clp.files import whole_file

# ISO 639 codes of languages that retrieval collections are made in.
LANGUAGES = {
    "ar": "Arabic", "bn": "Bengali", "cs": "Czech", "da": "Danish", "de": "German", "el": "Greek", "en": "English",
    "es": "Spanish", "et": "Estonian", "fa": "Persian", "fi": "Finnish", "fr": "French", "gu": "Gujarati",
    "he": "Hebrew", "hi": "Hindi", "hr": "Croatian", "hu": "Hungarian", "id": "Indonesian", "it": "Italian",
    "ja": "Japanese", "jv": "Javanese", "ko": "Korean", "lt": "Lithuanian", "lv": "Latvian", "ml": "Malayalam",
    "mr": "Marathi", "ms": "Malay", "nl": "Dutch", "no": "Norwegian", "pl": "Polish", "pt": "Portuguese",
    "ro": "Romanian", "ru": "Russian", "sk": "Slovak", "sl": "Slovenian", "sr": "Serbian", "sv": "Swedish",
    "sw": "Swahili", "ta": "Tamil", "te": "Telugu", "th": "Thai", "tl": "Tagalog", "tr": "Turkish", "uk": "Ukrainian",
    "ur": "Urdu", "vi": "Vietnamese", "yo": "Yoruba", "zh": "Chinese",
}  # fmt: skip


@dataclass(frozen=True)
class Summary:
    """The first lines.

    Attributes:
        sentences: The sentence to quote, and notes.
        search: A query whose first answer was wrong before and is right after, with its language; None if there is
            none.
    """

    sentences: Sequence[str]
    search: tuple[ShownChange, str | None] | None


def names_of_collections(evaluation: Evaluation) -> dict[str, str]:
    """Display names of collections: the language if no other has the same, otherwise the key."""
    languages = [result.language for result in evaluation.results.values()]
    return {
        key: LANGUAGES[result.language]
        if result.language in LANGUAGES and languages.count(result.language) == 1 and not result.pooled
        else result.label
        for key, result in evaluation.results.items()
    }


def sentence_of_scores(evaluation: Evaluation, metric: str, mean: float, names: Mapping[str, str]) -> str:
    """A sentence on one evaluation."""
    where = f"on {next(iter(names.values()))}" if len(names) == 1 else f"in the mean of {_listed(names.values())}"
    return f"{evaluation.model} reaches {_written(metric)} {mean:.3f} {where}."


def sentences_of_comparison(found: Comparison, names: Mapping[str, str]) -> list[str]:
    """Sentences on a comparison: overall, then which collections gained least or lost."""
    whole = found.differences[-1]
    parts = [difference for difference in found.differences if not difference.is_mean]
    where = f"on {names[parts[0].key]}" if len(parts) == 1 else f"in the mean of {_listed(names[p.key] for p in parts)}"
    sentences = [
        f"{found.after} reaches {_written(found.metric)} {whole.after:.3f} {where}, where {found.before} reaches "
        f"{whole.before:.3f}: {_change(whole)} (95 % interval {whole.low:+.3f} to {whole.high:+.3f}, {_p(whole.p)})."
    ]
    if whole.p >= 0.05:
        sentences.append("So large a difference may be chance.")
    if len(parts) > 1:
        sentences.append(_extremes(parts, names))
    return sentences


def _extremes(parts: Sequence[Difference], names: Mapping[str, str]) -> str:
    lost = [part for part in parts if part.difference < 0]
    least = min(parts, key=lambda part: part.difference)
    most = max(parts, key=lambda part: part.difference)
    if lost:
        said = _listed(f"{names[part.key]} ({part.difference:+.3f}, {_p(part.p_adjusted)})" for part in lost)
        gained = f"; {names[most.key]} gained most ({most.difference:+.3f})" if most.difference > 0 else ""
        return f"{said} lost{gained}."
    return (
        f"{names[most.key]} gained most ({most.difference:+.3f}), {names[least.key]} least ({least.difference:+.3f}); "
        "none lost."
    )


def best_search(changes: Sequence[ShownChange]) -> ShownChange | None:
    """The first change whose best answer was not relevant before and is after, and whose texts are known."""
    for item in changes:
        first, now = item.first_before, item.first_after
        if item.query is None or first is None or now is None or first.text is None or now.text is None:
            continue
        if (now.grade or 0) > 0 and not (first.grade or 0) > 0:
            return item
    return None


def _listed(names: Iterable[str]) -> str:
    every = list(names)
    if len(every) > 6:
        return f"{len(every)} collections"
    return every[0] if len(every) == 1 else f"{', '.join(every[:-1])} and {every[-1]}"


def _change(difference: Difference) -> str:
    return f"{difference.difference:+.3f}"


def _p(p: float) -> str:
    return "p < 0.001" if p < 0.001 else f"p = {p:.3f}"


def _written(metric: str) -> str:
    """``ndcg@10`` as people write it."""
    family, _, cut = metric.partition("@")
    known = {"ndcg": "nDCG", "mrr": "MRR", "map": "MAP", "recall": "Recall", "p": "P"}
    return f"{known.get(family, family)}@{cut}"


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
        texts: Show the texts of queries and documents that changed most, read from the collections. If one cannot be
            read, ids are shown instead, and the page says so.
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
    """The summary of the last comparison (that with the newest model), or of the only evaluation."""
    names = names_of_collections(evaluations[0])
    if not shown:
        value = next((row["cells"][0].value for row in reversed(scores["rows"]) if row["cells"][0]), 0.0)
        return Summary([sentence_of_scores(evaluations[0], metric, value, names)], None)
    last = shown[-1]
    searches = [(found, part["language"]) for part in last["parts"] if (found := best_search(part["gained"]))]
    # The clearest example among the collections.
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
    """A histogram of the queries' gains and losses; None if no query changed."""
    changed = differences[differences != 0]
    if not len(changed):
        return None
    # An odd number of bins keeps zero in the middle of one.
    largest = np.abs(changed).max()
    counts, edges = np.histogram(changed, bins=BINS + 1, range=(-largest, largest))
    label = f"differences of the {len(changed):,} queries of {key} that changed"
    return charts.histogram(counts.tolist(), edges.tolist(), label)
