"""An endpoint that fails in every way: what is retried, what is counted, what is paid for, and what is never said."""

from __future__ import annotations

import logging
import socket
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from st_clp.data import Document
from st_clp.options import QueryOptions
from st_clp.queries import (
    ChatClient,
    DocumentQueries,
    EndpointError,
    QueryChain,
    QueryStore,
    make_chain,
)

from .conftest import KEY, Endpoint, make_documents


def chain_for(endpoint: Endpoint, store: Path | QueryStore | None = None, **options: Any) -> QueryChain:
    given = {"query_base_url": endpoint.base_url, "query_retries": 3, "query_timeout": 10.0, **options}
    return make_chain("openai:tiny", QueryOptions(**given), store=store, show_progress_bar=False)


def ask(endpoint: Endpoint, documents: list[Document], **options: Any) -> tuple[dict[str, DocumentQueries], Any]:
    with chain_for(endpoint, **options) as chain:
        return chain.generate(documents)


def test_every_document_gets_the_query_that_the_model_wrote_for_it(endpoint: Endpoint) -> None:
    documents = make_documents(20)
    found, account = ask(endpoint, documents, query_concurrency=4)
    assert set(found) == {document.doc_id for document in documents}
    for document in documents:
        (query,) = found[document.doc_id].queries
        assert query.text.startswith("which ")
        assert query.text.endswith(f" {document.doc_id[1:]}")  # its own, and no other document's
        assert (query.source, query.weight) == ("openai", 1.0)
    assert account.usage.tokens == endpoint.tokens
    assert account.usage.requests == len(endpoint.requests) == 20
    assert 1 < endpoint.most_at_once <= 4
    headers, body = endpoint.requests[0]
    assert headers["Authorization"] == f"Bearer {KEY}"
    assert body["model"] == "tiny"
    assert body["max_tokens"] == 80


