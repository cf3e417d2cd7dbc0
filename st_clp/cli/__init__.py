"""``st-clp``: the command line."""

from __future__ import annotations

from typing import Annotated

import typer

import st_clp
from st_clp.cli import (
    doctor_command,
    evaluation_commands,
    mine_command,
    query_commands,
    run_commands,
    store_commands,
)
from st_clp.terminal import log_to_terminal, show_what_can_be_shown

app = typer.Typer(
    name="st-clp",
    help="Fine-tune text-embedding models for retrieval: hard negatives mined by the model itself (ANCE), a "
    "contrastive loss with a penalty (CLP), and a mixture of experts (MoE).\n\nExit status: 0 for success; 1 for an "
    "error in the input or in the work, with a message that says what to do; 2 for a wrong option; 130 after Ctrl-C.",
    no_args_is_help=True,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
)

app.command("run", help=run_commands.RUN_HELP, no_args_is_help=True)(run_commands.run_command())
app.command("mine", help=mine_command.MINE_HELP, no_args_is_help=True)(mine_command.mine_command())
app.command("queries", help=query_commands.QUERIES_HELP, no_args_is_help=True)(query_commands.queries_command())
app.command("pairs", help=query_commands.PAIRS_HELP, no_args_is_help=True)(query_commands.pairs_command())
app.command("evaluate", help=evaluation_commands.EVALUATE_HELP, no_args_is_help=True)(
    evaluation_commands.evaluate_command()
)
app.command(no_args_is_help=True)(evaluation_commands.compare)
app.command(no_args_is_help=True)(evaluation_commands.report)
app.command("ablation", help=run_commands.ABLATION_HELP, no_args_is_help=True)(run_commands.ablation_command())
app.command()(store_commands.search)
app.add_typer(store_commands.store, name="store")
app.command()(run_commands.demo)
app.command()(doctor_command.doctor)


def main() -> None:
    """The entry point."""
    show_what_can_be_shown()
    log_to_terminal()
    app()


def _version(show: bool) -> None:
    if show:
        print(f"st-clp {st_clp.__version__}")
        raise typer.Exit()


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    pass
