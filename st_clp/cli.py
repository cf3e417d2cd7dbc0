"""``st-clp``: the command line."""

from __future__ import annotations

from typing import Annotated

import typer

import st_clp
from st_clp.commands import ablation, compare, demo, doctor, evaluate, mine, pairs, queries, report, run, search, store
from st_clp.terminal import log_to_terminal, show_what_can_be_shown

app = typer.Typer(
    name="st-clp",
    help="Fine-tune text-embedding models for retrieval: hard negatives mined by the model itself (ANCE), a "
    "contrastive loss with a penalty (CLP), and a mixture of experts (MoE).\n\nEvery command ends with status 0 where "
    "all is done, 1 where something is wrong with what it was given (and says what to do), 2 where an option is, and "
    "130 where it was stopped by Ctrl-C.",
    no_args_is_help=True,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
)

app.command("run", help=run.RUN_HELP, no_args_is_help=True)(run.run_command())
app.command("mine", help=mine.MINE_HELP, no_args_is_help=True)(mine.mine_command())
app.command("queries", help=queries.QUERIES_HELP, no_args_is_help=True)(queries.queries_command())
app.command("pairs", help=pairs.PAIRS_HELP, no_args_is_help=True)(pairs.pairs_command())
app.command("evaluate", help=evaluate.EVALUATE_HELP, no_args_is_help=True)(evaluate.evaluate_command())
app.command(no_args_is_help=True)(compare.compare)
app.command(no_args_is_help=True)(report.report)
app.command("ablation", help=ablation.ABLATION_HELP, no_args_is_help=True)(ablation.ablation_command())
app.command()(search.search)
app.add_typer(store.store, name="store")
app.command()(demo.demo)
app.command()(doctor.doctor)


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
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version and leave.")
    ] = False,
) -> None:
    pass


if __name__ == "__main__":
    main()
