"""``st-clp report``: evaluations and runs as one page."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from st_clp.cli.error_messages import with_error_messages
from st_clp.files import read_json
from st_clp.terminal import new_console


@with_error_messages
def report(
    folders: Annotated[
        list[Path],
        typer.Argument(help="Folders of `st-clp evaluate` or `st-clp run`; the first is compared with each."),
    ],
    output: Annotated[Path, typer.Option("--output", "-o", help="The HTML file.")] = Path("report.html"),
    metric: Annotated[str | None, typer.Option(help="What to show. By default the first one's main metric.")] = None,
    title: Annotated[str | None, typer.Option(help="The page's title.")] = None,
    texts: Annotated[bool, typer.Option(help="Show queries and documents, read from the collections.")] = True,
) -> None:
    """Write one self-contained HTML page: scores, differences, what changed most, mining, curves and experts."""
    from evaluators.evaluation import EvaluationError
    from evaluators.page import write_page
    from evaluators.page.training import MADE_ANEW
    from st_clp.run.folder import RunDirectory, evaluations_of

    evaluations = [found for folder in folders for found in evaluations_of(folder)]
    runs = {}
    for folder in folders:
        file = folder / "report.json"
        if RunDirectory(folder).settings_file.is_file() and file.is_file():
            runs[str(folder)] = read_json(file, error=EvaluationError, remedy=MADE_ANEW)
    path = write_page(output, evaluations, metric=metric, runs=runs, texts=texts, title=title)
    new_console(soft_wrap=True, markup=False).print(f"Written to {path}")
