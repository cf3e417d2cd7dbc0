"""Queries by any endpoint with the OpenAI chat completions API: hosted, vLLM, Ollama, Gemini's."""

from __future__ import annotations

import hashlib
import logging
import math
import random
import threading
from collections.abc import Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from fractions import Fraction

from st_clp.data import Document
from st_clp.queries.chat import ChatClient, EndpointError, Failure, Pace, Reply, back_off, import_openai
from st_clp.queries.interface import DocumentQueries, GeneratingSource, SourceEstimate, Usage
from st_clp.queries.query_store import NANO, QueryStore
from st_clp.queries.wording import Prompts, fill, read_reply

HIGHEST_PRICE = 1_000_000
BEYOND_COUNTING = 2**62  # SQLite's whole numbers have 64 bits


@dataclass(frozen=True)
class Prices:
    """Prices for a million tokens, of the prompt and of the completion."""

    prompt: float
    completion: float

    def nano(self, prompt_tokens: int, completion_tokens: int) -> int:
        """The price in billionths, rounded up."""
        price = Fraction(self.prompt) * prompt_tokens + Fraction(self.completion) * completion_tokens
        return math.ceil(price * NANO / 10**6)


@dataclass(frozen=True)
class Reservation:
    """The highest possible cost of a request, reserved before it is sent."""

    prompt_tokens: int
    completion_tokens: int
    nano: int


class Budget:
    """Reserves the highest possible cost before a request is sent, and settles the actual cost afterwards.

    Spending is recorded in the store, so the limits hold for all processes that share it and across kills; a request
    that was in flight when its process was killed counts at its highest possible cost.

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
        # A limit above the largest integer is never reached.
        self._max_tokens = None if max_tokens is None else min(max_tokens, BEYOND_COUNTING)
        self._max_nano = None if max_cost is None else min(math.floor(Fraction(max_cost) * NANO), BEYOND_COUNTING)
        self._in_flight = 0
        self._settled = threading.Condition()

    def reserve(self, prompt_tokens: int, completion_tokens: int) -> Reservation | None:
        """Reserve the highest possible cost of a request.

        Waits while requests that are in flight may yet leave room.

        Returns:
            None if the request could exceed a limit, so that it must not be sent.
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
        """Replace a reservation by the actual cost.

        Args:
            reservation: From :meth:`reserve`.
            usage: The reported usage; None if it is unknown, so that the reservation stays.

        Returns:
            The usage that counts as spent.
        """
        worst = reservation.prompt_tokens + reservation.completion_tokens
        try:
            if usage is None:
                return Usage(cost=reservation.nano / NANO, requests=1, uncounted_tokens=worst)
            nano = self._nano(usage.prompt_tokens, usage.completion_tokens)
            self._store.spend(usage.tokens - worst, nano - reservation.nano)
            return Usage(usage.prompt_tokens, usage.completion_tokens, nano / NANO, requests=1)
        finally:
            with self._settled:  # in any case: others wait for it
                self._in_flight -= 1
                self._settled.notify_all()

    def left(self) -> bool:
        """Whether any budget is left."""
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


logger = logging.getLogger(__name__)

BUDGET_USED_UP = "the budget is used up"
GIVEN_UP = "not asked for: too many documents in a row had failed"
STOPPED = "stopped"
GIVE_UP_AFTER = 10  # documents in a row that failed, each after its retries
NONSENSE_RETRIES = 2  # each is paid for
CHAT_OVERHEAD = 64  # tokens that a chat template may put around a message
BYTES_A_TOKEN = 4  # about, for an estimate; a bound is one


