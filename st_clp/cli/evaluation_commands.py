"""``st-clp evaluate``, ``compare`` and ``report``."""

from __future__ import annotations

import io
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from st_clp.cli.settings_command import (
    ARGUMENT,
    SAME_COMMAND,
    Extra,
    after_a_stop,
    settings_command,
    with_error_messages,
)
from st_clp.declaring import names_of
from st_clp.files import read_json, whole_file
from st_clp.options import (
    DEFAULT_METRICS,
    ClusterOptions,
    DataOptions,
    EncodingOptions,
    EvaluationOptions,
    OwnDocumentOption,
)
from st_clp.terminal import NARROWEST, new_console, print_whole

if TYPE_CHECKING:
    from evaluators.comparison import Comparison
    from evaluators.evaluation import Evaluation
    from st_clp.data import Collection


EVALUATE_HELP = """Evaluate a model's retrieval on one or more collections.

The output folder gets the runs as TREC run files, the scores of every query, and a description of model and
collections; `st-clp compare` and `st-clp report` read it. If it is interrupted, the same command continues.

**Examples**

`st-clp evaluate --model BAAI/bge-m3 --collection miracl/ko --collection miracl/fa --output bge-m3`

`st-clp evaluate --from-run run.trec --collection beir/scifact/test --output bm25`
"""


@dataclass(frozen=True)
class EvaluateSettings(EvaluationOptions, DataOptions):
    """The settings of the command that other stages have too."""


SETTINGS = [
    *(
        "eval_split",
        *names_of(EncodingOptions, OwnDocumentOption, ClusterOptions),
        "pool_depth",
        "max_seq_length",
        "text_field",
    ),
]
# Former names of options.
ALIASES = {ARGUMENT: "model", "split": "eval_split", "dtype": "encode_dtype", "batch_size": "encode_batch_size"}
EXTRAS: dict[str, Extra] = {
    "model": (str, "", "The model: a folder or a name on the Hub. Not used with --from-run."),
    "collection": (
        list[str] | None,
        None,
        "What to evaluate on: an ir_datasets id or a BEIR folder; may be repeated.",
    ),
    "output": (str, "", "The folder for runs, scores and embeddings."),
    "metric": (list[str] | None, None, f"Metrics, the main one first. [default: {' '.join(DEFAULT_METRICS)}]"),
    "from_run": (
        list[Path] | None,
        None,
        "Score this TREC run file instead of a model; one for each collection.",
    ),
    "name": (str | None, None, "The name to show for the model. By default as given."),
    "pool": (
        list[Path] | None,
        None,
        "Search only the judged documents and the best documents of this run; one for each collection.",
    ),
    "store": (
        str | None,
        None,
        "The folder for the embeddings, or an address such as s3://bucket/folder. [default: embeddings in the output "
        "folder]",
    ),
}


def evaluate_command() -> Callable[..., None]:
    """The command."""
    return settings_command(_evaluate, "evaluate", SETTINGS, EXTRAS, of=EvaluateSettings, aliases=ALIASES)


def _evaluate(
    model: str,
    collection: list[str] | None,
    output: str,
    metric: list[str] | None,
    from_run: list[Path] | None,
    name: str | None,
    pool: list[Path] | None,
    store: str | None,
    eval_split: str | None,
    max_seq_length: int | None,
    text_field: list[str] | None,
    **given: Any,
) -> None:
    from st_clp.settings import SettingsError

    if not collection or not output:
        raise SettingsError(
            f"no {'output' if collection else 'collection'}: give --{'output' if collection else 'collection'}"
        )
    if bool(model) == bool(from_run):
        raise SettingsError("name a model, or give --from-run for a run that was made before; not both")
    for flag, files in (("--from-run", from_run), ("--pool", pool)):
        if files and len(files) != len(collection):
            raise SettingsError(f"{len(collection)} collections and {len(files)} {flag}: give one for each, in order")
    collections = _load(collection, eval_split, text_field)
    options: dict[str, Any] = {
        "store_dir": store or Path(output) / "embeddings",
        "options": EvaluationOptions(
            **{key: value for key, value in given.items() if value is not None},
            corpus="pooled" if pool else "full",
            show_progress_bar=True,
            write_csv=False,
            write_json=False,
        ),
    }
    if pool:
        options["reference_runs"] = dict(zip(collections, pool, strict=True))
    evaluator = _evaluator(collections, list(metric or DEFAULT_METRICS), options)
    loaded = None
    if from_run:
        for part, file in zip(evaluator.parts.values(), from_run, strict=True):
            part.score(_read_run(file))
    else:
        from st_clp.run.modelling import load_base_model

        loaded = load_base_model(model, max_seq_length=max_seq_length)
        after_a_stop.append(SAME_COMMAND)
        evaluator(loaded)
        after_a_stop.clear()
    from st_clp.run.modelling import model_name

    called = name or model_name(model) or ", ".join(file.stem for file in from_run or [])
    found = evaluator.save(output, model_name=called, model=loaded, dtype=evaluator.options.encode_dtype)
    print_evaluation(new_console(), found)


