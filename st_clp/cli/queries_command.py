"""``st-clp queries``: queries of negatives ahead of time."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from st_clp.cli.mine_command import QUERY_SETTINGS
from st_clp.cli.settings_command import CONFIG, Extra, given_settings, settings_command
from st_clp.options import QueryOptions
from st_clp.run.folder import QUERY_STORE
from st_clp.settings import RunSettings
from st_clp.terminal import new_console

if TYPE_CHECKING:
    from rich.console import Console

    from st_clp.data import Collection, Document
    from st_clp.queries import QueriesAccount, QueryChain

QUERIES_HELP = """Make queries that documents answer, ahead of mining and training, and keep them.

Every answer is kept as it comes, in one SQLite file (`--query-store`), under its generator, prompt and document: a
second run asks for nothing that is there, a stopped one goes on, and several processes may share the file.
`st-clp mine` and `st-clp run` with the same `--negative-queries`, options and `--query-store` then find them there. The
key of an endpoint comes from the environment alone (`OPENAI_API_KEY`, or what `--query-key-variable` names).

**Examples**

`st-clp queries --collection miracl/ko --rows mined.jsonl --negative-queries judgments,openai:MODEL --dry-run`

`st-clp queries --collection miracl/hi --negative-queries local:doc2query/msmarco-hindi-mt5-base-v1`

`st-clp queries --collection my-collection --negative-queries openai:MODEL --query-base-url http://localhost:8000/v1`
"""

SETTINGS = [
    "collection",
    "train_split",
    "text_field",
    "queries_per_negative",
    # What mining checks needs the model that mines.
    *(name for name in QUERY_SETTINGS if not name.startswith("query_round_trip")),
    "seed",
]

EXTRAS: dict[str, Extra] = {
    "config": CONFIG,
    "rows": (Path | None, None, "Mined rows: only for the negatives in them. [default: for all documents]"),
    "dry_run": (bool, False, "Count documents, tokens and cost, and send and write nothing."),
}


def queries_command() -> Callable[..., None]:
    """The command, with one option for each setting that it has."""
    return settings_command(_queries, "queries", SETTINGS, EXTRAS)


def _queries(**options: Any) -> None:
    from transformers.utils import logging as transformers_logging

    from st_clp.queries import make_chain
    from st_clp.run.splits import load_training_collections

    config, rows, dry_run = (options.pop(name) for name in EXTRAS)
    values = RunSettings.read_yaml(config) if config else {}
    given = {**values, **given_settings(options)}
    settings = RunSettings.from_dict(given, where=str(config or "command line"))
    settings.require("collection")
    transformers_logging.disable_progress_bar()
    console = new_console(soft_wrap=True, markup=False)
    file = Path(settings.query_store or QUERY_STORE)
    # A dry run makes no file.
    store = file if file.exists() or not dry_run else None
    with make_chain(settings.negative_queries, QueryOptions.for_negatives(settings), store=store) as chain:
        for collection in load_training_collections(settings):
            documents = _documents(collection, rows)
            if dry_run:
                _say_cost(console, chain, collection, documents, settings)
            else:
                _make(console, chain, collection, documents, settings)
        tokens, cost = chain.store.spent()
        if tokens:
            console.print(f"spent so far, by all that share {file}: at most {tokens:,} tokens{_money(cost)}")
    if not dry_run and file.exists():
        console.print(f"kept in {file}: give it to st-clp mine or st-clp run as --query-store {file}")


def _documents(collection: Collection, rows: Path | None) -> list[Document]:
    """The documents to make queries for: those with text, and only the negatives of the rows where there are any."""
    from st_clp.mining.rows import read_rows

    documents = list(collection.documents())
    if rows is not None:
        wanted = {negative.doc_id for row in read_rows(rows) for negative in row.negatives}
        documents = [document for document in documents if document.doc_id in wanted]
        if not documents:
            raise ValueError(f"{rows} has no negative that is a document of {collection.name}; name its collection")
    return [document for document in documents if document.text.strip()]


def _say_cost(
    console: Console, chain: QueryChain, collection: Collection, documents: list[Document], settings: RunSettings
) -> None:
    from st_clp.queries import JudgedQueries, estimate_cost

    judged = JudgedQueries(collection, seed=settings.seed)
    console.print(f"{collection.name}: {len(documents):,} documents")
    for line in estimate_cost(chain, documents, judged, language=collection.language):
        console.print(f"  {line}")


def _make(
    console: Console, chain: QueryChain, collection: Collection, documents: list[Document], settings: RunSettings
) -> None:
    from st_clp.queries import JudgedQueries

    judged = JudgedQueries(collection, seed=settings.seed)
    found, account = chain.generate(documents, judged, language=collection.language)
    console.print(f"{collection.name}: {len(found):,} of {len(documents):,} documents have a query")
    for line in _lines(account, [answer.queries[0].source for answer in found.values()]):
        console.print(f"  {line}")


def _lines(account: QueriesAccount, sources: list[str]) -> list[str]:
    from st_clp.queries.chain import UNCOUNTED

    lines = [f"{sources.count(source):>9,}  from {source}" for source in dict.fromkeys(sources)]
    lines += [f"{number:>9,}  without one, {cause}" for cause, number in account.without.items()]
    if account.usage.tokens_at_most:
        lines.append(f"{account.usage.tokens:>9,}  tokens read and written this time{_money(account.usage.cost)}")
    if account.usage.uncounted_tokens:
        lines.append(f"{account.usage.uncounted_tokens:>9,}  {UNCOUNTED}")
    return lines


def _money(cost: float) -> str:
    return f", {cost:.4f} in money" if cost else ""
