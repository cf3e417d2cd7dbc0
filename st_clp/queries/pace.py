"""When the next request may be sent: a rate limit, pauses that the endpoint asks for, and waiting between retries."""

from __future__ import annotations

import email.utils
import logging
import math
import random
import threading
import time
from collections.abc import Mapping

logger = logging.getLogger(__name__)

FIRST_WAIT, LONGEST_WAIT = 0.5, 60.0  # seconds between retries
LONGEST_PAUSE = 120.0  # seconds; an endpoint that asks for more is asked again after these
LONG_PAUSE = 10.0  # seconds, from which on a pause is said


class Pace:
    """Lets requests through at a rate, and none during a pause.

    Args:
        requests_per_minute: No more than this; None: no limit.
    """

    def __init__(self, requests_per_minute: float | None = None) -> None:
        self._interval = 0.0 if requests_per_minute is None else 60.0 / requests_per_minute
        self._lock = threading.Lock()
        self._next = 0.0
        self._paused_until = 0.0

    def wait(self, stop: threading.Event) -> None:
        """Wait until the next request may be sent, or until ``stop`` is set."""
        with self._lock:
            start = max(time.monotonic(), self._next)
            self._next = start + self._interval
        while not stop.is_set():
            with self._lock:
                left = max(start, self._paused_until) - time.monotonic()
            if left <= 0:
                return
            stop.wait(min(left, LONGEST_PAUSE))

    def pause(self, seconds: float) -> None:
        """Let no request through for so long, two minutes at most."""
        wait = min(seconds, LONGEST_PAUSE)
        with self._lock:
            now = time.monotonic()
            begins = self._paused_until <= now  # else others have said it
            self._paused_until = max(self._paused_until, now + wait)
        if begins and wait >= LONG_PAUSE:
            asked = "" if seconds <= LONGEST_PAUSE else f" (it asks for {seconds:,.0f}, and is asked again sooner)"
            logger.warning("the endpoint wants to be left alone: no request for %.0f seconds%s", wait, asked)


def back_off(attempt: int) -> float:
    """Seconds to wait before the retry of this number, from 0: twice as long each time, with jitter."""
    # Retries of requests that failed together must not come together: no seed here.
    return min(LONGEST_WAIT, FIRST_WAIT * 2 ** min(attempt, 30)) * random.uniform(0.5, 1.0)


def retry_after(headers: Mapping[str, str]) -> float | None:
    """Seconds that a ``Retry-After`` header asks for, given as seconds or as a date; None without one that says it."""
    value = headers.get("retry-after")
    if value is None:
        return None
    try:
        seconds = float(value)
    except ValueError:
        try:
            seconds = max(0.0, email.utils.parsedate_to_datetime(value).timestamp() - time.time())
        except (TypeError, ValueError, OverflowError):
            return None
    return seconds if 0 <= seconds < math.inf else None
