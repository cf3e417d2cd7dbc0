"""Requests to an endpoint by the openai client: their rate, and their results and failures."""

from __future__ import annotations

import email.utils
import logging
import math
import os
import random
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from st_clp.extras import import_package
from st_clp.option_values import read_key, require_address, require_key_variable
from st_clp.queries.interface import Usage

logger = logging.getLogger(__name__)

FIRST_WAIT, LONGEST_WAIT = 0.5, 60.0  # seconds between retries
LONGEST_PAUSE = 120.0  # seconds; an endpoint that asks for more is asked again after these
LONG_PAUSE = 10.0  # seconds, from which on a pause is said


class Pace:
    """Limits the rate of requests, and holds them back during a pause.

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
        """Hold requests back for so long, two minutes at most."""
        wait = min(seconds, LONGEST_PAUSE)
        with self._lock:
            now = time.monotonic()
            begins = self._paused_until <= now  # else others have said it
            self._paused_until = max(self._paused_until, now + wait)
        if begins and wait >= LONG_PAUSE:
            asked = "" if seconds <= LONGEST_PAUSE else f" (it asks for {seconds:,.0f}; a request is tried sooner)"
            logger.warning("the endpoint limits the rate of requests: waiting %.0f seconds%s", wait, asked)


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


OWN_ENDPOINT = "https://api.openai.com/v1"
NO_ANSWER = "no answer of this API"
MOST_TOKENS = 100_000_000  # that one request can take; a count above that is none
# The client's errors before anything was sent: nothing can have been billed.
NEVER_SENT = ("ConnectError", "ConnectTimeout", "PoolTimeout", "UnsupportedProtocol")


class EndpointError(ValueError):
    """The endpoint refuses every request; the message says what to do."""


@dataclass(frozen=True)
class Reply:
    """The model's answer; ``usage`` is None if the endpoint does not report it."""

    content: str | None
    usage: Usage | None


@dataclass(frozen=True)
class Failure:
    """A request that failed.

    Attributes:
        cause: Why.
        passes: Whether a retry may help.
        may_be_billed: Whether the endpoint may have billed it nevertheless.
        retry_after: Seconds that the endpoint asks to wait; None where it does not say.
    """

    cause: str
    passes: bool = True
    may_be_billed: bool = False
    retry_after: float | None = None


