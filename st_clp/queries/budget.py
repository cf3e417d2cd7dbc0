"""A budget in tokens or money that is never passed."""

from __future__ import annotations

import math
import threading
from dataclasses import dataclass
from fractions import Fraction

from st_clp.queries.interface import Usage
from st_clp.queries.query_store import NANO, QueryStore

HIGHEST_PRICE = 1_000_000
BEYOND_COUNTING = 2**62  # SQLite's whole numbers have 64 bits


@dataclass(frozen=True)
class Prices:
    """What tokens cost, money for a million of them: those of the prompt, and those that are written."""

    prompt: float
    completion: float

    def nano(self, prompt_tokens: int, completion_tokens: int) -> int:
        """The price in billionths, rounded up."""
        price = Fraction(self.prompt) * prompt_tokens + Fraction(self.completion) * completion_tokens
        return math.ceil(price * NANO / 10**6)


@dataclass(frozen=True)
class Reservation:
    """The worst that a request may cost, set aside before it is sent."""

    prompt_tokens: int
    completion_tokens: int
    nano: int


class Budget:
    """Sets aside the worst case before a request is sent, and settles by what it has cost.

    What was spent is kept in the store, so that the limits hold for all processes that share it and for what a killed
    one had spent; a request that was in flight when its process was killed counts at its worst.

    Args:
        store: Keeps what was spent.
        max_tokens: No more tokens than this, read and written, over everything in the store. None: no limit.
        max_cost: No more money than this, over everything in the store. None: no limit.
        prices: What tokens cost.

    Raises:
        ValueError: A limit or price below 0 or not finite, or a limit in money without prices.
    """

    def __init__(
        self,
        store: QueryStore,
        *,
        max_tokens: int | None = None,
        max_cost: float | None = None,
        prices: Prices | None = None,
    ) -> None:
        given = {"max_tokens": max_tokens, "max_cost": max_cost}
        if prices is not None:
            given |= {"the price of prompt tokens": prices.prompt, "the price of completion tokens": prices.completion}
        for name, value in given.items():
            if value is not None and not 0 <= value < math.inf:
                raise ValueError(f"{name} must be at least 0 and finite, got {value}")
            if name.startswith("the price") and value is not None and value > HIGHEST_PRICE:
                raise ValueError(f"{name} is money for a million of them, at most {HIGHEST_PRICE:,}, got {value:g}")
        if max_cost is not None and prices is None:
            raise ValueError(
                "a budget in money needs the prices of a million prompt tokens and of a million completion tokens"
            )
        self.prices = prices
        self._store = store
        # A limit that is beyond what can be counted is none that anybody reaches.
        self._max_tokens = None if max_tokens is None else min(max_tokens, BEYOND_COUNTING)
        self._max_nano = None if max_cost is None else min(math.floor(Fraction(max_cost) * NANO), BEYOND_COUNTING)
        self._in_flight = 0
        self._settled = threading.Condition()

    def reserve(self, prompt_tokens: int, completion_tokens: int) -> Reservation | None:
        """Set the worst case of a request aside.

        Waits while requests that are in flight may yet leave room.

        Returns:
            None where the request may pass a limit, so that it must not be sent.
        """
        reservation = Reservation(prompt_tokens, completion_tokens, self._nano(prompt_tokens, completion_tokens))
        with self._settled:
            while not self._add(prompt_tokens + completion_tokens, reservation.nano):
                if not self._in_flight:
                    return None
                self._settled.wait(1.0)
            self._in_flight += 1
        return reservation

    def settle(self, reservation: Reservation, usage: Usage | None) -> Usage:
        """Replace the worst case by what the request has cost.

        Args:
            reservation: From :meth:`reserve`.
            usage: What the endpoint counted; None where nobody knows, so that the worst case stays.

        Returns:
            What counts as spent.
        """
        worst = reservation.prompt_tokens + reservation.completion_tokens
        try:
            if usage is None:
                return Usage(cost=reservation.nano / NANO, requests=1, uncounted_tokens=worst)
            nano = self._nano(usage.prompt_tokens, usage.completion_tokens)
            self._store.spend(usage.tokens - worst, nano - reservation.nano)
            return Usage(usage.prompt_tokens, usage.completion_tokens, nano / NANO, requests=1)
        finally:
            with self._settled:  # whatever became of it: others wait for it
                self._in_flight -= 1
                self._settled.notify_all()

    def left(self) -> bool:
        """Whether a limit leaves anything at all."""
        tokens, cost = self._store.spent()
        within = self._max_tokens is None or tokens < self._max_tokens
        return within and (self._max_nano is None or round(cost * NANO) < self._max_nano)

    def cost(self, prompt_tokens: int, completion_tokens: int) -> float | None:
        """Money for so many tokens; None where there are no prices."""
        return None if self.prices is None else self._nano(prompt_tokens, completion_tokens) / NANO

    def _nano(self, prompt_tokens: int, completion_tokens: int) -> int:
        return 0 if self.prices is None else self.prices.nano(prompt_tokens, completion_tokens)

    def _add(self, tokens: int, nano: int) -> bool:
        return self._store.spend(tokens, nano, self._max_tokens, self._max_nano)
