"""Endpoints that answer anything at all, wait times that nobody can mean, and keys where no key belongs."""

from __future__ import annotations

import json
import logging
import threading
import time
from datetime import datetime, timedelta, timezone
from email.utils import format_datetime
from pathlib import Path
from typing import Any

import pytest

from st_clp.queries import Budget, ChatClient, Prices, QueryOptions, QueryStore, Usage
from st_clp.queries.chat import LONGEST_PAUSE, Pace, back_off, retry_after

from .conftest import Endpoint, make_documents
from .test_endpoint import chain_for

DEEP = "[" * 100_000 + "]" * 100_000


def completion(content: Any = '{"query": "which red river"}', **usage: Any) -> str:
    message = {"role": "assistant", "content": content}
    choices = [{"index": 0, "finish_reason": "stop", "message": message}]
    given = {"prompt_tokens": 7, "completion_tokens": 5, **usage}
    return json.dumps({"id": "x", "object": "chat.completion", "model": "m", "choices": choices, "usage": given})


NO_ANSWERS = {
    "null choice": '{"choices": [null]}',
    "text choice": '{"choices": ["x"]}',
    "choices of another kind": '{"choices": {"0": 1}}',
    "choices a text": '{"choices": "abc"}',
    "no message": '{"choices": [{"message": null}]}',
    "message a text": '{"choices": [{"message": "x"}]}',
    "a list": "[1, 2]",
    "a text": '"x"',
    "deep": DEEP,
    "deep in choices": f'{{"choices": {DEEP}}}',
}
NONSENSE = {
    "deep content": completion(DEEP),
    "half a surrogate": '{"choices": [{"message": {"content": "{\\"query\\": \\"which \\\\ud83d river\\"}"}}]}',
    "half a surrogate outside": '{"choices": [{"message": {"content": "{\\"query\\": \\"which \\ud83d river\\"}"}}]}',
    "content a list": completion([1, 2]),
    "query an object": completion('{"query": {"a": 1}}'),
    "many digits": completion('{"query": ' + "9" * 5000 + "}"),
}


@pytest.mark.parametrize("answer", [*NO_ANSWERS, *NONSENSE])
def test_a_bad_answer_costs_one_document(endpoint: Endpoint, tmp_path: Path, answer: str) -> None:
    raw = {**NO_ANSWERS, **NONSENSE}[answer]
    endpoint.fault = lambda document, before: raw if document == "1" else None
    with chain_for(endpoint, tmp_path / "q.sqlite", query_retries=1) as chain:
        found, account = chain.generate(make_documents(4))
        assert len(chain.store) == (4 if answer in NONSENSE else 3)
    assert set(found) == {"d0", "d2", "d3"}
    assert account.without.total() == 1
    assert (account.without == {"openai: no answer of this API": 1}) is (answer in NO_ANSWERS)


COUNTS = {
    "negative": {"prompt_tokens": -12_000_000_000, "completion_tokens": -60},
    "one negative": {"completion_tokens": -1},
    "beyond 64 bits": {"prompt_tokens": 10**30},
    "absurd": {"completion_tokens": 10**15},
    "infinite": {"prompt_tokens": 1e999},
    "no number": {"prompt_tokens": float("nan")},
    "a text": {"prompt_tokens": "many"},
    "none": {"prompt_tokens": None},
    "a list": {"prompt_tokens": [1]},
}


@pytest.mark.parametrize("counts", COUNTS)
def test_a_count_that_cannot_be_leaves_the_worst_case(endpoint: Endpoint, tmp_path: Path, counts: str) -> None:
    endpoint.fault = lambda document, before: completion(**COUNTS[counts])
    limit = 3000
    with chain_for(endpoint, tmp_path / "q.sqlite", query_budget_tokens=limit) as chain:
        found, account = chain.generate(make_documents(40))
        spent, _ = chain.store.spent()
    assert 0 < len(found) == len(endpoint.requests) < 40
    assert account.without == {"openai: the budget is used up": 40 - len(found)}
    assert limit - 600 < spent <= limit
    assert (account.usage.tokens, account.usage.uncounted_tokens) == (0, spent)


def test_what_was_not_answered_is_not_said_to_be_read_and_written(endpoint: Endpoint, tmp_path: Path) -> None:
    endpoint.fault = lambda document, before: "html" if document == "1" else None
    with chain_for(endpoint, tmp_path / "q.sqlite", query_retries=2) as chain:
        _, account = chain.generate(make_documents(3))
        spent, _ = chain.store.spent()
    assert account.usage.tokens == endpoint.tokens
    assert account.usage.uncounted_tokens == spent - endpoint.tokens > 3 * 80
    assert account.usage.requests == 5


@pytest.mark.parametrize("value", ["inf", "-inf", "nan", "-5", "soon", "", "1e400", "Mon, 99 Foo 20000 00:00:00 GMT"])
def test_a_wait_that_cannot_be_meant_is_as_good_as_none(value: str) -> None:
    assert retry_after({"retry-after": value}) is None


