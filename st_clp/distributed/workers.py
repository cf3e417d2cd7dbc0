"""Workers on a Ray cluster that take pieces of work, one after the other.

Ray places them. Where one is lost, with its process or its node, its pieces go to the others, and a new one is started
as soon as there is room; Ray's own restarts would wait for room with the pieces in hand. A piece must therefore be such
that doing it twice does no harm. Ray Data's pools of actors hand on batches of rows; a piece here is a run of documents
whose result lies on disk under its own name, which is how stopped work is taken up.
"""

from __future__ import annotations

import errno
import gc
import logging
import re
import socket
import sys
import time
import uuid
from collections import Counter, deque
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

from st_clp.distributed.cluster import connect, import_ray, keep
from st_clp.distributed.idle import keep_idle, release_idle, take_idle
from st_clp.options import ClusterOptions

logger = logging.getLogger(__name__)

Piece = TypeVar("Piece", bound=tuple[Any, ...])

IN_HAND = 2  # pieces that a worker has at a time, so that it never waits for the next
RELEASED_SECONDS = 5.0  # within which Ray knows that a stopped worker has left room
LOOK_SECONDS = 5.0  # between looks at whether the cluster has grown
PATIENCE = 30.0  # seconds without any worker, after which it is said
TRIES = 5  # workers that may be lost at one piece, before the piece itself counts as the cause


