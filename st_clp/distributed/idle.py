"""Workers that have finished a stage's work: kept for a few seconds, for the next stage.

A worker takes five seconds to start, most of them for imports, and an evaluation in eighteen languages has dozens of
stages. An idle worker keeps its process and its place in the cluster, but not the model it had loaded.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from st_clp.distributed.cluster import import_ray

IDLE_SECONDS = 15.0


@dataclass(frozen=True)
class _Idle:
    """A worker, where it is, and what it takes."""

    worker: Any
    session: str
    takes: dict[str, float]


_lock = threading.Lock()
_kept: list[_Idle] = []
_timer: threading.Timer | None = None


def keep_idle(workers: Sequence[Any], takes: dict[str, float]) -> None:
    """Keep workers without work for some seconds, then stop them.

    Args:
        workers: Ray's handles.
        takes: What each takes of the cluster, as Ray's options.
    """
    global _timer
    with _lock:
        _kept.extend(_Idle(worker, _session(), takes) for worker in workers)
        if _timer is not None:
            _timer.cancel()
        _timer = threading.Timer(IDLE_SECONDS, release_idle)
        _timer.daemon = True
        _timer.start()


def take_idle(takes: dict[str, float], number: int) -> list[Any]:
    """At most so many idle workers that take just this; those that take something else are stopped."""
    with _lock:
        fitting = [idle for idle in _kept if idle.session == _session() and idle.takes == takes][:number]
        _stop([idle for idle in _kept if idle.takes != takes])
        _kept[:] = [idle for idle in _kept if idle not in fitting and idle.takes == takes]
    return [idle.worker for idle in fitting]


def release_idle() -> bool:
    """Stop all idle workers, so that others have room; returns whether there were any."""
    with _lock:
        released = list(_kept)
        _kept.clear()
        _stop(released)
    return bool(released)


def _stop(idle: Sequence[_Idle]) -> None:
    ray = import_ray()
    if not ray.is_initialized():
        return  # they ended with the connection
    for one in idle:
        if one.session == _session():
            with contextlib.suppress(Exception):  # it may have been lost meanwhile
                ray.kill(one.worker, no_restart=True)


def _session() -> str:
    """Names this connection to a cluster: handles of an earlier one are of no use."""
    context = import_ray().get_runtime_context()
    return f"{context.gcs_address} {context.get_job_id()}"
