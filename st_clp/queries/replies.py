"""What an endpoint's model answered: the queries in its JSON, or what is wrong with it."""

from __future__ import annotations

import json
import re

from st_clp.queries.wording import EMPTY, NOT_JSON, clean, fault

_FENCE = re.compile(r"^```\w*\s*|\s*```$")
_THOUGHT = re.compile(r"^\s*<think>.*?</think>", re.DOTALL)  # models that think aloud do so before they answer


def read_reply(content: str | None, document: str) -> tuple[list[str], str | None]:
    """(the queries of a reply, None), or ([], what is wrong with it).

    Args:
        content: ``{"query": "…"}`` or ``{"queries": ["…", …]}``, in a code fence or not.
        document: The document's text.
    """
    text = _FENCE.sub("", _THOUGHT.sub("", content or "").strip())
    if not text:
        return [], EMPTY
    try:
        values = json.loads(text)
    except (ValueError, RecursionError):  # nested too deep
        return [], NOT_JSON
    found = values.get("queries", values.get("query")) if isinstance(values, dict) else None
    if isinstance(found, str):
        found = [found]
    if not isinstance(found, list) or not all(isinstance(query, str) for query in found):
        return [], NOT_JSON
    queries = [clean(query) for query in found]
    faults = {query: fault(query, document) for query in queries}
    good = [query for query, wrong in faults.items() if wrong is None]
    return good, None if good else next(iter(faults.values()), EMPTY)
