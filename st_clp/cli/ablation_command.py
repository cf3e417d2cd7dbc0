"""``st-clp ablation``: one thing changed at a time, over seeds and languages."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.markup import escape
from rich.table import Table

from st_clp.cli.error_messages import after_a_stop
from st_clp.cli.settings_command import CONFIG, Extra, given_settings, settings_command
from st_clp.option_values import read_number
from st_clp.settings import RunSettings, SettingsError
from st_clp.terminal import new_console, print_whole

if TYPE_CHECKING:
    from st_clp.run.ablation import AblationTable

ABLATION_HELP = """Train variants of a run with several seeds, and test what each thing gains.

By default the rows of the paper's table and ours: pairs alone, random negatives, ANCE, CLP, intermediate projections
alone, a mixture of experts, the average with the base. All share the queries, what is mined, and the evaluation; the
learning rate of each is chosen on training queries held out, among the same rates. Stopped, it goes on where it was;
more seeds and variants may be added. `table.md`, `.json` and `.tex` are the table, `report.html` the queries behind it.

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
        "A YAML file of variants: names, and what each changes of the settings. By default the paper's rows and ours.",
    ),
    "seeds": (int, 3, "How many times each variant is trained."),
    "learning_rates": (
        str,
        "1e-5,3e-5,1e-4",
        "Learning rates to choose among for each variant; one is taken as it is.",
    ),
    "unseen": (list[str] | None, None, "A collection to evaluate on and not to train on. Can be given several times."),
    "overwrite": (bool, False, "Replace the ablation in the output folder."),
}
# Each variant has its own rate, and what goes on in a run's folder is none of an ablation's.
LEFT_OUT = ("learning_rate",)


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
