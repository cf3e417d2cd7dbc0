"""The account of a refresh: what changed, how near the negatives are, and how many may be answers."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

import pyarrow as pa

from st_clp.pictures import new_figure, save_figure

MEASURES = ("changed", "mean_positive_score", "mean_negative_score", "above_positive")
"""What the account says of each collection, and of all of them together, each row counting the same:

- ``changed``: the share of the negatives that the row did not have before; None of the first generation;
- ``mean_positive_score``, ``mean_negative_score``: mean similarity of the queries to their positives and negatives, by
  the model that mined them;
- ``above_positive``: the share of the negatives that score above their row's positive. The model may be wrong about
  these, or the judgments: the higher it is, the more of the negatives are under suspicion of being answers.
"""


def account_of(rows: pa.Table, before: pa.Table | None, *, kept: int) -> dict[str, Any]:
    """Say how some rows differ from those before, and how their scores lie.

    Args:
        rows: The rows of one collection, with their details.
        before: The same rows as they were; None where there were none.
        kept: How many rows were not mined again and keep the negatives that they had.

    Returns:
        ``rows``, ``kept``, ``negatives`` and :data:`MEASURES`, each None where there is nothing to measure.
    """
    total = changed = above = scored = 0
    sums = {"positive": 0.0, "negative": 0.0}
    for begin in range(0, len(rows), 4096):
        now = rows.slice(begin, 4096).select(["negative_ids", "negative_scores", "positive_score"]).to_pylist()
        then = before.slice(begin, 4096).column("negative_ids").to_pylist() if before is not None else None
        for number, row in enumerate(now):
            ids, scores = row["negative_ids"], [s for s in row["negative_scores"] if s is not None]
            total += len(ids)
            if then is not None:
                changed += len(set(ids) - set(then[number]))
            scored += len(scores)
            above += sum(score > row["positive_score"] for score in scores)
            sums["positive"] += row["positive_score"]
            sums["negative"] += sum(scores)
    return {
        "rows": len(rows),
        "kept": kept,
        "negatives": total,
        "changed": changed / total if total and before is not None else None,
        "mean_positive_score": sums["positive"] / len(rows) if len(rows) else None,
        "mean_negative_score": sums["negative"] / scored if scored else None,
        "above_positive": above / scored if scored else None,
    }


def together(accounts: Mapping[str, Mapping[str, Any]]) -> dict[str, float | None]:
    """:data:`MEASURES` over all collections, each row counting the same."""
    found: dict[str, float | None] = {}
    for measure in MEASURES:
        known = [(a[measure], a["rows"]) for a in accounts.values() if a[measure] is not None]
        found[measure] = sum(v * n for v, n in known) / sum(n for _, n in known) if known else None
    return found


def plot_refreshes(refreshes: Sequence[Mapping[str, Any]], path: str | os.PathLike[str]) -> None:
    """Draw the account of the refreshes over the steps of training, and write the picture to ``path``.

    Args:
        refreshes: :attr:`st_clp.AnceCallback.refreshes`, or ``report.json``'s ``["training"]["refreshes"]``.
        path: Where to; its ending (``.png``, ``.svg``, ``.pdf``) says what kind of picture.

    Raises:
        ModuleNotFoundError: matplotlib is not installed; the message says how to.
        ValueError: No refresh was finished.
    """
    mined = [r for r in refreshes if r.get("mean_positive_score") is not None]
    if not mined:
        raise ValueError("no refresh was finished: there is nothing to plot")
    panels = (
        ("similarity to the query", {"mean_positive_score": "positives", "mean_negative_score": "negatives"}),
        ("share of the negatives", {"changed": "changed", "above_positive": "score above their positive"}),
    )
    figure = new_figure(8, 6)
    for place, (label, lines) in enumerate(panels, start=1):
        axes = figure.add_subplot(len(panels), 1, place)
        for measure, name in lines.items():
            points = [(r["step"], r[measure]) for r in mined if r[measure] is not None]
            axes.plot([x for x, _ in points], [y for _, y in points], marker="o", label=name)
        for refresh in refreshes:
            if refresh["status"] == "failed":
                axes.axvline(refresh["step"], color="red", linestyle=":", linewidth=1)
        axes.set_ylabel(label)
        axes.set_xlim(left=0)
        if place == 2:
            axes.set_ylim(0, 1)
            axes.set_xlabel("step whose weights mined")
        axes.legend(frameon=False)
    failed = sum(r["status"] == "failed" for r in refreshes)
    figure.suptitle(f"{len(mined)} generations of negatives" + (f", {failed} refreshes failed (dotted)" * bool(failed)))
    save_figure(figure, path)
