"""The budget: never passed, whatever is asked at once and whatever the endpoint counts; and what it says."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from st_clp.queries import Budget, Prices, QueryOptions, QueryStore, Usage

from .conftest import Endpoint, make_documents
from .test_endpoint import chain_for

REQUEST = st.tuples(
    st.integers(0, 400),  # bound of the prompt
    st.integers(1, 100),  # bound of what is written
    st.floats(0, 1),  # shares of these that are used
    st.floats(0, 1),
    st.sampled_from(["answered", "unknown", "refused"]),
)


@settings(max_examples=60, deadline=None)
@given(
    requests=st.lists(REQUEST, min_size=1, max_size=40),
    max_tokens=st.one_of(st.none(), st.integers(0, 3000)),
    max_cost=st.one_of(st.none(), st.floats(0, 0.01)),
    prices=st.tuples(st.floats(0, 10), st.floats(0, 30)),
    threads=st.integers(1, 4),
)
def test_no_limit_is_ever_passed(
    requests: list[tuple[int, int, float, float, str]],
    max_tokens: int | None,
    max_cost: float | None,
    prices: tuple[float, float],
    threads: int,
) -> None:
    with QueryStore() as store:
        budget = Budget(store, max_tokens=max_tokens, max_cost=max_cost, prices=Prices(*prices))
        lock = threading.Lock()
        billed_tokens, billed_cost, broken = 0, 0.0, []

        def work(own: list[tuple[int, int, float, float, str]]) -> None:
            nonlocal billed_tokens, billed_cost
            for prompt, completion, read, wrote, fate in own:
                reservation = budget.reserve(prompt, completion)
                if reservation is None:
                    continue
                used = Usage(int(prompt * read), int(completion * wrote))
                with lock:
                    if fate != "refused":  # what became of it is not known, or it was answered: it is billed
                        billed_tokens += used.tokens
                        billed_cost += (used.prompt_tokens * prices[0] + used.completion_tokens * prices[1]) / 1e6
                    tokens, cost = store.spent()
                    if (max_tokens is not None and tokens > max_tokens) or (
                        max_cost is not None and cost > max_cost + 1e-9
                    ):
                        broken.append((tokens, cost))
                budget.settle(reservation, {"answered": used, "unknown": None, "refused": Usage()}[fate])

        workers = [threading.Thread(target=work, args=(requests[n::threads],)) for n in range(threads)]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
        assert not broken
        tokens, cost = store.spent()
        assert billed_tokens <= tokens
        assert billed_cost <= cost + 1e-9
        assert max_tokens is None or tokens <= max_tokens
        assert max_cost is None or cost <= max_cost + 1e-9


@pytest.mark.parametrize("counts_usage", [True, False])
def test_an_endpoint_is_asked_until_the_budget_is_used_up(
    endpoint: Endpoint, tmp_path: Path, counts_usage: bool
) -> None:
    endpoint.counts_usage = counts_usage
    endpoint.latency = 0.002
    documents = make_documents(400)
    limit = 12_000
    with chain_for(endpoint, tmp_path / "q.sqlite", query_budget_tokens=limit) as chain:
        found, account = chain.generate(documents)
        spent, _ = chain.store.spent()
    assert endpoint.tokens <= spent <= limit
    assert 0 < len(found) == len(endpoint.billed) < 400
    assert account.without == {"openai: the budget is used up": 400 - len(found)}
    # Worst cases are set aside, and given back: what is left at the end is less than one request may take.
    assert spent > limit - 600
    # The budget is of the store, so that a second run does not begin at nothing; with more of it, the rest is done.
    sent = len(endpoint.requests)
    with chain_for(endpoint, tmp_path / "q.sqlite", query_budget_tokens=limit) as chain:
        assert len(chain.generate(documents)[0]) == len(found)
    assert len(endpoint.requests) == sent
    with chain_for(endpoint, tmp_path / "q.sqlite", query_budget_tokens=10 * limit * 20) as chain:
        found, account = chain.generate(documents)
    assert len(found) == 400
    assert set(endpoint.billed.values()) == {1}


def test_a_budget_in_money(endpoint: Endpoint, tmp_path: Path) -> None:
    prices = {"query_price_prompt": 3.0, "query_price_completion": 15.0}
    with chain_for(endpoint, tmp_path / "q.sqlite", query_budget=0.01, **prices) as chain:
        found, account = chain.generate(make_documents(200))
        _, cost = chain.store.spent()
    assert 0 < len(found) < 200
    assert account.usage.cost == pytest.approx(cost)
    assert 0.006 < cost <= 0.01
    assert account.without == {"openai: the budget is used up": 200 - len(found)}


def test_a_budget_that_cannot_be_meant_is_refused() -> None:
    with pytest.raises(ValueError, match="a budget in money needs the prices"):
        QueryOptions(query_budget=1.0)
    with pytest.raises(ValueError, match="give both prices"):
        QueryOptions(query_price_prompt=1.0)
    with pytest.raises(ValueError, match="query_budget_tokens must be at least 0, got -1"):
        QueryOptions(query_budget_tokens=-1)


def test_what_cannot_be_settled_keeps_nobody_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever waits for a request that is in flight goes on, though the store breaks when it is settled."""
    with QueryStore() as store:
        budget = Budget(store, max_tokens=100)
        reservation = budget.reserve(60, 30)
        assert reservation is not None
        with ThreadPoolExecutor(1) as pool:
            waiting = pool.submit(budget.reserve, 60, 30)
            monkeypatch.setattr(store, "spend", lambda *arguments: False)
            with pytest.raises(TypeError):
                budget.settle(reservation, Usage("not", "numbers"))  # type: ignore[arg-type]
            assert waiting.result(timeout=10) is None
