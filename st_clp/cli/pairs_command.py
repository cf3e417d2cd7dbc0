"""``st-clp pairs``: a collection to train on, of documents that nobody has asked about."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from st_clp.cli.error_messages import after_a_stop
from st_clp.cli.mine_command import QUERY_SETTINGS
from st_clp.cli.settings_command import Extra, given_settings, settings_command
from st_clp.options import Encoding, QueryOptions
from st_clp.run.folder import QUERY_STORE
from st_clp.settings import RunSettings, SettingsError
from st_clp.terminal import new_console

if TYPE_CHECKING:
    from st_clp.data import Collection

PAIRS_HELP = """Have queries written for documents that nobody asks about, and make a collection to train on.

A folder with `corpus.jsonl` alone is enough (lines of `{"_id": …, "title": …, "text": …}`). A query is kept where
`--model`, the one that is to be trained, finds its document among the best 10 by it. The queries of a tenth of the
documents are kept for evaluation. Training queries that there are, are kept, and their documents get no others.

What is written is kept in `--query-store`: stopped, the same command goes on and pays for nothing twice.

**Examples**

`st-clp pairs --collection documents --writer openai:MODEL --query-base-url http://localhost:8000/v1
--model intfloat/multilingual-e5-small --output written`

`st-clp run --model intfloat/multilingual-e5-small --collection written --output our-model`
"""

LEFT_OUT = ("query_round_trip", "query_samples")
SETTINGS = [
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

EXTRAS: dict[str, Extra] = {
    "writer": (
        Annotated[str, typer.Option("--writer", help="What writes: openai:MODEL or local:MODEL, or title (free).")],
        "",
        "",
    ),
    "number": (int, 2000, "Documents to write for, drawn at random."),
    "queries_per_document": (int, 1, "Queries for each of them."),
    "unchecked": (bool, False, "Keep queries that do not find their document too; no model is needed then."),
    "language": (str | None, None, "ISO 639 code of the documents. By default as the collection tells it."),
    "overwrite": (bool, False, "Replace the output folder."),
}


def pairs_command() -> Callable[..., None]:
    """The command, with one option for each setting that it has."""
    return settings_command(_pairs, "pairs", SETTINGS, EXTRAS)


def _pairs(**options: Any) -> None:
    extras = {name: options.pop(name) for name in EXTRAS}
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
        raise SettingsError("no writer: give --writer openai:MODEL, local:MODEL or title")
    if "judgments" in extras["writer"].split(","):
        raise SettingsError("--writer: the judgments write nothing; their queries are kept in any case")
    for name in ("number", "queries_per_document"):
        if extras[name] < 1:
            raise SettingsError(f"{name} must be at least 1, got {extras[name]}")
    if output.exists() and not extras["overwrite"] and (not output.is_dir() or any(output.iterdir())):
        raise SettingsError(f"{output} exists: name another --output, or replace it by --overwrite")


def _given(source: str, settings: RunSettings) -> Collection | None:
    """The training queries that there are; None where there are none."""
    from st_clp.data import Collection

    if settings.train_split not in Collection.splits(source):
        return None
    return Collection.load(source, split=settings.train_split, text_fields=settings.text_field or None)
