"""``st-clp compare``: is one evaluation better than another, and by more than luck?"""

from __future__ import annotations

import io
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from st_clp.cli.error_messages import with_error_messages
from st_clp.files import whole_file
from st_clp.terminal import NARROWEST, new_console, print_whole

if TYPE_CHECKING:
    from evaluators.comparison import Comparison

SHOWN = 3


@with_error_messages
def compare(
    evaluations: Annotated[
        list[Path],
        typer.Argument(
            help="Folders of `st-clp evaluate`; the first is compared with each of the others. The folder of a run "
            "stands for its model before and after."
        ),
    ],
    metric: Annotated[str | None, typer.Option(help="What to compare. By default the first one's main metric.")] = None,
    format: Annotated[Literal["table", "latex", "csv", "json"], typer.Option(help="How to show it.")] = "table",
    output: Annotated[Path | None, typer.Option(help="Write to this file in place of the terminal.")] = None,
    seed: Annotated[int, typer.Option(help="Of the resampling.")] = 0,
) -> None:
    """Compare evaluations: differences with intervals, a paired randomisation test, and what changed most."""
    from evaluators.comparison import compare as compare_two
    from evaluators.evaluation import with_distinct_names
    from evaluators.tables import comparisons_text
    from st_clp.run.folder import evaluations_of
    from st_clp.settings import SettingsError

    found = with_distinct_names([evaluation for folder in evaluations for evaluation in evaluations_of(folder)])
    if len(found) < 2:
        raise SettingsError("a comparison needs two evaluations: name another folder")
    comparisons = [compare_two(found[0], other, metric, seed=seed) for other in found[1:]]
    if format == "table" and output is None:
        for comparison in comparisons:
            print_comparison(new_console(), comparison)
        return
    text = _table_text(comparisons) if format == "table" else comparisons_text(comparisons, format)
    if output is None:
        print(text)
        return
    with whole_file(output) as file:
        file.write(text)


def _table_text(comparisons: list[Comparison]) -> str:
    text = io.StringIO()
    for comparison in comparisons:
        print_comparison(new_console(file=text, width=120), comparison)
    return text.getvalue()


def print_comparison(console: Console, comparison: Comparison) -> None:
    """A line for each collection, and the queries that changed most."""
    from evaluators.comparison import most_changed

    pooled = ", pooled" if comparison.pooled else ""
    title = f"{comparison.before} → {comparison.after} ({comparison.metric}{pooled})"
    # Without rules between columns and zeros before the points it fits into 80 columns.
    table = Table(title=escape(title), title_justify="left", box=None, padding=(0, 1, 0, 0), pad_edge=False)
    table.add_column("collection", overflow="fold", min_width=NARROWEST)
    for name in ("before", "after", "change", "95 % interval", "p", "p (Holm)", "+/=/−"):
        table.add_column(name, justify="right", no_wrap=True)
    for found in comparison.differences:
        table.add_row(
            escape(found.key),
            _short(f"{found.before:.4f}"),
            _short(f"{found.after:.4f}"),
            _short(f"{found.difference:+.4f}"),
            f"{_short(f'{found.low:+.3f}')} to {_short(f'{found.high:+.3f}')}",
            p_text(found.p),
            p_text(found.p_adjusted),
            f"{found.wins}/{found.ties}/{found.losses}",
        )
    print_whole(console, table)
    if comparison.precision_note:
        console.print(f"  [yellow]{escape(comparison.precision_note)}[/yellow]", soft_wrap=True)
    for key, changes in comparison.changes.items():
        for change in most_changed(changes, SHOWN):
            console.print(
                f"  {escape(key)}  {escape(change.query_id)}: {change.before:.3f} → {change.after:.3f}", soft_wrap=True
            )


def _short(number: str) -> str:
    return number.replace("0.", ".", 1)


def p_text(p: float) -> str:
    """A p-value as it is written in tables; the smallest that the resampling can tell is 0.0002."""
    return "<.001" if p < 0.001 else _short(f"{p:.3f}")
