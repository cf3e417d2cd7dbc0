"""``st-clp queries`` and ``pairs``."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from st_clp.cli.mine_command import QUERY_SETTINGS
from st_clp.cli.settings_command import CONFIG, Extra, after_a_stop, given_settings, settings_command
from st_clp.declaring import names_of
from st_clp.options import ClusterOptions, Encoding, QueryOptions
from st_clp.run.folder import QUERY_STORE
from st_clp.settings import RunSettings, SettingsError
from st_clp.terminal import new_console

if TYPE_CHECKING:
    from rich.console import Console

    from st_clp.data import Collection, Document
    from st_clp.queries import QueriesAccount, QueryChain


QUERIES_HELP = """Generate queries that documents answer, before mining and training.

Each generated query is stored at once in an SQLite file (`--query-store`), by generator, prompt and document. A second
run requests nothing that is there, an interrupted one continues, and several processes may share the file.
`st-clp mine` and `st-clp run` use these queries if they get the same `--negative-queries`, options and
`--query-store`. The key of an endpoint is read from the environment only (`OPENAI_API_KEY`, or
the variable that `--query-key-variable` names).

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
    *names_of(ClusterOptions),
]

EXTRAS: dict[str, Extra] = {
    "config": CONFIG,
    "rows": (
        Path | None,
        None,
        "A file of mined rows: generate queries only for the negatives in it. [default: for all documents]",
    ),
    "dry_run": (bool, False, "Count documents, tokens and cost; send and write nothing."),
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
    queries = QueryOptions.for_negatives(settings)
    with make_chain(settings.negative_queries, queries, store=store, cluster=settings) as chain:
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


PAIRS_HELP = """Write queries for documents that have none, and make a collection to train on.

A folder with only `corpus.jsonl` is enough (lines of `{"_id": …, "title": …, "text": …}`). A query is kept if
`--model`, the model to train, ranks its document among the best 10. The queries of a tenth of the documents, 500 at
most, are set aside for evaluation. Existing training queries are kept, and no queries are written for their documents.

Generated queries are stored in `--query-store`: if the command is interrupted, run it again; it continues, and pays for
nothing twice.

**Examples**

`st-clp pairs --collection documents --writer openai:MODEL --query-base-url http://localhost:8000/v1
--model intfloat/multilingual-e5-small --output written`

`st-clp run --model intfloat/multilingual-e5-small --collection written --output our-model`
"""

LEFT_OUT = ("query_round_trip", "query_samples")
PAIRS_SETTINGS = [
    "model",
    "collection",
    "output",
    "train_split",
    "text_field",
    "max_seq_length",
    *(name for name in QUERY_SETTINGS if name not in (*LEFT_OUT, "negative_queries")),
    "seed",
    "encode_dtype",
    "encode_batch_size",
]

PAIRS_EXTRAS: dict[str, Extra] = {
    "writer": (
        Annotated[
            str,
            typer.Option(
                "--writer",
                help="What writes: openai:MODEL or local:MODEL; sentence or title without a model.",
            ),
        ],
        "",
        "",
    ),
    "number": (int, 2000, "The number of documents to write queries for, drawn at random."),
    "queries_per_document": (int, 1, "Queries for each of these documents."),
    "unchecked": (bool, False, "Keep queries that do not find their document as well; this needs no model."),
    "language": (str | None, None, "ISO 639 code of the documents' language. By default the collection's."),
    "overwrite": (bool, False, "Replace the output folder."),
}


def pairs_command() -> Callable[..., None]:
    """The command, with one option for each setting that it has."""
    return settings_command(_pairs, "pairs", PAIRS_SETTINGS, PAIRS_EXTRAS)


def _pairs(**options: Any) -> None:
    extras = {name: options.pop(name) for name in PAIRS_EXTRAS}
    settings = RunSettings.from_dict(given_settings(options), where="command line")
    settings.require("collection", "output", *(() if extras["unchecked"] else ("model",)))
    output = Path(settings.output)
    _require_possible(settings, extras, output)

    from transformers.utils import logging as transformers_logging

    from st_clp.data import open_corpus
    from st_clp.queries import make_chain
    from st_clp.run.modelling import load_base_model
    from st_clp.run.pairs import write_pairs

    transformers_logging.disable_progress_bar()
    (source,) = settings.collection
    given = _given(source, settings)
    corpus = given.corpus if given else open_corpus(source, text_fields=settings.text_field or None)
    model = None if extras["unchecked"] else load_base_model(settings.model, max_seq_length=settings.max_seq_length)
    after_a_stop.append("What was written is kept; the same command goes on from there.")
    queries = QueryOptions.of(settings, query_samples=extras["queries_per_document"])
    store = settings.query_store or output.with_name(f"{output.name}.{QUERY_STORE}")
    embeddings = output.with_name(f"{output.name}.embeddings")
    with make_chain(extras["writer"], queries, store=store) as chain:
        account = write_pairs(
            corpus,
            chain,
            output,
            number=extras["number"],
            model=model,
            given=given,
            language=extras["language"] or (given.language if given else None),
            round_trip_k=settings.query_round_trip_k,
            seed=settings.seed,
            encoding=Encoding.of(settings),
            store_dir=embeddings,
        )
    shutil.rmtree(embeddings, ignore_errors=True)
    after_a_stop.clear()
    console = new_console(soft_wrap=True, markup=False)
    console.print(str(account))
    if account.writing.usage.tokens_at_most:
        console.print(f"  {account.writing.usage.tokens:,} tokens read and written this time")
    console.print(f"Written to {output}: read some of queries.jsonl, then train by st-clp run --collection {output}")


def _require_possible(settings: RunSettings, extras: dict[str, Any], output: Path) -> None:
    if len(settings.collection) != 1:
        raise SettingsError("pairs takes one collection at a time; give each its own output")
    if not extras["writer"]:
        raise SettingsError("no writer: give --writer openai:MODEL, local:MODEL, sentence or title")
    if "judgments" in extras["writer"].split(","):
        raise SettingsError("--writer: the judgments write nothing; their queries are kept in any case")
    for name in ("number", "queries_per_document"):
        if extras[name] < 1:
            raise SettingsError(f"{name} must be at least 1, got {extras[name]}")
    if output.exists() and not extras["overwrite"] and (not output.is_dir() or any(output.iterdir())):
        raise SettingsError(f"{output} exists: name another --output, or replace it by --overwrite")
    if output.is_dir() and (others := sorted(_others_in(output))):
        raise SettingsError(
            f"{output} holds what pairs has not written, such as {others[0]}: --overwrite would remove it; move it, or "
            "name another --output"
        )


def _others_in(output: Path) -> set[str]:
    """What is in a folder, and in its judgments' folder, that ``pairs`` does not write."""
    ours = {"corpus.jsonl", "queries.jsonl", "qrels", "qrels/train.tsv", "qrels/dev.tsv"}
    found = [*output.iterdir(), *(output / "qrels").glob("*")]
    return {path.relative_to(output).as_posix() for path in found} - ours


def _given(source: str, settings: RunSettings) -> Collection | None:
    """The training queries that there are; None where there are none."""
    from st_clp.data import Collection

    if settings.train_split not in Collection.splits(source):
        return None
    return Collection.load(source, split=settings.train_split, text_fields=settings.text_field or None)
