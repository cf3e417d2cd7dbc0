"""The history of a run's refreshes: what each changed, and which negatives are in use; kept in checkpoints."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import pyarrow as pa

from st_clp.files import write_json
from st_clp.terminal import new_figure, save_figure

MEASURES = ("changed", "mean_positive_score", "mean_negative_score", "above_positive")
"""What the account says of each collection, and of all of them together, each row counting the same:

- ``changed``: the share of the negatives that the row did not have before; None of the first generation;
- ``mean_positive_score``, ``mean_negative_score``: mean similarity of the queries to their positives and negatives, by
  the model that mined them;
- ``above_positive``: the share of the negatives that score above their row's positive. The model may be wrong about
  these, or the judgments: the higher it is, the more of the negatives are under suspicion of being answers.
"""


def account_of(rows: pa.Table, before: pa.Table | None, *, kept: int) -> dict[str, Any]:
    """Measure how rows differ from the previous ones, and their scores.

    Args:
        rows: The rows of one collection, with their details.
        before: The same rows as they were; None where there were none.
        kept: How many rows were not mined again and keep their negatives.

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
    """Plot the refreshes over the steps of training to a file.

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


Status = Literal["first", "mining", "used", "failed", "unused"]


@dataclass
class Refresh:
    """One refresh.

    Attributes:
        step: The step whose weights mine; 0 of the negatives that training began with.
        status: ``"first"`` of those; ``"mining"`` until it is ``"used"``, has ``"failed"``, or training ended before
            it could be used (``"unused"``).
        due: The step after which its negatives are used.
        used_from: The step after which they were used; None where they were not.
        seconds: How long mining took.
        error: Why it failed.
        collections: The statistics of each collection.
        waits: Whether training waits for it at ``due``, because it was unfinished when the run was stopped.
    """

    step: int
    status: Status
    due: int
    used_from: int | None = None
    seconds: float | None = None
    error: str | None = None
    collections: dict[str, Any] = field(default_factory=dict)
    waits: bool = False

    @property
    def age(self) -> int | None:
        """The age of the negatives in steps when they came into use."""
        return None if self.used_from is None else self.used_from - self.step

    def take(self, account: Mapping[str, Any]) -> None:
        """Take over the statistics of its generation."""
        self.seconds, self.collections = account["seconds"], account["collections"]

    def describe(self) -> dict[str, Any]:
        """For a report: the outcome, and the statistics of all collections together and of each."""
        measures = together(self.collections) if self.collections else dict.fromkeys(MEASURES)
        return {
            "step": self.step,
            "status": self.status,
            "used_from": self.used_from,
            "age": self.age,
            "seconds": self.seconds,
            **measures,
            "error": self.error,
            "collections": self.collections,
        }


class History:
    """The refreshes of a run, in order."""

    def __init__(self) -> None:
        self.refreshes: list[Refresh] = []

    @property
    def current(self) -> Refresh:
        """The refresh whose negatives are in use."""
        used = [refresh for refresh in self.refreshes if refresh.status in ("first", "used")]
        return max(used, key=lambda refresh: refresh.step)

    @property
    def pending(self) -> Refresh | None:
        """The unfinished refresh."""
        return next((refresh for refresh in self.refreshes if refresh.status == "mining"), None)

    def in_use_at(self, step: int) -> int:
        """The generation that was in use right after a step."""
        found = [r for r in self.refreshes if r.used_from is not None and r.used_from <= step]
        return max((refresh.step for refresh in found), default=0)

    def to_json(self) -> list[dict[str, Any]]:
        """All of it, for JSON."""
        return [asdict(refresh) for refresh in self.refreshes]

    @classmethod
    def from_json(cls, content: list[dict[str, Any]]) -> History:
        """What :meth:`to_json` gave."""
        history = cls()
        history.refreshes = [Refresh(**refresh) for refresh in content]
        return history


def write_journal(path: Path, history: History) -> None:
    """Save the history for a run that is killed after its last checkpoint."""
    write_json(path, history.to_json())


def used_after(path: Path, step: int) -> dict[int, int]:
    """The refreshes that a killed run used after a step, from its journal: step to used_from."""
    try:
        journal = History.from_json(json.loads(path.read_text(encoding="utf-8")))
        return {r.step: r.used_from for r in journal.refreshes if r.used_from is not None and r.used_from > step}
    except (OSError, ValueError, TypeError, RecursionError):
        return {}  # none, or broken: every refresh is used when it is due