class ChatClient:
    """An endpoint and its model.

    Args:
        model: The model's name at the endpoint.
        base_url: Where the API is, such as ``http://localhost:8000/v1``. None: ``OPENAI_BASE_URL``, or else OpenAI's.
        key_variable: The environment variable with the key. The key is in no message, log, file or ``repr``.
        timeout: Seconds to wait for an answer.
        temperature: Of the sampling.

    Raises:
        ValueError: The address carries a password or key, the variable is none, or OpenAI's own endpoint is asked
            without a key.
    """

    def __init__(
        self,
        model: str,
        *,
        base_url: str | None = None,
        key_variable: str = "OPENAI_API_KEY",
        timeout: float = 60.0,
        temperature: float = 0.7,
    ) -> None:
        self.model = model
        self.temperature = temperature
        require_key_variable(key_variable)
        self.base_url = (base_url or os.environ.get("OPENAI_BASE_URL") or OWN_ENDPOINT).rstrip("/")
        self._key_variable = key_variable
        self._timeout = timeout
        self._client: Any = None
        # Parameters that the model or server has refused, left out from then on.
        self._optional: dict[str, Any] = {"response_format": {"type": "json_object"}, "temperature": temperature}
        self._seed = True
        self._limit = "max_tokens"
        host = require_address(self.base_url, key_variable)
        if read_key(key_variable) is None and host == "api.openai.com":
            raise ValueError(
                f"no key for {self.base_url}: put it into the environment variable {key_variable}, or name another "
                "endpoint by its address"
            )

    def __repr__(self) -> str:
        return f"ChatClient({self.model!r}, base_url={self.base_url!r})"

    def open(self, connections: int) -> None:
        """Create the client.

        Raises:
            ModuleNotFoundError: The openai package is not installed.
        """
        self._client = import_openai().OpenAI(
            api_key=read_key(self._key_variable) or "none",  # servers of one's own mostly want none
            base_url=self.base_url,
            timeout=self._timeout,
            max_retries=0,
        )

    def close(self) -> None:
        """Close all connections."""
        if self._client is not None:
            self._client.close()

    def send(self, message: str, *, max_tokens: int, seed: int, identity: str) -> Reply | Failure:
        """Send one message.

        Args:
            message: Of the user's role.
            max_tokens: Tokens that the answer may have.
            seed: Of the sampling.
            identity: Sent as ``Idempotency-Key``: endpoints that support it bill requests with the same key once.

        Raises:
            EndpointError: The key or the model is refused.
        """
        openai = import_openai()
        while True:
            optional = {**self._optional, self._limit: max_tokens, **({"seed": seed} if self._seed else {})}
            try:
                answer = self._client.chat.completions.create(
                    model=self.model,
                    messages=[{"role": "user", "content": message}],
                    extra_headers={"Idempotency-Key": identity},
                    **optional,
                )
            except openai.APIStatusError as error:
                if error.status_code in (400, 422) and self._leave_out(str(error), optional):
                    continue
                return self._refused(error)
            except openai.APITimeoutError as error:
                return Failure("timed out", may_be_billed=_was_sent(error))
            except openai.APIConnectionError as error:
                sent = _was_sent(error)
                return Failure("the connection broke" if sent else "no connection", may_be_billed=sent)
            except (openai.APIError, ValueError, TypeError, AttributeError, RecursionError, OverflowError):
                # The answer is not of this API: the client accepts any JSON.
                return Failure(NO_ANSWER, may_be_billed=True)
            return _reply(answer)

    def _leave_out(self, text: str, sent: dict[str, Any]) -> bool:
        """Leave out a parameter that the refusal names; whether there was one."""
        # By what this request had: another, sent at the same moment, may have changed ours already.
        if "max_tokens" in sent and "max_completion_tokens" in text:
            self._limit = "max_completion_tokens"
            return True
        if "seed" in sent and "seed" in text:
            self._seed = False
            return True
        for name in ("response_format", "temperature"):
            if name in sent and name in text:
                self._optional.pop(name, None)
                logger.warning("%s does not take %s; it is left out", self.model, name)
                return True
        return False

    def _refused(self, error: Any) -> Failure:
        """The meaning of a status other than 200. Nothing was answered, so nothing is billed."""
        status = error.status_code
        # The endpoint's own words may repeat the key, and are not passed on.
        if status in (401, 403):
            where = (
                f"the key in {self._key_variable}" if os.environ.get(self._key_variable) else "a request without key"
            )
            advice = f"put the right key into the environment variable {self._key_variable}"
            raise EndpointError(f"{self.base_url} refuses {where} (status {status}): {advice}") from None
        if status == 404:
            raise EndpointError(
                f"{self.base_url} does not have the model {self.model!r} or is not such an endpoint (status 404): "
                "check the model's name and the address, which mostly ends in /v1"
            ) from None
        if status == 429 and getattr(error, "code", None) == "insufficient_quota":
            raise EndpointError(f"{self.base_url}: the account has no credit left (status 429)") from None
        wait = retry_after(error.response.headers)
        if status == 429:
            return Failure("rate limited (429)", retry_after=wait)
        if status in (408, 409, 425) or status >= 500:
            return Failure(f"the endpoint failed ({status})", retry_after=wait)
        return Failure(f"refused ({status})", passes=False)


def import_openai() -> Any:
    """The module ``openai``.

    Raises:
        ModuleNotFoundError: It is not installed; the message says how to.
    """
    return import_package("openai", "writing queries by an endpoint", "st-clp[llm]")


def _was_sent(error: BaseException) -> bool:
    return type(error.__cause__).__name__ not in NEVER_SENT


def _reply(answer: Any) -> Reply | Failure:
    # A page of HTML comes as a text, an error under status 200 without choices, and nothing in it need be of its kind.
    choices = getattr(answer, "choices", None)
    message = getattr(choices[0], "message", None) if isinstance(choices, list) and choices else None
    if message is None or not hasattr(message, "content"):
        return Failure(NO_ANSWER, may_be_billed=True)
    content = message.content
    return Reply(content if isinstance(content, str) else None, _usage(getattr(answer, "usage", None)))


def _usage(counted: Any) -> Usage | None:
    """The usage that the endpoint reports; None if it is missing or impossible."""
    try:
        usage = Usage(int(counted.prompt_tokens), int(counted.completion_tokens))
    except (AttributeError, TypeError, ValueError, OverflowError):
        return None
    # Fewer than none would give back what others have spent, and no model reads or writes so many.
    possible = min(usage.prompt_tokens, usage.completion_tokens) >= 0 and usage.tokens <= MOST_TOKENS
    return usage if possible else None
