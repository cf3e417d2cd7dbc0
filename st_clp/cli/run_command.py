"""``st-clp run``: the whole method, with one option for each setting."""

from __future__ import annotations

import shlex
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

from st_clp.cli.error_messages import under_way
from st_clp.cli.settings_command import CONFIG, given_settings, settings_command
from st_clp.settings import RunSettings
from st_clp.terminal import new_console

RUN_HELP = """Evaluate, mine, fine-tune, evaluate again and save, in one go.

Stopped at any point, the run goes on from what was finished with `--resume`; settings that only later stages depend on
may then be changed.

Every option can stand in a YAML file too (`--config`), with underscores or dashes: `num_negatives: 4`. What the
command line gives comes before what the file gives.

**Examples**

`st-clp run --model BAAI/bge-m3 --collection miracl/ko --output bge-m3-ko`

`st-clp run --model BAAI/bge-m3 --collection ./my-collection --experts 0 --output my-model`

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
    from st_clp.run.recipe import forecast_run

    console = new_console()
    transformers_logging.disable_progress_bar()
    print_forecast(console, forecast_run(settings, resume=resume, overwrite=overwrite, console=console))


def run_settings(settings: RunSettings, *, resume: bool = False, overwrite: bool = False) -> None:
    """Run with these settings and say where the results are."""
    from transformers.utils import logging as transformers_logging

    from st_clp.run.recipe import run

    console = new_console()
    transformers_logging.disable_progress_bar()  # a bar for every model that is opened says nothing here
    settings.require("model", "collection", "output")
    under_way.append(settings.output)
    run(settings, resume=resume, overwrite=overwrite, console=console)
    under_way.clear()
    output = settings.output
    opening = "st_clp.load" if settings.experts else "SentenceTransformer"
    console.print(
        f'Saved in {output}: open it with {opening}("{output}"), look at it with '
        f'st-clp search {shlex.quote(output)} "…"; the report is {Path(output) / "report.json"}',
        markup=False,
    )


def run_command() -> Callable[..., None]:
    """The command, with one option for each setting."""
    extras = {
        "config": CONFIG,
        "resume": (bool, False, "Go on with the run in the output folder from what it finished."),
        "overwrite": (bool, False, "Replace the run in the output folder."),
        "dry_run": (bool, False, "Say what it would take, by a few batches that are timed; write nothing."),
    }
    return settings_command(_run, "run", [item.name for item in fields(RunSettings)], extras)
