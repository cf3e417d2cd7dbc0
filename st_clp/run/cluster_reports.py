"""What the workers of a training on a cluster report, and how it is shown.

It imports little, as the actor is a process of its own.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

from tqdm.auto import tqdm

from st_clp.distributed import Failure

LOOK_SECONDS = 0.5  # between looks at what the workers have to tell


class ReportActor:
    """An actor that collects the workers' reports."""

    def __init__(self) -> None:
        self._lines: list[str] = []
        self._at: tuple[int, int, float | None] | None = None
        self._failures: dict[int, Failure] = {}
        self._result: dict[str, Any] | None = None

    def say(self, text: str) -> None:
        """A line for the user."""
        self._lines.append(text)

    def step(self, number: int, last: int, loss: float | None) -> None:
        """How far the training is."""
        self._at = number, last, loss

    def fail(self, rank: int, failure: Failure) -> None:
        """Store a worker's error; other workers' errors caused by it come later."""
        self._failures[rank] = failure

    def finish(self, result: dict[str, Any]) -> None:
        """Store the result of the training."""
        self._result = result

    def look(self, seen: int) -> tuple[list[str], tuple[int, int, float | None] | None]:
        """(lines from the ``seen``-th on, how far the training is)."""
        return self._lines[seen:], self._at

    def ended(self) -> tuple[dict[int, Failure], dict[str, Any] | None]:
        """(the errors by worker, the first one first; the result)."""
        return self._failures, self._result


class ShownReports:
    """Shows the workers' reports within the context."""

    def __init__(self, ray: Any, telling: Any, say: Callable[[str], None]) -> None:
        self._ray, self._telling, self._say = ray, telling, say
        self._seen = 0
        self._bar: tqdm | None = None
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._keep_looking, daemon=True)

    def __enter__(self) -> ShownReports:
        self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._over.set()
        self._thread.join()
        self._look()
        if self._bar is not None:
            self._bar.close()

    def _keep_looking(self) -> None:
        while not self._over.wait(LOOK_SECONDS):
            self._look()

    def _look(self) -> None:
        """Show new reports."""
        lines, at = self._ray.get(self._telling.look.remote(self._seen))
        self._seen += len(lines)
        for line in lines:
            self._say(line)
        if at is None:
            return
        step, last, loss = at
        if self._bar is None:
            self._bar = tqdm(total=last, desc="Training", unit=" steps", initial=step)
        self._bar.total, self._bar.n = last, step  # each part of a training has its own number
        if loss is not None:
            self._bar.set_postfix(loss=f"{loss:.3f}", refresh=False)
        self._bar.refresh()