class Workers:
    """A pool of processes: each builds a callable once, such as a model on its device, and calls it on pieces of work.

    Use them as a context. As many are started as the cluster has room for, more when it grows, and not more than
    ``options.workers``. At the end they are kept for a few seconds, for the next stage of this process.

    Args:
        options: Which cluster, and what each worker takes of it.
        make: Builds the callable; it is sent to the worker and runs there.
        arguments: The arguments of ``make``. Each is stored in the cluster once, however many workers there are.

    Attributes:
        number: The number of workers.
        lost: The number of workers that were lost.
    """

    def __init__(self, options: ClusterOptions, make: Callable[..., Callable[..., Any]], *arguments: Any) -> None:
        self._ray = connect(options)
        self._options = options
        self._kept = [keep(argument) for argument in (make, *arguments)]
        self._takes = self._resources()
        remote = self._ray.remote(_Worker)
        self._kind = remote.options(max_restarts=0, **self._takes)
        self._all: list[Any] = []
        self._taken: list[Any] = []  # of those, the ones that were idle, until they have answered
        self._running: dict[Any, tuple[Any, Any]] = {}
        self._looked = 0.0
        self._name = uuid.uuid4().hex
        self.lost = 0

    @property
    def number(self) -> int:
        """How many there are."""
        return len(self._all)

    def __enter__(self) -> Workers:
        return self

    def __exit__(self, *exception: object) -> None:
        if exception == (None, None, None) and not self._running:
            for worker in self._all:
                worker.forget.remote()
            keep_idle(self._all, self._takes)
            return
        for worker in self._all:
            self._ray.kill(worker, no_restart=True)

    def run(self, pieces: Iterator[Piece]) -> Iterator[tuple[Piece, Any]]:
        """Yield (piece, what the call with it returned) as they are finished.

        Args:
            pieces: The arguments of each call; taken when a worker is free.

        Raises:
            Exception: An error raised by a call; its message names the node.
            RuntimeError: Five workers were lost at the same piece, or could not be started.
        """
        work = _Queue(pieces)
        ready: dict[Any, int] = {}  # worker to how many pieces it has in hand
        starting: dict[Any, Any] = {}
        running: dict[Any, tuple[Any, Piece]] = self._running
        waiting_since, failed_starts = time.monotonic(), 0
        while True:
            starting.update(self._start())
            while ready and ready[worker := min(ready, key=ready.__getitem__)] < IN_HAND:
                piece, alone = work.next(idle=ready[worker] == 0)
                if piece is None:
                    break
                running[worker.call.remote(self._name, self._kept, *piece)] = worker, piece
                ready[worker] += IN_HAND if alone else 1
            if work.over and not running:
                return
            done, _ = self._ray.wait([*running, *starting], num_returns=1, timeout=LOOK_SECONDS)
            if ready:
                waiting_since = time.monotonic()
            elif time.monotonic() - waiting_since > PATIENCE:
                logger.warning("no worker: the cluster has no room for one that takes %s", self._takes)
                waiting_since = time.monotonic()
            for reference in done:
                begun = reference in starting
                worker = starting[reference] if begun else running[reference][0]
                piece = None if begun else running[reference][1]
                try:
                    found = self._ray.get(reference)
                except (self._ray.exceptions.RayActorError, self._ray.exceptions.OutOfMemoryError) as error:
                    self._lose(worker, ready, error)
                    starting.pop(reference, None)
                    running.pop(reference, None)
                    if piece is not None:
                        work.again(piece)
                    elif worker in self._taken:
                        self._taken.remove(worker)
                    elif (failed_starts := failed_starts + 1) >= TRIES:
                        raise RuntimeError(_why_not_started(error)) from error
                    continue
                starting.pop(reference, None)
                running.pop(reference, None)
                if begun:
                    self._taken = [other for other in self._taken if other is not worker]
                    ready[worker] = failed_starts = 0
                    continue
                if worker in ready:
                    ready[worker] = sum(of is worker for of, _ in running.values())
                if isinstance(found, Failure):
                    raise found.as_error()
                assert piece is not None
                yield piece, found

    def _lose(self, worker: Any, ready: dict[Any, int], error: Exception) -> None:
        """Count a worker that is gone, once, and let another be started."""
        ready.pop(worker, None)
        if worker in self._all:
            self._all.remove(worker)
            self._ray.kill(worker, no_restart=True)
            self._looked = 0.0
            if worker in self._taken:
                return  # it was lost while it was idle, and with it nothing
            self.lost += 1
            kind = "out of memory" if isinstance(error, self._ray.exceptions.OutOfMemoryError) else "gone"
            logger.warning("a worker is lost (%s); others go on with its work", kind)

    def _start(self) -> dict[Any, Any]:
        """Start as many workers as there is room for; the reference that says when each is ready, to the worker."""
        if time.monotonic() - self._looked < LOOK_SECONDS and self._all:
            return {}
        self._looked = time.monotonic()
        missing = self._room() - len(self._all)
        taken = take_idle(self._takes, missing)
        self._taken += taken
        new = [*taken, *(self._kind.remote() for _ in range(missing - len(taken)))]
        self._all += new
        return {worker.ready.remote(): worker for worker in new}

    def _room(self) -> int:
        """How many workers the cluster has room for, one at least; not more than were asked for."""
        has = self._ray.cluster_resources()
        room = min(int(has.get(kind, 0) / self._takes[f"num_{kind.lower()}s"]) for kind in self._counted())
        return max(1, min(room, self._options.workers or room))

    def _counted(self) -> list[str]:
        return [kind for kind in ("CPU", "GPU") if self._takes[f"num_{kind.lower()}s"]]

    def _resources(self) -> dict[str, float]:
        """What a worker takes, as Ray's options."""
        return {"num_cpus": self._options.cpus_per_worker, "num_gpus": gpus_per_worker(self._options)}


def gpus_per_worker(options: ClusterOptions) -> float:
    """The number of GPUs of each worker: as the options say, otherwise 1 if the cluster has any."""
    if options.gpus_per_worker is not None:
        return options.gpus_per_worker
    return 1.0 if connect(options).cluster_resources().get("GPU", 0) >= 1 else 0.0


def has_room(options: ClusterOptions) -> bool:
    """Whether the cluster has room for a worker beside what it is doing now; idle workers of this process make room."""
    ray = connect(options)
    ends = time.monotonic() + (RELEASED_SECONDS if release_idle() else 0)
    while True:
        free = ray.available_resources()
        if free.get("CPU", 0) >= options.cpus_per_worker and free.get("GPU", 0) >= gpus_per_worker(options):
            return True
        if time.monotonic() >= ends:
            return False
        time.sleep(0.1)