def test_waits_as_seconds_and_dates() -> None:
    assert retry_after({"retry-after": "7"}) == 7
    assert retry_after({"retry-after": "0"}) == 0
    assert retry_after({}) is None
    soon = format_datetime(datetime.now(timezone.utc) + timedelta(seconds=30), usegmt=True)
    assert 20 < (retry_after({"retry-after": soon}) or 0) <= 30
    assert retry_after({"retry-after": "Mon, 01 Jan 2001 00:00:00 GMT"}) == 0
    assert (retry_after({"retry-after": "Fri, 31 Dec 9999 23:59:59 GMT"}) or 0) > 1e9


def test_a_long_wait_has_an_end_and_is_said(caplog: pytest.LogCaptureFixture) -> None:
    pace = Pace()
    for seconds in (3600.0, 1e300):
        pace.pause(seconds)
    assert caplog.messages == [
        "the endpoint limits the rate of requests: waiting 120 seconds (it asks for 3,600; a request is tried sooner)"
    ]
    stop = threading.Event()
    waiting = threading.Thread(target=pace.wait, args=(stop,))
    waiting.start()
    stop.set()
    waiting.join(5)
    assert not waiting.is_alive()
    assert LONGEST_PAUSE <= 120
    assert 0 < back_off(10**6) <= 60
    Pace(1e-300).wait(stop)


def test_an_endless_retry_after_ends(
    endpoint: Endpoint, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("st_clp.queries.chat.LONGEST_PAUSE", 0.2)
    monkeypatch.setattr("st_clp.queries.chat.LONG_PAUSE", 0.1)
    for value, said in (("inf", False), ("99999999999", True)):
        endpoint.retry_after = value
        endpoint.fault = lambda document, before: "429" if before < 1 else None
        started = time.perf_counter()
        with caplog.at_level(logging.WARNING), chain_for(endpoint) as chain:
            found, _ = chain.generate(make_documents(3))
        assert len(found) == 3
        assert time.perf_counter() - started < 5
        assert ("limits the rate" in caplog.text) is said
        endpoint._asked.clear()


@pytest.mark.parametrize("key", ["sk-proj-abc_DEF-123", "gsk_abcDEF123", "AIzaSyD123", "AKIA0123456789", "a b", ""])
def test_a_key_in_place_of_its_variable_s_name_is_never_said(key: str) -> None:
    for make in (lambda: QueryOptions(query_key_variable=key), lambda: ChatClient("m", key_variable=key)):
        with pytest.raises(ValueError, match="takes the name of an environment variable") as refused:
            make()
        assert not key or key not in str(refused.value)


def test_variables_that_are_set_or_look_like_it_are_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("my.key", "k")
    for name in ("my.key", "GEMINI_API_KEY", "KEY_2"):
        QueryOptions(query_key_variable=name)
    monkeypatch.setenv("my.key", "sk-secret\n")
    with pytest.raises(ValueError, match="holds a space, a line break") as refused:
        ChatClient("m", base_url="http://localhost:1/v1", key_variable="my.key")
    assert "secret" not in str(refused.value)


@pytest.mark.parametrize(
    "address",
    ["sk-secret", "sk-secret:x", "sk-secret://host", "http://me:secret@host/v1", "http://host/v1?key=secret",
     "http://host/v1#secret", "http://secret\u2100@host/v1", "http://[secret", "http://host:secret/v1"],
)  # fmt: skip
def test_a_key_in_an_address_is_never_said(address: str) -> None:
    for make in (lambda: QueryOptions(query_base_url=address), lambda: ChatClient("m", base_url=address)):
        with pytest.raises(ValueError, match="address") as refused:
            make()
        assert "secret" not in str(refused.value)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"query_temperature": float("inf")}, "query_temperature must be a finite number"),
        ({"query_temperature": float("nan")}, "query_temperature must be a finite number"),
        ({"query_timeout": float("inf")}, "query_timeout must be a finite number"),
        ({"query_timeout": 1e9}, "query_timeout must be above 0 and at most 86,400"),
        ({"query_rate": float("nan")}, "query_rate must be a finite number"),
        ({"query_budget": float("inf"), "query_price_prompt": 1.0, "query_price_completion": 1.0}, "finite"),
        ({"query_price_prompt": float("inf"), "query_price_completion": 1.0}, "finite"),
        ({"query_price_prompt": 1e30, "query_price_completion": 1.0}, "at most 1,000,000"),
    ],
)
def test_numbers_without_an_end_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        QueryOptions(**options)


def test_limits_beyond_what_can_be_counted() -> None:
    with QueryStore() as store:
        budget = Budget(store, max_tokens=10**40, max_cost=1e300, prices=Prices(1e6, 1e6))
        reservation = budget.reserve(10**6, 10**3)
        assert reservation is not None
        assert budget.settle(reservation, Usage(10, 10)).tokens == 20
        assert budget.left()
