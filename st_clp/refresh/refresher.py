"""The course of the refreshes: begin one, use it when it is due, count failures, and resume."""

from __future__ import annotations

import logging
import threading
import traceback
from collections.abc import Callable
from typing import Any

import torch

from st_clp.refresh.generations import read_account
from st_clp.refresh.history import History, Refresh, used_after, write_journal
from st_clp.refresh.mining_process import Miner
from st_clp.refresh.rows_in_use import Layout, Negatives

HEARTBEAT = 0.2  # seconds


class Processes:
    """The processes of a training; a single process is the first."""

    def __init__(self) -> None:
        distributed = torch.distributed
        self.several = distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1
        self.first = not self.several or distributed.get_rank() == 0

    def share(self, value: Any) -> Any:
        """Broadcast the first process's value. All processes must call this at about the same time."""
        if not self.several:
            return value
        found = [value]
        torch.distributed.broadcast_object_list(found, src=0)
        return found[0]

    def from_first(self, work: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """Call ``work`` in the first process while the others wait.

        However long it takes, no single collective operation runs into its time limit.

        Args:
            work: The function; it must not raise.
        """
        if not self.several:
            return work()
        results: list[dict[str, Any]] = []
        thread = threading.Thread(target=_on_device(lambda: results.append(work())), daemon=True)
        if self.first:
            thread.start()
        while True:
            if self.first:
                thread.join(HEARTBEAT)
                if not thread.is_alive() and not results:
                    raise RuntimeError("the work of the first process ended without a result")
            result = self.share(results[0] if results else None)
            if result is not None:
                return result


def _on_device(work: Callable[[], None]) -> Callable[[], None]:
    """Make ``work`` use this thread's GPU: a new thread would use the first one."""
    if not (torch.cuda.is_available() and torch.cuda.is_initialized()):
        return work
    device = torch.cuda.current_device()

    def there() -> None:
        with torch.cuda.device(device):
            work()

    return there


logger = logging.getLogger(__name__)


class Refresher:
    """Runs the refreshes, in all processes of the training.

    Args:
        layout: Where the files lie.
        processes: The processes of the training.
        negatives: The negatives in use.
        miner: What mines; None in all processes but the first.
        asynchronous: Whether it mines beside the training.
        record: Called with the history whenever it changes, for the next checkpoint.
        report: Called in the first process with each refresh that has ended.
    """

    def __init__(
        self,
        layout: Layout,
        processes: Processes,
        negatives: Negatives,
        miner: Miner | None,
        *,
        asynchronous: bool,
        record: Callable[[list[dict[str, Any]]], None],
        report: Callable[[Refresh], None],
    ) -> None:
        self.history = History()
        self._layout = layout
        self._processes = processes
        self._negatives = negatives
        self._miner = miner
        self._asynchronous = asynchronous
        self._record = record
        self._report = report
        self._replay: dict[int, int] = {}

    def start(self) -> None:
        """Start with the negatives of the dataset."""
        first = Refresh(0, "first", due=0, used_from=0)
        first.take(read_account(self._layout.negatives(0)))
        self.history.refreshes = [first]
        self._keep()

    def take_up(self, stored: list[dict[str, Any]], step: int) -> None:
        """Continue from a checkpoint.

        Args:
            stored: The history in the checkpoint.
            step: The step of the checkpoint.

        Raises:
            RuntimeError: The negatives that were in use are missing.
        """
        self.history = History.from_json(stored)
        self._replay = self._processes.share(used_after(self._layout.journal, step))
        current = self.history.current
        try:
            self._negatives.use(current.step)
        except FileNotFoundError as error:
            raise RuntimeError(
                f"step {step} was trained with the negatives of step {current.step}, but {error}: resume with the "
                "folder that the run had, or start anew"
            ) from error
        pending = self.history.pending
        if pending is not None:
            logger.info("taking up the refresh of step %d", pending.step)
            # What was not used when the run was stopped is used when it is due, as if the run had not been stopped.
            pending.due = self._replay.get(pending.step, pending.due)
            pending.waits = pending.due > step
            self._ask(pending, lambda miner: miner.take_up(pending.step, current.step))
            self._settle(pending)
        else:
            self._keep()

    def begin(self, step: int, due: int, max_steps: int) -> None:
        """Begin a refresh after ``step``, to be used after step ``due``."""
        pending = self.history.pending
        if pending is not None:
            logger.warning(
                "step %d: no refresh, for that of step %d is still mining; refresh less often, or with more threads",
                step,
                pending.step,
            )
            return
        if not self._asynchronous:
            due = step
        elif step in self._replay:
            due = self._replay[step]  # when the run that was killed used it, which may have been late
        if due >= max_steps:
            return  # no batch would come after it
        refresh = Refresh(step, "mining", due=due, waits=step in self._replay)
        previous = self.history.current.step
        self.history.refreshes.append(refresh)
        self._ask(refresh, lambda miner: miner.begin(step, previous))
        self._settle(refresh)
        if due == step:
            self.use_what_is_due(step)

    def use_what_is_due(self, step: int) -> None:
        """Use the negatives of the current refresh from the next step on, if it is due and finished."""
        refresh = self.history.pending
        if refresh is None or step < refresh.due:
            return
        previous = self.history.current.step

        def outcome() -> dict[str, Any]:
            ready: list[bool] = []
            error = self._try(lambda m: ready.append(m.finished(refresh.step, previous, wait=refresh.waits)))
            return {"ready": any(ready), "error": error}

        if self._asynchronous and not refresh.waits:
            found = self._processes.share(outcome() if self._processes.first else None)
        else:
            found = self._processes.from_first(outcome)
        refresh.error = found["error"]
        if found["ready"]:
            refresh.status, refresh.used_from = "used", step
            refresh.take(read_account(self._layout.negatives(refresh.step)))
            self._negatives.use(refresh.step)
        if found["ready"] or refresh.error is not None:
            self._settle(refresh)

    def close(self) -> None:
        """End mining."""
        if self._miner is not None:
            self._miner.close()

    def finish(self) -> None:
        """Count a refresh that came too late, when training has ended."""
        pending = self.history.pending
        if pending is not None:
            pending.status = "unused"
            self._settle(pending)

    def _ask(self, refresh: Refresh, work: Callable[[Miner], None]) -> None:
        """Call the first process's miner; all processes learn of a failure."""
        refresh.error = self._processes.share(self._try(work) if self._processes.first else None)

    def _try(self, work: Callable[[Miner], Any]) -> str | None:
        """Run something that may fail without ending the training; return why it failed."""
        assert self._miner is not None
        try:
            work(self._miner)
        except Exception as error:  # training can go on without a refresh
            logger.debug("%s", traceback.format_exc())
            return f"{type(error).__name__}: {error}"
        return None

    def _settle(self, refresh: Refresh) -> None:
        """Record the state of a refresh, and report it if it has ended."""
        if refresh.error is not None:
            refresh.status = "failed"
        self._keep()
        if refresh.status != "mining" and self._processes.first:
            self._layout.snapshot(refresh.step).unlink(missing_ok=True)
            self._report(refresh)

    def _keep(self) -> None:
        """Save the history for the next checkpoint and for a killed run."""
        self._record(self.history.to_json())
        if self._processes.first:
            try:
                write_journal(self._layout.journal, self.history)
            except OSError as error:
                logger.error("%s cannot be written: %s", self._layout.journal, error)