def _load(sources: list[str], split: str | None, text_field: list[str] | None) -> dict[str, Collection]:
    from evaluators.collection_evaluator import distinct_names
    from st_clp.data import Collection
    from st_clp.run.splits import find_eval_split
    from st_clp.settings import SettingsError

    if repeated := [source for source in sources if sources.count(source) > 1]:
        raise SettingsError(f"the collection {repeated[0]} is named twice; name each once")
    found = [
        Collection.load(source, split=find_eval_split(source, split), text_fields=text_field or None)
        for source in sources
    ]
    return dict(zip(distinct_names(found), found, strict=True))


def _evaluator(collections: dict[str, Collection], metrics: list[str], options: dict[str, Any]) -> Any:
    from evaluators import BenchmarkEvaluator

    return BenchmarkEvaluator(collections, "", metrics, **options)


def _read_run(path: Path) -> Any:
    from evaluators.runs import read_run

    return read_run(path)


def print_evaluation(console: Console, found: Evaluation) -> None:
    """The scores, a line for each collection."""
    from evaluators.comparison import scores_table

    frame = scores_table(found)
    pooled = next((result.pooled for result in found.results.values() if result.pooled), None)
    table = Table(title=escape(found.model + (f" (pooled: {pooled})" if pooled else "")), title_justify="left")
    table.add_column("collection", overflow="fold", min_width=NARROWEST)
    for metric in frame.columns:
        table.add_column(metric, justify="right", no_wrap=True)
    for key, row in frame.iterrows():
        table.add_row(escape(str(key)), *(f"{value:.4f}" for value in row))
    print_whole(console, table)
    for key, result in found.results.items():
        told = [f"{number:,} {what}" for what, number in result.counts.items() if number]
        console.print(f"  {escape(key)}: {escape('; '.join(told))}", soft_wrap=True)
    console.print(f"Written to {escape(str(found.path))}", soft_wrap=True)


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
    metric: Annotated[
        str | None, typer.Option(help="The metric to compare. By default the main metric of the first.")
    ] = None,
    format: Annotated[Literal["table", "latex", "csv", "json"], typer.Option(help="The output format.")] = "table",
    output: Annotated[Path | None, typer.Option(help="Write to this file instead of the terminal.")] = None,
    seed: Annotated[int, typer.Option(help="The seed of the resampling.")] = 0,
) -> None:
    """Compare evaluations: differences with intervals, a paired randomisation test, and what changed most."""
    from evaluators.comparison import compare as compare_two
    from evaluators.comparison import comparisons_text
    from evaluators.evaluation import with_distinct_names
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


@with_error_messages
def report(
    folders: Annotated[
        list[Path],
        typer.Argument(help="Folders of `st-clp evaluate` or `st-clp run`; the first is compared with each."),
    ],
    output: Annotated[Path, typer.Option("--output", "-o", help="The HTML file.")] = Path("report.html"),
    metric: Annotated[
        str | None, typer.Option(help="The metric to show. By default the main metric of the first.")
    ] = None,
    title: Annotated[str | None, typer.Option(help="The page's title.")] = None,
    texts: Annotated[bool, typer.Option(help="Show queries and documents, read from the collections.")] = True,
) -> None:
    """Write a self-contained HTML page: scores, differences, queries that changed most, mining, curves and experts."""
    from evaluators.evaluation import EvaluationError
    from evaluators.page import write_page
    from evaluators.page.run_parts import MADE_ANEW
    from st_clp.run.folder import RunDirectory, evaluations_of

    evaluations = [found for folder in folders for found in evaluations_of(folder)]
    runs = {}
    for folder in folders:
        file = folder / "report.json"
        if RunDirectory(folder).settings_file.is_file() and file.is_file():
            runs[str(folder)] = read_json(file, error=EvaluationError, remedy=MADE_ANEW)
    path = write_page(output, evaluations, metric=metric, runs=runs, texts=texts, title=title)
    new_console(soft_wrap=True, markup=False).print(f"Written to {path}")
