"""``st-clp search``: look at what a run's model answers."""

from __future__ import annotations

import sys
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape

from st_clp.cli.error_messages import with_error_messages
from st_clp.terminal import new_console


@with_error_messages
def search(
    path: Annotated[str, typer.Argument(help="The output folder of a finished run.")],
    query: Annotated[
        list[str] | None, typer.Argument(help="What to search for; read line by line if left out.")
    ] = None,
    k: Annotated[int, typer.Option("-k", min=1, help="How many documents to show.")] = 5,
    corpus: Annotated[
        list[str] | None, typer.Option(help="Search only this corpus (miracl/ko) or language (ko); may be repeated.")
    ] = None,
) -> None:
    """Answer a query from the collections that a run was evaluated on, with the model that it made."""
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