class _Queue:
    """Pieces that are still to be done, first those of lost workers.

    Any of its pieces may have killed a worker, so each is given to a worker that has no other piece: if that worker is
    lost too, it is clear which piece did it.
    """

    def __init__(self, pieces: Iterator[Any]) -> None:
        self._pieces: Iterator[Any] = pieces
        self._again: deque[Any] = deque()
        self._lost: Counter[Any] = Counter()
        self._more = True

    @property
    def over(self) -> bool:
        """Whether all were taken."""
        return not self._more and not self._again

    def next(self, *, idle: bool) -> tuple[Any, bool]:
        """(the next piece for a worker, idle or not; whether it is to get no other beside it).

        None in place of a piece where there is none by now.
        """
        if self._again and idle:
            return self._again.popleft(), True
        piece = next(self._pieces, None) if self._more else None
        self._more = piece is not None
        return piece, False

    def again(self, piece: Any) -> None:
        """Put a lost worker's piece back into the queue.

        Raises:
            RuntimeError: Too many were lost that had it.
        """
        self._again.append(piece)
        self._lost[piece] += 1
        if self._lost[piece] >= TRIES:
            raise RuntimeError(
                f"{TRIES} workers were lost at the same work ({_named(piece)}): give each more memory, or "
                "look into Ray's logs for what ends them"
            )


def _why_not_started(error: Exception) -> str:
    """Ray's traceback of a worker that could not be started, as one sentence with the name of its machine."""
    text = re.sub(r"\x1b\[[0-9;]*m", "", str(error)).strip()
    machine = re.search(r"\bip=([^,\s)]+)", text)
    where = f"on the machine {machine[1]}" if machine else "on the cluster"
    hint = "; st-clp must be installed on every machine" if "ModuleNotFoundError" in text else ""
    return f"workers cannot be started {where}: {text.splitlines()[-1] if text else type(error).__name__}{hint}"


def _named(piece: tuple[Any, ...]) -> str:
    """A readable name of a piece: its numbers and texts, without its large contents."""
    return ", ".join(str(part) for part in piece if isinstance(part, (int, str)))


class Failure:
    """An error raised by a call, as it is sent to the driver."""

    def __init__(self, error: Exception, node: str) -> None:
        self._kind: type[Exception] = type(error)
        hint = " (every machine of the cluster must find it there)" if _is_of_absence(error) else ""
        self._text = f"on node {node}: {error}{hint}"

    def as_error(self) -> Exception:
        """The error, of its original type if that can be made from a message alone."""
        try:
            return self._kind(self._text)
        except TypeError:
            return RuntimeError(f"{self._kind.__name__} {self._text}")


def _is_of_absence(error: BaseException | None) -> bool:
    """Whether a file or an address is not to be found (what libraries raise of those has no number), or the cause."""
    return error is not None and (
        (isinstance(error, OSError) and error.errno in (None, errno.ENOENT)) or _is_of_absence(error.__cause__)
    )


class _Worker:
    """The Ray actor."""

    def __init__(self) -> None:
        self._made: Callable[..., Any] | None = None
        self._pool = ""

    def ready(self) -> bool:
        """Whether the process is there. The first call makes the callable, so that its errors are reported."""
        return True

    def forget(self) -> None:
        """Let go of what was made, with a model's memory."""
        self._made = None
        gc.collect()
        if (torch := sys.modules.get("torch")) is not None and torch.cuda.is_initialized():
            torch.cuda.empty_cache()

    def call(self, pool: str, kept: list[Any], *piece: Any) -> Any:
        """The result, or the failure.

        Args:
            pool: Names the pool that this worker belongs to now.
            kept: References to what makes the thing to call, and to its arguments; the first call fetches them.
            *piece: The arguments.
        """
        try:
            if self._made is None or self._pool != pool:
                make, *arguments = import_ray().get(kept)
                self._made, self._pool = make(*arguments), pool
            return self._made(*piece)
        except Exception as error:  # of whatever the call reads, encodes and writes
            return Failure(error, socket.gethostname())