def test_two_thousand_documents_with_faults_lose_none_and_pay_for_none_twice(
    endpoint: Endpoint, tmp_path: Path
) -> None:
    faults = ["500", "429", "503", "cut", "cut after", "408", "fenced"]

    def fault(document: str, before: int) -> str | None:
        # Every tenth document fails, now and then twice.
        number = int(document)
        return faults[number // 10 % len(faults)] if number % 10 == 3 and before <= number % 20 // 13 else None

    endpoint.fault = fault
    endpoint.latency = 0.05
    documents = make_documents(2000)
    with chain_for(endpoint, tmp_path / "q.sqlite", query_concurrency=32) as chain:
        found, account = chain.generate(documents)
    assert len(found) == 2000
    assert not account.without
    assert endpoint.billed == Counter({str(i): 1 for i in range(2000)})
    assert len(endpoint.requests) > 2150
    assert endpoint.most_at_once > 8  # of 32: server and client share this process, and a slow one answers in between
    # And nothing is asked for again.
    sent = len(endpoint.requests)
    with chain_for(endpoint, tmp_path / "q.sqlite", query_concurrency=32) as chain:
        again, account = chain.generate(documents)
    assert len(endpoint.requests) == sent
    assert {doc_id: answer.queries for doc_id, answer in again.items()} == {d: a.queries for d, a in found.items()}
    assert account.usage.tokens == 0


@pytest.mark.parametrize(
    ("fault", "cause"),
    [("empty", "empty"), ("null", "empty"), ("blank", "empty"), ("long", "far too long"), ("text", "not JSON"),
     ("list", "not JSON"), ("number", "not JSON"), ("language", "the wrong language")],
)  # fmt: skip
def test_nonsense_is_asked_for_again_and_then_counted(
    endpoint: Endpoint, tmp_path: Path, fault: str, cause: str
) -> None:
    endpoint.fault = lambda document, before: fault if document == "1" or (document == "2" and before < 2) else None
    documents = make_documents(4)
    with chain_for(endpoint, tmp_path / "q.sqlite") as chain:
        found, account = chain.generate(documents)
        assert set(found) == {"d0", "d2", "d3"}
        assert account.without == {f"openai: {cause}": 1}
        assert endpoint.billed == {"0": 1, "1": 3, "2": 3, "3": 1}
        assert chain.store.spent()[0] == endpoint.tokens
        # What was paid for is not paid for again, though it is nonsense.
        found, account = chain.generate(documents)
        assert set(found) == {"d0", "d2", "d3"}
        assert account.without == {f"openai: {cause}": 1}
    assert endpoint.billed.total() == len(endpoint.requests) == 8


@pytest.mark.parametrize(
    ("fault", "cause", "requests"),
    [("500", "the endpoint failed (500)", 4), ("429", "rate limited (429)", 4), ("cut", "the connection broke", 4),
     ("slow", "timed out", 4), ("html", "no answer of this API", 4), ("400", "refused (400)", 1)],
)  # fmt: skip
def test_a_failure_is_retried_where_that_helps_and_then_counted(
    endpoint: Endpoint, tmp_path: Path, fault: str, cause: str, requests: int
) -> None:
    endpoint.fault = lambda document, before: fault if document == "1" or (document == "2" and before < 1) else None
    endpoint.slow = 0.5
    expected = {"d0", "d3"} if fault == "400" else {"d0", "d2", "d3"}
    with chain_for(endpoint, tmp_path / "q.sqlite", query_timeout=0.25) as chain:
        found, account = chain.generate(make_documents(4))
        spent, _ = chain.store.spent()
    assert set(found) == expected
    assert account.without == {f"openai: {cause}": 4 - len(expected)}
    # What nobody knows the fate of counts at its worst; what was refused was not billed.
    assert spent - endpoint.tokens >= (5 * 80 if fault in ("cut", "slow", "html") else 0)
    assert spent >= endpoint.tokens
    assert fault in ("cut", "slow", "html") or spent == endpoint.tokens
    assert sum("document 1 " in body["messages"][0]["content"] for _, body in endpoint.requests) == requests
    # An endpoint that has recovered is asked again for what it could not answer.
    endpoint.fault = lambda document, before: None
    with chain_for(endpoint, tmp_path / "q.sqlite") as chain:
        found, account = chain.generate(make_documents(4))
    assert len(found) == 4
    assert not account.without


def test_an_endpoint_that_is_down_is_given_up_on(
    endpoint: Endpoint, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        base_url = f"http://127.0.0.1:{free.getsockname()[1]}/v1"
    started = time.perf_counter()
    with chain_for(endpoint, tmp_path / "q.sqlite", query_base_url=base_url, query_budget_tokens=10**7) as chain:
        found, account = chain.generate(make_documents(500))
        assert chain.store.spent() == (0, 0)  # nothing was sent, so nothing can have been billed
    assert not found
    assert time.perf_counter() - started < 5
    assert account.without["openai: no connection"] >= 10
    assert account.without.total() == 500
    assert account.without["openai: not asked for: too many documents in a row had failed"] > 450


@pytest.mark.parametrize(
    ("fault", "message"),
    [("401", r"refuses the key in OPENAI_API_KEY \(status 401\).*put the right key"), ("403", "status 403"),
     ("404", "does not have the model 'tiny'"), ("quota", "no credit left")],
)  # fmt: skip
def test_what_every_request_would_meet_stops_at_once_and_keeps_what_was_answered(
    endpoint: Endpoint, tmp_path: Path, fault: str, message: str
) -> None:
    endpoint.fault = lambda document, before: fault if int(document) >= 12 else None
    store = QueryStore(tmp_path / "q.sqlite")
    chain = chain_for(endpoint, store, query_concurrency=2)
    with pytest.raises(EndpointError, match=message):
        chain.generate(make_documents(300))
    assert len(endpoint.requests) <= 12 + 2 * 2
    assert len(store) == len(endpoint.billed) >= 10
    assert store.spent()[0] == endpoint.tokens


def test_the_key_is_nowhere_but_in_the_requests(
    endpoint: Endpoint, tmp_path: Path, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    caplog.set_level(logging.DEBUG)
    faults = {"1": "500", "2": "400", "3": "429", "4": "text"}
    endpoint.fault = lambda document, before: faults.get(document)
    said: list[str] = []
    with chain_for(endpoint, tmp_path / "q.sqlite") as chain:
        found, account = chain.generate(make_documents(8))
        said += [repr(found), repr(account), repr(chain), repr(chain.sources[0]), repr(vars(chain.sources[0]))]
        said += [repr(vars(chain.sources[0].source)), chain.sources[0].source.describe()]
        endpoint.fault = lambda document, before: "401"
        with pytest.raises(EndpointError) as refused:
            chain.generate(make_documents(20))
        said += [str(refused.value), repr(refused.value)]
    said += [caplog.text, *capfd.readouterr()]
    said += [path.read_bytes().decode("latin-1") for path in tmp_path.iterdir()]
    assert KEY in endpoint.requests[0][0]["Authorization"]
    assert not any(KEY in text or KEY[-8:] in text for text in said)


def test_addresses_and_keys_that_cannot_be_meant_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    monkeypatch.delenv("OPENAI_BASE_URL", raising=False)
    with pytest.raises(ValueError, match=r"no key for https://api\.openai\.com/v1: put it into the environment"):
        ChatClient("m")
    with pytest.raises(ValueError, match="carries a password or key") as refused:
        ChatClient("m", base_url="http://me:secret@localhost/v1")
    assert "secret" not in str(refused.value)
    with pytest.raises(ValueError, match="carries a password or key") as refused:
        ChatClient("m", base_url="http://localhost/v1?key=secret")
    assert "secret" not in str(refused.value)
    with pytest.raises(ValueError, match="must be like http"):
        ChatClient("m", base_url="localhost:8000")
    assert ChatClient("m", base_url="http://localhost:1/v1/").base_url == "http://localhost:1/v1"
    monkeypatch.setenv("OPENAI_BASE_URL", "http://elsewhere:1/v1")
    assert ChatClient("m").base_url == "http://elsewhere:1/v1"


def test_what_a_server_does_not_take_is_left_out(endpoint: Endpoint) -> None:
    endpoint.refuses = {"max_tokens", "response_format", "seed", "temperature"}
    found, _ = ask(endpoint, make_documents(5), query_concurrency=1)
    assert len(found) == 5
    last = endpoint.requests[-1][1]
    assert not endpoint.refuses & last.keys()
    assert last["max_completion_tokens"] == 80
    assert len(endpoint.requests) == 5 + 4


def test_requests_of_one_moment_all_learn_what_a_server_does_not_take(endpoint: Endpoint) -> None:
    endpoint.refuses = {"max_tokens"}
    found, _ = ask(endpoint, make_documents(60), query_concurrency=16)
    assert len(found) == 60


def test_retry_after_and_the_rate_limit_are_kept(endpoint: Endpoint) -> None:
    ask(endpoint, [Document("d", "document 99 : a river")])  # what is imported is not to be timed
    endpoint.retry_after = "1"
    endpoint.fault = lambda document, before: "429" if document == "0" and before == 0 else None
    started = time.perf_counter()
    found, _ = ask(endpoint, make_documents(3), query_concurrency=1)
    assert len(found) == 3
    assert 1.0 <= time.perf_counter() - started < 4
    started = time.perf_counter()
    found, _ = ask(endpoint, make_documents(10), query_concurrency=10, query_rate=600)
    assert time.perf_counter() - started >= 0.9  # ten requests, a tenth of a second apart
    assert len(found) == 10


def test_the_prompt_is_the_languages_and_the_users_own_comes_first(endpoint: Endpoint, tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.yaml"
    prompts.write_text("default: 'Passage: {document} {\"x\": 1} in {language}'\nno: 'norsk {document}'\n")
    for options, language, expected in [
        ({}, "ko", "검색 질문 1개를 한국어로"),
        ({}, "fi", "in the language of the passage"),
        ({"query_prompts": str(prompts)}, "ko", 'the a of {"x": 1} in ko'),
        ({"query_prompts": str(prompts)}, "no", "norsk document 0"),
    ]:
        with chain_for(endpoint, **options) as chain:
            chain.generate([Document("d", "document 0 : the a of")], language=language)
        assert expected in endpoint.requests[-1][1]["messages"][0]["content"]
    prompts.write_text("ko: no place\n")
    with pytest.raises(ValueError, match=r"'ko' has no \{document\}"):
        chain_for(endpoint, query_prompts=str(prompts))