class EndpointQueries(GeneratingSource):
    """Queries by an endpoint, several requests at a time.

    Temporary refusals (429, 5xx), time-outs and broken connections are retried with exponential back-off and jitter, or
    after the time in ``Retry-After``. After a useless answer (empty, far too long, not JSON, another script) the query
    is asked for twice more, and then the document is left without one. The client's own retries are off, so that every
    request is counted.

    Args:
        client: Sends requests.
        budget: Limits the spending.
        prompts: Templates by language.
        number: Queries for each document, in one request.
        max_tokens: Tokens that an answer may have.
        max_document_characters: A document is cut after so many.
        concurrency: Requests at a time.
        requests_per_minute: No more than this; None: no limit.
        retries: Times that a request that failed is sent again.
        seed: Sent with each request, together with the document's hash; not every endpoint heeds it.
        weight: The weight of the queries.
    """

    name = "openai"

    def __init__(
        self,
        client: ChatClient,
        budget: Budget,
        *,
        prompts: Prompts | None = None,
        number: int = 1,
        max_tokens: int = 128,
        max_document_characters: int = 4000,
        concurrency: int = 8,
        requests_per_minute: float | None = None,
        retries: int = 5,
        seed: int = 0,
        weight: float = 1.0,
    ) -> None:
        self._client = client
        self._budget = budget
        self._prompts = prompts or Prompts()
        self._number = number
        self._max_tokens = max_tokens
        self._cut = max_document_characters
        self._concurrency = concurrency
        self._rate = requests_per_minute
        self._retries = retries
        self._seed = seed
        self.weight = weight
        self._overhead = CHAT_OVERHEAD

    def prepare(self) -> None:
        """Look for the openai package.

        Raises:
            ModuleNotFoundError: It is not installed; the message says how to.
        """
        import_openai()

    def fingerprint(self) -> str:
        """A hash of everything that the answers depend on besides prompt and document."""
        return (
            f"openai\0{self._client.base_url}\0{self._client.model}\0{self._client.temperature}\0{self._number}\0"
            f"{self._max_tokens}\0{self._cut}\0{self._seed}"
        )

    def prompt(self, language: str | None) -> str:
        """The template for documents of a language."""
        return self._prompts.as_chat(language, self._number)

    def describe(self) -> str:
        """The model and the endpoint."""
        return f"{self._client.model} at {self._client.base_url}"

    def estimate(self, documents: Iterable[Document], language: str | None) -> SourceEstimate:
        """Estimate tokens from the bytes of the prompts: about four bytes a token; at most one, with every retry."""
        number = about = bound = 0
        for document in documents:
            size = self._bound(self._message(document, language))
            number, about, bound = number + 1, about + size // BYTES_A_TOKEN, bound + size
        written = number * self._max_tokens
        tries = 1 + NONSENSE_RETRIES
        return SourceEstimate(
            number,
            about,
            written // 4,
            self._budget.cost(about, written // 4),
            Usage(bound * tries, written * tries, self._budget.cost(bound * tries, written * tries) or 0.0),
        )

    def generate(self, documents: Iterable[Document], *, language: str | None = None) -> Iterator[DocumentQueries]:
        """Yield answers as they arrive.

        Raises:
            EndpointError: The endpoint refuses the key or does not have the model; answers that were under way are
                yielded before.
            ModuleNotFoundError: The openai package is not installed; the message says how to.
        """
        work = _Work(self._rate)
        pool = ThreadPoolExecutor(self._concurrency, thread_name_prefix="st_clp-queries")
        self._client.open(self._concurrency)
        running: set[Future[DocumentQueries]] = set()
        feed = iter(documents)
        more = True
        try:
            while more or running:
                while more and len(running) < self._concurrency:
                    document = next(feed, None)
                    if document is None:
                        more = False
                    else:
                        running.add(pool.submit(self._answer, document, language, work))
                done, running = wait(running, return_when=FIRST_COMPLETED)
                errors = [error for future in done if (error := future.exception())]
                if errors:
                    work.stop.set()
                    # Requests in flight may have been paid for.
                    done |= wait(running).done
                    running, more = set(), False
                yield from (future.result() for future in done if future.exception() is None)
                if errors:
                    raise errors[0]
        finally:
            work.stop.set()
            pool.shutdown(wait=False, cancel_futures=True)
            # When the work is interrupted, requests under way are cancelled instead of waited for.
            self._client.close()

    def _message(self, document: Document, language: str | None) -> str:
        return fill(self.prompt(language), document.text[: self._cut])

    def _bound(self, message: str) -> int:
        """An upper bound of the message's tokens: byte-level tokenizers give at most one for each byte."""
        return len(message.encode("utf-8", "replace")) + self._overhead

    def _answer(self, document: Document, language: str | None, work: _Work) -> DocumentQueries:
        """A document's queries, or why there are none."""
        if work.failed_in_a_row >= GIVE_UP_AFTER:
            return DocumentQueries(document.doc_id, cause=GIVEN_UP, final=False)
        message = self._message(document, language)
        identity = hashlib.blake2b(f"{self.fingerprint()}\0{message}".encode("utf-8", "replace"), digest_size=12)
        usage = Usage()
        failures = nonsense = 0
        while not work.stop.is_set():
            work.pace.wait(work.stop)
            reservation = self._budget.reserve(self._bound(message), self._max_tokens)
            if reservation is None:
                return DocumentQueries(document.doc_id, cause=BUDGET_USED_UP, usage=usage, final=False)
            # One key for each request that is paid for, the same for its retries: an endpoint that knows such
            # keys bills them once, though the connection breaks after it has answered.
            found = self._send(message, f"{identity.hexdigest()}-{nonsense}", reservation)
            if isinstance(found, Failure):
                usage += self._budget.settle(reservation, None if found.may_be_billed else Usage())
                if not found.passes or failures >= self._retries:
                    work.failed()
                    return DocumentQueries(document.doc_id, cause=found.cause, usage=usage, final=False)
                pause = found.retry_after
                if pause is not None:
                    work.pace.pause(pause * random.uniform(1.0, 1.1))
                work.stop.wait(back_off(failures) if pause is None else 0.0)
                failures += 1
                continue
            usage += self._settle(reservation, found)
            work.succeeded()
            queries, cause = read_reply(found.content, document.text[: self._cut])
            if queries or nonsense >= NONSENSE_RETRIES:
                return DocumentQueries(document.doc_id, self._mark(queries[: self._number]), cause, usage)
            nonsense += 1
        return DocumentQueries(document.doc_id, cause=STOPPED, usage=usage, final=False)

    def _send(self, message: str, identity: str, reservation: Reservation) -> Reply | Failure:
        try:
            digest = hashlib.blake2b(f"{self._seed}\0{identity}".encode(), digest_size=4).digest()
            seed = int.from_bytes(digest, "big") >> 1
            return self._client.send(message, max_tokens=self._max_tokens, seed=seed, identity=identity)
        except EndpointError:
            self._budget.settle(reservation, Usage())
            raise
        except BaseException:
            self._budget.settle(reservation, None)
            raise

    def _settle(self, reservation: Reservation, reply: Reply) -> Usage:
        if reply.usage is not None and reply.usage.prompt_tokens > reservation.prompt_tokens:
            more = reply.usage.prompt_tokens - reservation.prompt_tokens
            logger.warning(
                "%s counts %d tokens more than a prompt has bytes; from now on as many more are set aside",
                self.describe(),
                more,
            )
            self._overhead += more
        return self._budget.settle(reservation, reply.usage)


class _Work:
    """The state that the requests of one call share."""

    def __init__(self, requests_per_minute: float | None) -> None:
        self.stop = threading.Event()
        self.pace = Pace(requests_per_minute)
        self.failed_in_a_row = 0

    def failed(self) -> None:
        self.failed_in_a_row += 1

    def succeeded(self) -> None:
        self.failed_in_a_row = 0


__all__ = ["BUDGET_USED_UP", "GIVEN_UP", "EndpointError", "EndpointQueries"]
