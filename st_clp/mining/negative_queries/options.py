"""How queries of negatives are made, and which sources make them: ``"judgments,local:PATH,openai:MODEL,title"``."""

from __future__ import annotations

import math
import os
import re
from dataclasses import dataclass
from typing import get_args

from st_clp.mining.negative_queries.address import require_address, require_key_variable
from st_clp.mining.negative_queries.budget import Budget, Prices
from st_clp.mining.negative_queries.chain import QueryChain
from st_clp.mining.negative_queries.chat import ChatClient
from st_clp.mining.negative_queries.endpoint import EndpointQueries
from st_clp.mining.negative_queries.interface import JUDGMENTS, GeneratingSource, QuerySource
from st_clp.mining.negative_queries.lead import DEFAULT_WEIGHT, TitleOrLead
from st_clp.mining.negative_queries.local import LocalQueries
from st_clp.mining.negative_queries.prompts import Prompts
from st_clp.mining.negative_queries.roundtrip import RoundTripAction
from st_clp.mining.negative_queries.store import QueryStore

LOCAL, OPENAI, TITLE = "local", "openai", "title"
KNOWN = f"{JUDGMENTS}, {LOCAL}:MODEL, {OPENAI}:MODEL and {TITLE}"
LONGEST_TIMEOUT = 86_400  # a day; sockets take no time without an end
_WEIGHT = re.compile(r"\*(\d+(?:\.\d+)?)$")


