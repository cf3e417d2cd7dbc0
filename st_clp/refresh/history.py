"""Which refreshes there were, which negatives are in use, and which step uses which: all that a checkpoint needs."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from st_clp.files import write_json
from st_clp.refresh.refresh_account import MEASURES, together

Status = Literal["first", "mining", "used", "failed", "unused"]


@dataclass
class Refresh:
    """One refresh.

    Attributes:
        step: The step whose weights mine; 0 of the negatives that training began with.
        status: ``"first"`` of those; ``"mining"`` until it is ``"used"``, has ``"failed"``, or training ended before
            it could be used (``"unused"``).
        due: The step after which its negatives are to be used.
        used_from: The step after which they were used; None where they were not.
        seconds: How long mining took.
        error: Why it failed.
        collections: What the account says of each collection.
        waits: Whether training waits for it at ``due``: it was under way when the run was stopped.
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
        """How many steps old the negatives were when they came into use."""
        return None if self.used_from is None else self.used_from - self.step

    def take(self, account: Mapping[str, Any]) -> None:
        """Take over the account of its generation."""
        self.seconds, self.collections = account["seconds"], account["collections"]

    def describe(self) -> dict[str, Any]:
        """For a report: what happened, and the account of all collections together and of each."""
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
        """The one whose negatives are in use."""
        used = [refresh for refresh in self.refreshes if refresh.status in ("first", "used")]
        return max(used, key=lambda refresh: refresh.step)

    @property
    def pending(self) -> Refresh | None:
        """The one that is under way."""
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
    """Keep the history where a run that was killed since its last checkpoint finds it."""
    write_json(path, history.to_json())


def used_after(path: Path, step: int) -> dict[int, int]:
    """The refreshes that a run which was killed put to use after a step, as its journal says: step to used_from."""
    try:
        journal = History.from_json(json.loads(path.read_text(encoding="utf-8")))
        return {r.step: r.used_from for r in journal.refreshes if r.used_from is not None and r.used_from > step}
    except (OSError, ValueError, TypeError, RecursionError):
        return {}  # none, or broken: every refresh is used when it is due
