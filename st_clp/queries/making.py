"""Make sources of queries from their names: ``"judgments,local:PATH,sentence"``."""

from __future__ import annotations

import os
import re

from st_clp.options import ClusterOptions, QueryOptions
from st_clp.queries.chain import QueryChain
from st_clp.queries.chat import ChatClient
from st_clp.queries.endpoint import Budget, EndpointQueries, Prices
from st_clp.queries.interface import JUDGMENTS, GeneratingSource, QuerySource
from st_clp.queries.local import LocalQueries
from st_clp.queries.own_text import TITLE_WEIGHT, SentenceQueries, TitleOrLead
from st_clp.queries.query_store import QueryStore
from st_clp.queries.wording import Prompts

LOCAL, OPENAI, TITLE, SENTENCE = "local", "openai", "title", "sentence"
KNOWN = f"{JUDGMENTS}, {LOCAL}:MODEL, {OPENAI}:MODEL, {SENTENCE} and {TITLE}"
_WEIGHT = re.compile(r"\*(\d+(?:\.\d+)?)$")


def budget_of(options: QueryOptions, store: QueryStore) -> Budget:
    """The budget over everything in a store."""
    prices = None
    if options.query_price_prompt is not None and options.query_price_completion is not None:
        prices = Prices(options.query_price_prompt, options.query_price_completion)
    return Budget(store, max_tokens=options.query_budget_tokens, max_cost=options.query_budget, prices=prices)


def parse_sources(spec: str) -> list[tuple[str, str, float | None]]:
    """(kind, model, weight) of each source in ``"judgments,local:PATH,openai:MODEL,title"``, in order.

    A number after a star, as in ``title*0.3``, is the weight of a source's queries; None if there is none.

    Raises:
        ValueError: A source is unknown, lacks its model, or is named twice.
    """
    found: list[tuple[str, str, float | None]] = []
    for part in (part.strip() for part in spec.split(",")):
        weight = _WEIGHT.search(part)
        kind, _, model = _WEIGHT.sub("", part).partition(":")
        if kind not in (JUDGMENTS, LOCAL, OPENAI, TITLE, SENTENCE):
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
    cluster: ClusterOptions | None = None,
) -> QueryChain:
    """Make a chain from the names of its sources.

    Args:
        spec: ``"judgments,local:PATH,openai:MODEL,title"``; ``local`` takes a folder or a name on the Hub, ``openai``
            the model's name at the endpoint. ``title*0.3`` gives a source's queries another weight.
        options: How queries are made.
        store: Keeps what is generated, or its file; None keeps it in memory.
        show_progress_bar: Show progress.
        cluster: Run a local model on the Ray cluster that these options name, if they name one.

    Raises:
        ValueError: A name or an option is invalid, or an endpoint needs a key and there is none.
    """
    options = options or QueryOptions()
    parsed = parse_sources(spec)
    # Free sources need no file.
    free = all(kind in (JUDGMENTS, TITLE, SENTENCE) for kind, _, _ in parsed)
    kept = store if isinstance(store, QueryStore) else QueryStore(None if free else store)
    sources = [_source(kind, model, weight, options, kept, cluster) for kind, model, weight in parsed]
    for source in sources:
        if isinstance(source, GeneratingSource):
            source.prepare()
    kept.open()  # no file is made where the sources cannot be used
    return QueryChain(sources, store=kept, show_progress_bar=show_progress_bar)


def _source(
    kind: str,
    model: str,
    weight: float | None,
    options: QueryOptions,
    store: QueryStore,
    cluster: ClusterOptions | None,
) -> QuerySource | str:
    if kind == JUDGMENTS:
        return JUDGMENTS
    if kind == TITLE:
        return TitleOrLead(weight=TITLE_WEIGHT if weight is None else weight)
    given = 1.0 if weight is None else weight
    if kind == SENTENCE:
        return SentenceQueries(samples=options.query_samples or 1, seed=options.seed, weight=given)
    prompts = None if options.query_prompts is None else Prompts.read(options.query_prompts)
    if kind == LOCAL:
        local = LocalQueries(
            model,
            prompts=prompts,
            samples=options.query_samples or 1,
            max_new_tokens=options.query_max_tokens,
            temperature=options.query_temperature,
            seed=options.seed,
            weight=given,
        )
        if cluster is None or cluster.ray is None:
            return local
        from st_clp.queries.ray_queries import ClusterQueries

        return ClusterQueries(local, cluster)
    client = ChatClient(
        model,
        base_url=options.query_base_url,
        key_variable=options.query_key_variable,
        timeout=options.query_timeout,
        temperature=options.query_temperature,
    )
    return EndpointQueries(
        client,
        budget_of(options, store),
        prompts=prompts,
        number=options.query_samples or 1,
        # The answer is JSON, which takes some tokens besides the queries.
        max_tokens=options.query_max_tokens * (options.query_samples or 1) + 16,
        concurrency=options.query_concurrency,
        requests_per_minute=options.query_rate,
        retries=options.query_retries,
        seed=options.seed,
        weight=given,
    )
