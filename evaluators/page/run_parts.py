"""The page's parts on a training run: mining, curves and experts, from ``report.json``."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from evaluators.evaluation import EvaluationError
from evaluators.page import charts

POINTS = 300  # of a curve, at most
MADE_ANEW = "`st-clp run --output FOLDER --resume` writes it anew"

# What the trainer logs -> what it is called.
CURVES = {"loss": "loss", "learning_rate": "learning rate", "grad_norm": "gradient norm"}

# What a refresh of the negatives may record, in one chart where they are of one kind.
REFRESHES = {
    "similarity of positives and negatives": {
        "mean_positive_score": "positives",
        "mean_negative_score": "negatives",
    },
    "share of negatives that changed": {"changed": ""},
    "share of negatives that score above their positive": {"above_positive": ""},
    "age of the negatives when they came into use, in steps": {"age": ""},
    "seconds of mining": {"seconds": ""},
}

# Fields of a mining account -> what they count.
ACCOUNT = {
    "queries": "queries",
    "queries_without_positive": "queries without a relevant document",
    "queries_not_drawn": "queries not drawn",
    "queries_dropped": "queries dropped for want of negatives",
    "rows": "training rows",
    "rows_relaxed": "rows with a negative kept or drawn for want of others",
    "rows_short": "rows with fewer negatives than asked for",
    "with_query": "negatives with a query of their own",
}


def show_run(name: str, report: Mapping[str, Any]) -> dict[str, Any]:
    """The template's data of a run; parts that the report lacks are left out.

    Args:
        name: The run's name.
        report: Its ``report.json``.

    Raises:
        EvaluationError: The report is invalid.
    """
    try:
        return _show_run(name, report)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        problem = f"the report.json of {name} is not as a run writes it ({error!r:.200})"
        raise EvaluationError(f"{problem}; {MADE_ANEW}") from error


def _show_run(name: str, report: Mapping[str, Any]) -> dict[str, Any]:
    training = report.get("training") or {}
    return {
        "name": name,
        "mining": [_mining(key, account) for key, account in (report.get("mining") or {}).items()],
        "curves": _curves(training.get("history") or []),
        "refreshes": _refreshes(training.get("refreshes") or []),
        "failed_refreshes": _failures(training.get("refreshes") or []),
        "experts": _experts(report.get("expert_usage")),
        "dead": (report.get("expert_usage") or {}).get("dead") or [],
        "cost": _cost(report),
        "seconds": {stage: float(taken) for stage, taken in (report.get("seconds") or {}).items()},
    }


def _cost(report: Mapping[str, Any]) -> str:
    """A sentence on the run's cost; empty if the report does not have it."""
    training, seconds = report.get("training") or {}, report.get("seconds") or {}
    if not seconds or "steps" not in training:
        return ""
    whole = sum(float(taken) for taken in seconds.values())
    share = ""
    if trained := training.get("trainable_parameters"):
        share = f" of {trained / 1e6:,.1f} million weights"
    return (
        f"It took {_duration(whole)}, {_duration(float(seconds.get('train', 0.0)))} of which are {training['steps']:,} "
        f"steps of training{share}."
    )


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} seconds"
    return f"{seconds / 60:.0f} minutes" if seconds < 90 * 60 else f"{seconds / 3600:.1f} hours"


def _curves(history: Sequence[Mapping[str, Any]]) -> list[charts.Chart]:
    found = []
    for key, name in CURVES.items():
        points = _points(history, key)
        if len(points) > 1:
            found.append(charts.lines([(name, points)], f"{name} over training", "step"))
    return found


def _refreshes(entries: Sequence[Mapping[str, Any]]) -> list[charts.Chart]:
    """A chart for each quantity, a line for each collection where there are several."""
    groups: dict[str, list[Mapping[str, Any]]] = {"": list(entries)}
    for entry in entries:
        measured = entry.get("collections") or {}
        for name, values in measured.items() if len(measured) > 1 else ():
            groups.setdefault(str(name), []).append({**values, "step": entry.get("step")})
    found = []
    for title, keys in REFRESHES.items():
        measured_apart = any(_points(of_it, key) for name, of_it in groups.items() if name for key in keys)
        series = []
        for group, of_it in groups.items():
            for key, name in keys.items() if bool(group) == measured_apart else ():
                if points := _points(of_it, key):
                    series.append((", ".join(filter(None, [group, name])) or title, points))
        if series:
            found.append(charts.lines(series, f"{title}, at each refresh of the negatives", "step"))
    return found


def _failures(entries: Sequence[Mapping[str, Any]]) -> list[tuple[Any, str]]:
    """(step, why) of each refresh that failed."""
    return [(entry.get("step"), str(entry.get("error"))) for entry in entries if entry.get("status") == "failed"]


def _points(entries: Iterable[Mapping[str, Any]], key: str) -> list[tuple[float, float]]:
    """(step, value) where both are finite numbers; of very many an even sample, with the first and the last."""
    points = []
    for entry in entries:
        x, y = entry.get("step", entry.get("epoch")), entry.get(key)
        if _is_number(x) and _is_number(y):
            points.append((float(x), float(y)))  # type: ignore[arg-type]
    if len(points) > POINTS:
        points = [points[round(n * (len(points) - 1) / (POINTS - 1))] for n in range(POINTS)]
    return points


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _mining(key: str, account: Mapping[str, Any]) -> dict[str, Any]:
    name = account.get("collection", key)
    rows = [(what, account[field]) for field, what in ACCOUNT.items() if account.get(field)]
    rows += [(f"negatives: {what}", number) for what, number in (account.get("negatives") or {}).items() if number]
    rows += [
        (f"candidates passed over: {what}", number)
        for what, number in (account.get("filtered") or {}).items()
        if number
    ]
    rows += [(f"left out: {what}", number) for what, number in (account.get("left_out") or {}).items() if number]
    series = [
        (what, [count / found["count"] for count in found["counts"]], found["edges"])
        for what, found in (account.get("scores") or {}).items()
        if found.get("count")
    ]
    label = f"similarity of positives and negatives to their queries, {name}"
    chart = charts.stairs(series, label, "similarity to the query") if series else None
    return {"name": name, "rows": rows, "chart": chart}


def _experts(usage: Mapping[str, Any] | None) -> list[dict[str, Any]]:
    """For each group of texts (a language) the share of its tokens that each layer's experts took."""
    layers = (usage or {}).get("layers") or []
    groups = list(dict.fromkeys(group for layer in layers for group in layer.get("groups") or {})) or ["all texts"]
    found = []
    for group in groups if layers else []:
        rows = []
        for layer in layers:
            tokens = (layer.get("groups") or {}).get(group, layer["tokens"])
            total = sum(tokens) or 1
            rows.append((layer["layer"], [number / total for number in tokens]))
        found.append({"group": group, "rows": rows})
    return found
