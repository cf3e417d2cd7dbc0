"""``st-clp store`` and ``search``."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape

from st_clp.cli.settings_command import (
    CONFIG,
    SAME_COMMAND,
    after_a_stop,
    given_settings,
    settings_command,
    with_error_messages,
)
from st_clp.declaring import names_of
from st_clp.files import inside
from st_clp.options import ClusterOptions, Encoding, EncodingOptions
from st_clp.run.folder import slug
from st_clp.settings import RunSettings
from st_clp.terminal import new_console

if TYPE_CHECKING:
    from st_clp.encoding.inspection import StoreInfo


store = typer.Typer(
    help="Build embeddings in advance; list, check and remove those of runs and mining.",
    no_args_is_help=True,
)

BUILD_HELP = """Encode the documents of collections and keep the embeddings.

`st-clp mine --store` with the same folder uses them. If it is interrupted, the same command continues.

**Examples**

`st-clp store build --model BAAI/bge-m3 --collection miracl/en --output embeddings`

`st-clp store build --model BAAI/bge-m3 --collection miracl/en --output /shared/embeddings --ray auto`

`st-clp store build --model BAAI/bge-m3 --collection miracl/en --output s3://bucket/embeddings --ray auto`
"""
BUILD_SETTINGS = [
    *("model", "collection", "output", "text_field", "max_seq_length"),
    *names_of(EncodingOptions, ClusterOptions),
]


def _build(**options: Any) -> None:
    from st_clp.data import open_corpus
    from st_clp.encoding import EmbeddingStore
    from st_clp.run.modelling import load_base_model

    config = options.pop("config")
    values = RunSettings.read_yaml(config) if config else {}
    settings = RunSettings.from_dict({**values, **given_settings(options)}, where=str(config or "command line"))
    settings.require("model", "collection", "output")
    console = new_console(soft_wrap=True, markup=False)
    corpora = [open_corpus(source, text_fields=settings.text_field or None) for source in settings.collection]
    model = load_base_model(settings.model, max_seq_length=settings.max_seq_length)
    after_a_stop.append(SAME_COMMAND)
    for corpus in corpora:
        place = inside(settings.output, slug(corpus.name))
        built = EmbeddingStore.build(model, corpus, place, encoding=Encoding.of(settings))
        console.print(f"{place}: {len(built):,} documents of {corpus.name}, {built.dim} dimensions")
    after_a_stop.clear()


store.command("build", help=BUILD_HELP, no_args_is_help=True)(
    settings_command(_build, "build", BUILD_SETTINGS, {"config": CONFIG})
)

Folders = Annotated[list[Path], typer.Argument(help="Folders of stores, or folders that contain stores.")]


@store.command()
@with_error_messages
def ls(
    folder: Annotated[Path, typer.Argument(help="The folder to search.")] = Path("."),
) -> None:
    """List the stores in a folder and below it."""
    console = new_console(soft_wrap=True)
    found = _find([folder])
    for info in found:
        manifest = info.manifest
        state = "" if info.finished else ", unfinished"
        console.print(f"[bold]{escape(str(info.path))}[/bold]")
        if manifest is None:
            console.print(f"  [red]damaged[/red]: its manifest cannot be read, {_megabytes(info.bytes_on_disk)}")
            continue
        console.print(
            f"  {info.documents:,} {'' if manifest['task'] == 'query' else 'documents '}of "
            f"{escape(manifest['corpus'])}, {manifest['dim']} × {manifest['dtype']}, model {manifest['model'][:8]}, "
            f"{_megabytes(info.bytes_on_disk)}{state}"
        )
    console.print(f"{len(found)} stores, {_megabytes(sum(info.bytes_on_disk for info in found))}")


@store.command()
@with_error_messages
def verify(folders: Folders) -> None:
    """Compare every byte with the checksums; the exit status is 1 if something is damaged."""
    from st_clp.encoding.inspection import verify as look

    console = new_console(soft_wrap=True)
    whole = True
    for info in _find(folders):
        found = look(info.path)
        whole &= found.whole
        state = "whole" if info.finished else "unfinished, and undamaged so far"
        state = state if found.whole else "[red]damaged[/red]"
        console.print(f"{escape(str(info.path))}: {found.documents:,} documents, {state}")
        for first, rows in found.damaged:
            console.print(f"  rows {first:,} to {first + rows - 1:,} do not match their checksum")
        if found.missing:
            console.print(f"  {found.missing:,} documents are missing")
        if found.unnamed:
            console.print(f"  {found.unnamed:,} documents more than its manifest names")
        if found.wrong:
            console.print(f"  {escape(found.wrong)}")
    if not whole:
        console.print("What is damaged is found and encoded anew when the store is used next.")
        raise typer.Exit(1)


@store.command()
@with_error_messages
def rm(
    folders: Folders,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False,
) -> None:
    """Remove stores. They are built again when needed."""
    from st_clp.encoding.inspection import remove

    console = new_console(soft_wrap=True)
    found = _find(folders)
    for info in found:
        console.print(f"{escape(str(info.path))}  {_megabytes(info.bytes_on_disk)}")
    if not yes:
        typer.confirm(f"Remove {len(found)} stores?", abort=True)
    console.print(f"removed {_megabytes(sum(remove(info.path) for info in found))}")


def _find(folders: list[Path]) -> list[StoreInfo]:
    from st_clp.encoding.inspection import find_stores

    found = []
    for folder in folders:
        if re.match(r"[A-Za-z][A-Za-z0-9+.-]+:/", str(folder)):  # a path has one slash fewer
            raise ValueError(f"{folder} is an address: look at it, and remove it, with the provider's own tools")
        if not folder.is_dir():
            raise FileNotFoundError(f"there is no folder {folder}")
        here = list(find_stores(folder))
        if not here:
            raise FileNotFoundError(f"{folder} holds no embedding store")
        found += here
    return found


def _megabytes(number: int) -> str:
    return f"{number / 1e6:,.1f} MB"


@with_error_messages
def search(
    path: Annotated[str, typer.Argument(help="The output folder of a finished run.")],
    query: Annotated[
        list[str] | None, typer.Argument(help="The query; by default queries are read line by line.")
    ] = None,
    k: Annotated[int, typer.Option("-k", min=1, help="The number of documents to show.")] = 5,
    corpus: Annotated[
        list[str] | None, typer.Option(help="Search only this corpus (miracl/ko) or language (ko); may be repeated.")
    ] = None,
) -> None:
    """Search the collections that a run was evaluated on with the model that it trained."""
    from st_clp.run.searching import RunSearcher

    console = new_console()
    searcher = RunSearcher(path, corpus)
    if query:
        print_answers(console, searcher.search(" ".join(query), k))
        return
    for line in sys.stdin if not sys.stdin.isatty() else iter(lambda: console.input("[bold]query>[/bold] "), ""):
        if line.strip():
            print_answers(console, searcher.search(line.strip(), k))


def print_answers(console: Console, answers: list[Any]) -> None:
    """Show answers, a block each."""
    for rank, answer in enumerate(answers, start=1):
        text = " ".join(answer.text.split())
        shown = text if len(text) <= 240 else text[:239] + "…"
        console.print(
            f"[bold]{rank}[/bold]  {answer.score:.4f}  [dim]{escape(f'{answer.corpus_name} {answer.doc_id}')}[/dim]"
        )
        console.print(f"   {escape(shown)}")
