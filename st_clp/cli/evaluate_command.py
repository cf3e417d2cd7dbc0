"""``st-clp evaluate``: a model, or anybody's run, on any collections."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from st_clp.cli.error_messages import SAME_COMMAND, after_a_stop
from st_clp.cli.settings_command import ARGUMENT, Extra, settings_command
from st_clp.declaring import names_of
from st_clp.options import DataOptions, EncodingOptions, EvaluationOptions, OwnDocumentOption
from st_clp.terminal import NARROWEST, new_console, print_whole

if TYPE_CHECKING:
    from evaluators.evaluation import Evaluation
    from st_clp.data import Collection

DEFAULT_METRICS = ["ndcg@10", "ndcg@5", "recall@100", "mrr@10"]

EVALUATE_HELP = """Evaluate a model's retrieval, language by language.

The output folder gets the runs as TREC run files, every query's scores, and what they are of; `st-clp compare` and
`st-clp report` read it. Stopped, it goes on where it was.

**Examples**

`st-clp evaluate --model BAAI/bge-m3 --collection miracl/ko --collection miracl/fa --output bge-m3`

`st-clp evaluate --from-run run.trec --collection beir/scifact/test --output bm25`
"""


@dataclass(frozen=True)
class EvaluateSettings(EvaluationOptions, DataOptions):
    """The settings of the command that other stages have too."""


SETTINGS = [
    *("eval_split", *names_of(EncodingOptions, OwnDocumentOption), "pool_depth", "max_seq_length", "text_field"),
]
# What the options were called before all commands called them alike.
ALIASES = {ARGUMENT: "model", "split": "eval_split", "dtype": "encode_dtype", "batch_size": "encode_batch_size"}
EXTRAS: dict[str, Extra] = {
    "model": (str, "", "A model: a folder or a name on the Hub. Left out with --from-run."),
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
        "Score this TREC run file in place of a model's; one for each collection.",
    ),
    "name": (str | None, None, "What to call the model. By default as it is given."),
    "pool": (
        list[Path] | None,
        None,
        "Search only judged documents and the best of this run; one for each collection.",
    ),
    "store": (Path | None, None, "The folder for the embeddings. [default: embeddings in the output folder]"),
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
    store: Path | None,
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
    evaluator = _evaluator(collections, metric or DEFAULT_METRICS, options)
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
    from evaluators.collection import distinct_names
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
    from evaluators.tables import scores_table

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
