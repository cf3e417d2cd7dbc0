"""Endpoints that answer badly, and addresses, keys and budgets that cannot be meant."""

from __future__ import annotations

import json
from typing import Any

from cases import Case, Place
from endpoint import Answer, completion

GOOD = json.dumps({"query": "which river"})
KEY = "sk-another-key-of-the-campaigns-42"
NOBODY = "http://127.0.0.1:9/v1"  # nobody listens at the discard port
NO_TOKENS = "tokens read and written this time"


def _with_choices(choices: Any) -> dict[str, Any]:
    return {**completion(GOOD), "choices": choices}


def _saying(raw: bytes) -> bytes:
    return json.dumps(completion("SAID")).encode().replace(b"SAID", raw)


# What one document of six is answered: it costs that document's query at most.
BAD_ANSWERS: dict[str, Any] = {
    "choices of null": _with_choices([None]),
    "choices that are texts": _with_choices(["x"]),
    "no choices": _with_choices([]),
    "a message of null": _with_choices([{"index": 0, "message": None}]),
    "an answer that is a number": 7,
    "an answer that is a list": [completion(GOOD)],
    "an answer nested too deep": b"[" * 100_000 + b"]" * 100_000,
    "a content nested too deep": completion("[" * 100_000 + "]" * 100_000),
    "a query with half a surrogate": completion('{"query": "which \\ud83d river"}'),
    "a content with half a surrogate": _saying(b"\\ud83d"),
    "an answer that is not UTF-8": _saying(b"caf\xe9"),
    "a page of HTML": b"<html>welcome</html>",
    "an empty answer": b"",
}
BAD_COUNTS: dict[str, Any] = {
    "token counts beyond 64 bits": completion(GOOD, prompt_tokens=10**30, completion_tokens=10**30),
    "negative token counts": completion(GOOD, prompt_tokens=-(10**10), completion_tokens=-5),
    "token counts that are text": completion(GOOD, prompt_tokens="many"),
    "token counts that are infinite": completion(GOOD, prompt_tokens=1e400),
}
STATUSES: dict[str, tuple[int, dict[str, str], str]] = {
    "a key that is refused": (401, {}, r"refuses the key in OPENAI_API_KEY \(status 401\): put the right key"),
    "a model that is not there": (404, {}, r"does not have the model 'tiny'.*404"),
    "Retry-After: inf": (429, {"Retry-After": "inf"}, r"rate limited \(429\)"),
    "Retry-After: nan": (429, {"Retry-After": "nan"}, r"rate limited \(429\)"),
    "Retry-After: a word": (503, {"Retry-After": "soon"}, r"the endpoint failed \(503\)"),
}
ANSWERS = [
    Answer(200, content if isinstance(content, bytes) else json.dumps(content).encode(), {})
    for content in (*BAD_ANSWERS.values(), *BAD_COUNTS.values())
] + [Answer(status, b'{"error": {"message": "no"}}', headers) for status, headers, _ in STATUSES.values()]


def _answered(name: str, message: str, **options: Any) -> Case:
    number = [*BAD_ANSWERS, *BAD_COUNTS, *STATUSES].index(name)

    def build(place: Place) -> list[str]:
        url = place.materials.endpoint.bad_url(number)
        given = ("--query-base-url", url, "--query-retries", "0", "--query-budget-tokens", "1000000")
        return place.queries("--negative-queries", "openai:tiny", *given)

    return Case(f"endpoint: {name}", build, message, **options)


def _refused(name: str, message: str, *more: str, sources: str = "openai:tiny", **options: Any) -> Case:
    return Case(name, lambda place: place.queries("--negative-queries", sources, *more), message, **options)


def _no_place_for_the_document(place: Place) -> list[str]:
    prompts = str(place.write("prompts.yaml", "en: write a query\n"))
    return place.queries("--negative-queries", "openai:tiny", "--query-prompts", prompts, "--query-base-url", NOBODY)


CASES = [
    *(_answered(name, "5 of 6 documents have a query.*1 without one, openai: ", code=0) for name in BAD_ANSWERS),
    # what was spent is never less than nothing, and never more than was set aside
    *(_answered(name, "6 of 6 documents have a query", code=0, never=("-10", "e+30")) for name in BAD_COUNTS),
    *(
        _answered(name, message, code=int(status in (401, 404)), leaves=True, never=(NO_TOKENS,))
        for name, (status, _, message) in STATUSES.items()
    ),
    _refused(
        "endpoint: nobody listens",
        "6 without one, openai: no connection",
        *("--query-base-url", NOBODY, "--query-retries", "0"),
        code=0,
        never=(NO_TOKENS,),
    ),
    _refused(
        "the key itself in place of its variable's name",
        "query_key_variable|environment variable",
        *("--query-key-variable", KEY),
        never=(KEY,),
    ),
    _refused(
        "a key in the endpoint's address",
        "carries a password or key|leave it out",
        *("--query-base-url", f"http://user:{KEY}@localhost:1/v1"),
        never=(KEY,),
    ),
    _refused("an address that is none", "address must be like", "--query-base-url", "localhost:8000"),
    _refused("a port that is none", "address|port", "--query-base-url", "http://localhost:99999999/v1"),
    _refused("no key for OpenAI", "no key for https://api.openai.com", environment={"OPENAI_API_KEY": ""}),
    _refused("a source that is none", "there is no source 'titel'", sources="titel"),
    _refused("a source without its model", "'local' must be local:MODEL", sources="judgments,local"),
    _refused("a source twice", "stands twice", sources="title,title"),
    _refused("a local model that is not there", "/nowhere", sources="local:/nowhere"),
    _refused("a budget in money without prices", "prices", "--query-budget", "5", sources="title"),
    _refused("a budget below nothing", "at least 0", "--query-budget-tokens=-5", sources="title"),
    _refused("one price of two", "both prices", "--query-price-prompt", "1", sources="title"),
    _refused("a price of NaN", "at least 0|finite", "--query-price-prompt=nan", "--query-price-completion=1"),
    _refused("prompts that are not there", "/nowhere.yaml is not there", "--query-prompts", "/nowhere.yaml"),
    Case("a prompt without a place for the document", _no_place_for_the_document, r"\{document\}"),
]