@dataclass(frozen=True)
class QueryOptions:
    """How queries of negatives are made. The names are those of the settings of a run.

    Attributes:
        query_samples: Queries to make for each document.
        query_prompts: A YAML file with a prompt's template for each language; None has the built-in ones.
        query_max_tokens: Tokens that a query may have, or an endpoint's answer.
        query_temperature: Of the sampling; 0 takes the likeliest token each time.
        query_base_url: Where an endpoint's API is; None: ``OPENAI_BASE_URL``, or else OpenAI's.
        query_key_variable: The environment variable with the endpoint's key.
        query_concurrency: Requests at a time.
        query_rate: Requests a minute at most; None: no limit.
        query_timeout: Seconds to wait for an endpoint's answer.
        query_retries: Times that a request that failed is sent again.
        query_budget: Money that everything in the store may cost at most; None: no limit.
        query_budget_tokens: Tokens, read and written, that everything in the store may come to at most; None: no limit.
        query_price_prompt: Money for a million tokens that are read.
        query_price_completion: Money for a million tokens that are written.
        query_round_trip: What becomes of a query that does not find its document: ``"drop"``, half its ``"weight"``, or
            nothing, as nobody looks (``"off"``).
        query_round_trip_k: How far down it may find it, from 1.
        seed: Of the sampling.

    Raises:
        ValueError: An option is out of range.
    """

    query_samples: int = 1
    query_prompts: str | None = None
    query_max_tokens: int = 64
    query_temperature: float = 0.7
    query_base_url: str | None = None
    query_key_variable: str = "OPENAI_API_KEY"
    query_concurrency: int = 8
    query_rate: float | None = None
    query_timeout: float = 60.0
    query_retries: int = 5
    query_budget: float | None = None
    query_budget_tokens: int | None = None
    query_price_prompt: float | None = None
    query_price_completion: float | None = None
    query_round_trip: RoundTripAction = "off"
    query_round_trip_k: int = 10
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("query_samples", "query_max_tokens", "query_concurrency", "query_round_trip_k"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        for name in ("query_temperature", "query_retries"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name} must be at least 0 and finite, got {getattr(self, name)}")
        for name in ("query_rate", "query_timeout"):
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                raise ValueError(f"{name} must be above 0 and finite, got {value}")
        if self.query_timeout > LONGEST_TIMEOUT:
            raise ValueError(f"query_timeout is in seconds, at most {LONGEST_TIMEOUT:,}, got {self.query_timeout:g}")
        require_key_variable(self.query_key_variable)
        if self.query_base_url is not None:
            require_address(self.query_base_url, self.query_key_variable)
        if self.query_round_trip not in get_args(RoundTripAction):
            raise ValueError(
                f"query_round_trip must be one of {', '.join(get_args(RoundTripAction))}, got {self.query_round_trip!r}"
            )
        if (self.query_price_prompt is None) != (self.query_price_completion is None):
            raise ValueError("give both prices, query_price_prompt and query_price_completion, or neither")
        self.budget(QueryStore())  # which has checks of its own

    @property
    def prices(self) -> Prices | None:
        """Both prices; None where there are none."""
        if self.query_price_prompt is None or self.query_price_completion is None:
            return None
        return Prices(self.query_price_prompt, self.query_price_completion)

    def budget(self, store: QueryStore) -> Budget:
        """The budget of everything in a store."""
        return Budget(store, max_tokens=self.query_budget_tokens, max_cost=self.query_budget, prices=self.prices)


def parse_sources(spec: str) -> list[tuple[str, str, float | None]]:
    """(kind, model, weight) of each source in ``"judgments,local:PATH,openai:MODEL,title"``, in order.

    A number behind a star, as in ``title*0.3``, is the weight of a source's queries; None where there is none.

    Raises:
        ValueError: A source is not known, lacks its model, or stands there twice.
    """
    found: list[tuple[str, str, float | None]] = []
    for part in (part.strip() for part in spec.split(",")):
        weight = _WEIGHT.search(part)
        kind, _, model = _WEIGHT.sub("", part).partition(":")
        if kind not in (JUDGMENTS, LOCAL, OPENAI, TITLE):
            raise ValueError(f"negative_queries: there is no source {part!r}; the sources are {KNOWN}")
        if bool(model) != (kind in (LOCAL, OPENAI)):
            form = f"{kind}:MODEL" if kind in (LOCAL, OPENAI) else kind
            raise ValueError(f"negative_queries: {part!r} must be {form}")
        if kind == JUDGMENTS and weight:
            raise ValueError(f"negative_queries: queries from the judgments have the weight 1, got {part!r}")
        found.append((kind, model, float(weight.group(1)) if weight else None))
    kinds = [source[:2] for source in found]
    if len(set(kinds)) < len(kinds):
        raise ValueError(f"negative_queries: a source stands twice in {spec!r}")
    return found


def make_chain(
    spec: str,
    options: QueryOptions | None = None,
    *,
    store: QueryStore | str | os.PathLike[str] | None = None,
    show_progress_bar: bool = True,
) -> QueryChain:
    """The chain of sources that a text names.

    Args:
        spec: ``"judgments,local:PATH,openai:MODEL,title"``; ``local`` takes a folder or a name on the Hub, ``openai``
            the model's name at the endpoint. ``title*0.3`` gives a source's queries another weight.
        options: How queries are made.
        store: Keeps what is generated, or its file; None keeps it in memory.
        show_progress_bar: Show progress.

    Raises:
        ValueError: The text or an option cannot be meant, or there is no key for an endpoint that wants one.
    """
    options = options or QueryOptions()
    parsed = parse_sources(spec)
    # What costs nothing needs no file.
    free = all(kind in (JUDGMENTS, TITLE) for kind, _, _ in parsed)
    kept = store if isinstance(store, QueryStore) else QueryStore(None if free else store)
    sources = [_source(kind, model, weight, options, kept) for kind, model, weight in parsed]
    for source in sources:
        if isinstance(source, GeneratingSource):
            source.prepare()
    kept.open()  # no file is made where the sources cannot be used
    return QueryChain(sources, store=kept, show_progress_bar=show_progress_bar)


def _source(kind: str, model: str, weight: float | None, options: QueryOptions, store: QueryStore) -> QuerySource | str:
    if kind == JUDGMENTS:
        return JUDGMENTS
    if kind == TITLE:
        return TitleOrLead(weight=DEFAULT_WEIGHT if weight is None else weight)
    given = 1.0 if weight is None else weight
    prompts = None if options.query_prompts is None else Prompts.read(options.query_prompts)
    if kind == LOCAL:
        return LocalQueries(
            model,
            prompts=prompts,
            samples=options.query_samples,
            max_new_tokens=options.query_max_tokens,
            temperature=options.query_temperature,
            seed=options.seed,
            weight=given,
        )
    client = ChatClient(
        model,
        base_url=options.query_base_url,
        key_variable=options.query_key_variable,
        timeout=options.query_timeout,
        temperature=options.query_temperature,
    )
    return EndpointQueries(
        client,
        options.budget(store),
        prompts=prompts,
        number=options.query_samples,
        # The answer is JSON, and takes some tokens more than its queries.
        max_tokens=options.query_max_tokens * options.query_samples + 16,
        concurrency=options.query_concurrency,
        requests_per_minute=options.query_rate,
        retries=options.query_retries,
        seed=options.seed,
        weight=given,
    )
