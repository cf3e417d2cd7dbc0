"""``st-clp mine``: hard negatives alone, for a training script of one's own."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from st_clp.cli.settings_command import CONFIG, SAME_COMMAND, Extra, after_a_stop, given_settings, settings_command
from st_clp.declaring import names_of
from st_clp.files import inside, write_json
from st_clp.options import (
    ClusterOptions,
    Encoding,
    EncodingOptions,
    MiningOptions,
    MiningSettings,
    QueryOptions,
    QuerySettings,
    SeedOption,
)
from st_clp.run.folder import QUERY_STORE, slug
from st_clp.settings import RunSettings
from st_clp.terminal import new_console

if TYPE_CHECKING:
    from st_clp.data import Collection
    from st_clp.queries import QueryChain

MINE_HELP = """Mine hard negatives with a model, and find the queries that they answer.

For each collection the output folder gets the rows as JSON lines (which `st-clp run --collection` and `Collection.load`
read), a report of what happened to every query, and a plot of the scores. The embeddings are kept: mining again with
other options encodes nothing, and an interrupted run continues where it was. Remove them with `st-clp store rm`.

**Examples**

`st-clp mine --model BAAI/bge-m3 --collection miracl/ko --output negatives --dry-run`

`st-clp mine --model BAAI/bge-m3 --collection miracl/ko --output negatives --relative-margin 0.05`

`st-clp mine --model BAAI/bge-m3 --collection miracl/ko --output negatives --negative-queries judgments,title`
"""

QUERY_SETTINGS = [*names_of(QuerySettings), "negative_queries", "query_store"]
SETTINGS = [
    *("model", "collection", "output", "train_split", "max_train_queries", "text_field", "max_seq_length"),
    *names_of(EncodingOptions, MiningSettings, SeedOption, ClusterOptions),
    "cross_encoder",
    *QUERY_SETTINGS,
]

EXTRAS: dict[str, Extra] = {
    "config": CONFIG,
    "store": (
        str | None,
        None,
        "The folder for the embeddings, or an address such as s3://bucket/folder. [default: embeddings in the output "
        "folder]",
    ),
    "dry_run": (bool, False, "Time a short trial, print an estimate of the cost, and write nothing."),
}


def mine_command() -> Callable[..., None]:
    """The command, with one option for each setting that mining has."""
    return settings_command(_mine, "mine", SETTINGS, EXTRAS)


def _mine(**options: Any) -> None:
    from transformers.utils import logging as transformers_logging

    from st_clp.run.modelling import load_base_model
    from st_clp.run.splits import load_training_collections

    config, store, dry_run = (options.pop(name) for name in EXTRAS)
    values = RunSettings.read_yaml(config) if config else {}
    given = {**values, **given_settings(options)}
    settings = RunSettings.from_dict(given, where=str(config or "command line"))
    settings.require("model", "collection", "output")
    work = _estimate if dry_run else _mine_one
    transformers_logging.disable_progress_bar()  # a bar for every model that is opened says nothing here
    collections = load_training_collections(settings)
    model = load_base_model(settings.model, max_seq_length=settings.max_seq_length)
    output = Path(settings.output)
    if not dry_run:
        after_a_stop.append(SAME_COMMAND)
    with open_chain(settings, None if dry_run else output / QUERY_STORE) as chain:
        for collection in collections:
            place = inside(store or output / "embeddings", slug(collection.corpus_name))
            work(model, collection, settings, output, place, chain)
    after_a_stop.clear()


def open_chain(settings: RunSettings, default: Path | None) -> QueryChain:
    """The sources of queries that the settings name, with their store in ``query_store`` or else in ``default``."""
    from st_clp.queries import make_chain

    store = settings.query_store if settings.query_store and default else default
    return make_chain(settings.negative_queries, QueryOptions.for_negatives(settings), store=store, cluster=settings)


def _arguments(settings: RunSettings, store: str) -> tuple[MiningOptions, dict[str, Any]]:
    """(the options, the other arguments) that mining and its estimate share."""
    options = MiningOptions.of(settings, max_queries=settings.max_train_queries)
    return options, {"encoding": Encoding.of(settings), "store_dir": store}


def _estimate(
    model: Any, collection: Collection, settings: RunSettings, output: Path, store: str, chain: QueryChain
) -> None:
    from st_clp.mining.estimate import estimate
    from st_clp.run.modelling import load_cross_encoder

    console = new_console(soft_wrap=True, markup=False)
    options, others = _arguments(settings, store)
    cross_encoder = load_cross_encoder(settings.cross_encoder)
    console.print(str(estimate(model, collection, options, cross_encoder=cross_encoder, **others)))
    if chain.generates:
        console.print("  without the queries of negatives: st-clp queries --dry-run says what those would cost")


def _mine_one(
    model: Any, collection: Collection, settings: RunSettings, output: Path, store: str, chain: QueryChain
) -> None:
    from st_clp.mining import mine
    from st_clp.mining.rows import require_writable, write_rows
    from st_clp.run.modelling import load_cross_encoder

    console = new_console(soft_wrap=True, markup=False)
    options, others = _arguments(settings, store)
    base = output / slug(collection.name)
    # A folder that cannot be written is found before hours of encoding, not after.
    output.mkdir(parents=True, exist_ok=True)
    require_writable(f"{base}.jsonl")
    mined = mine(
        model,
        collection,
        options,
        cross_encoder=load_cross_encoder(settings.cross_encoder),
        negative_queries=chain,
        query_options=QueryOptions.for_negatives(settings),
        **others,
    )
    write_rows(base.with_name(base.name + ".jsonl"), mined.rows)
    write_json(base.with_name(base.name + ".account.json"), mined.account.to_dict())
    console.print(str(mined.account))
    written = [f"{base}.jsonl", f"{base}.account.json"]
    try:
        mined.account.plot(f"{base}.png")
        written.append(f"{base}.png")
    except (ModuleNotFoundError, ValueError) as error:
        console.print(f"  no picture: {error}")
    console.print(f"  written: {', '.join(written)}; the embeddings are kept in {store}")
