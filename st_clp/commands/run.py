"""``st-clp run``: the whole method, with one option for each setting."""

from __future__ import annotations

import inspect
import types
from collections.abc import Callable
from dataclasses import Field, fields
from pathlib import Path
from typing import Annotated, Any, Literal, get_type_hints

import typer
import yaml
from rich.console import Console

from st_clp.commands.advice import under_way, with_advice
from st_clp.settings import RunSettings, SettingsError

RUN_HELP = """Evaluate, mine, fine-tune, evaluate again and save, in one go.

Stopped at any point, the run goes on from what was finished with `--resume`.

Every option can stand in a YAML file too (`--config`), with underscores or dashes: `num_negatives: 4`. What the
command line gives comes before what the file gives.

**Examples**

`st-clp run --model BAAI/bge-m3 --collection miracl/ko --output bge-m3-ko`

`st-clp run --model BAAI/bge-m3 --collection ./my-collection --experts 0 --output my-model`

`st-clp run --output bge-m3-ko --resume`
"""


def _run(**options: Any) -> None:
    config, resume, overwrite = (options.pop(name) for name in ("config", "resume", "overwrite"))
    given = {name: value for name, value in options.items() if value not in (None, [], ())}
    if "training_arg" in given:
        given["training_arg"] = _name_values(given["training_arg"])
    values = RunSettings.read_yaml(config) if config else {}
    if resume and not config and set(given) == {"output"}:
        from st_clp.rundir import RunDirectory

        started = RunDirectory(given["output"]).settings_file
        if not started.is_file():
            raise SettingsError(f"{given['output']} holds no run to resume")
        values = RunSettings.read_yaml(started)
    settings = RunSettings.from_dict({**values, **given}, where=str(config or "command line"))
    run_settings(settings, resume=resume, overwrite=overwrite)


def run_settings(settings: RunSettings, *, resume: bool = False, overwrite: bool = False) -> None:
    """Run with these settings and say where the results are."""
    from transformers.utils import logging as transformers_logging

    from st_clp.recipe import run

    console = Console(highlight=False)
    transformers_logging.disable_progress_bar()  # a bar for every model that is opened says nothing here
    settings.require("model", "collection", "output")
    under_way.append(settings.output)
    run(settings, resume=resume, overwrite=overwrite, console=console)
    under_way.clear()
    opening = "st_clp.load" if settings.experts else "SentenceTransformer"
    console.print(
        f'Saved in {settings.output}: open it with {opening}("{settings.output}"), look at it with '
        f'st-clp search {settings.output} "…"; the report is {Path(settings.output) / "report.json"}'
    )


def _name_values(pairs: list[str]) -> dict[str, Any]:
    found = {}
    for pair in pairs:
        name, separator, value = pair.partition("=")
        if not separator:
            raise SettingsError(f"--training-arg takes NAME=VALUE, got {pair!r}")
        # To YAML a bare no is false, but save_strategy=no means the word.
        word = value == "no" and name.endswith("strategy")
        found[name.replace("-", "_")] = value if word else yaml.safe_load(value)
    return found


def _parameter(item: Field[Any], kind: Any) -> inspect.Parameter:
    """A setting as a command-line option. None stands for "not given", so that a file's value is not covered."""
    flag = "--" + item.name.replace("_", "-")
    flags = [f"{flag}/--no-{flag[2:]}"] if bool in getattr(kind, "__args__", (kind,)) else [flag]
    default = item.default_factory() if callable(item.default_factory) else item.default
    shown = "" if default in (None, "", [], {}) else f" [default: {default}]"
    option = typer.Option(
        *flags,
        help=item.metadata["help"] + shown,
        rich_help_panel=item.metadata["group"],
        show_default=False,
    )
    if choices := item.metadata["choices"]:
        kind = Literal[choices]
    elif isinstance(kind, types.GenericAlias):
        kind = list[str]
    return inspect.Parameter(
        item.name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=Annotated[kind | None, option]
    )


def run_command() -> Callable[..., None]:
    """The command, with one option for each setting, so that settings are defined in one place."""
    kinds = get_type_hints(RunSettings)
    parameters = [_parameter(item, kinds[item.name]) for item in fields(RunSettings)]
    extras = {
        "config": (Path | None, None, "A YAML file with settings."),
        "resume": (bool, False, "Go on with the run in the output folder from what it finished."),
        "overwrite": (bool, False, "Replace the run in the output folder."),
    }
    for name, (kind, default, text) in extras.items():
        annotation = Annotated[kind, typer.Option(f"--{name}", help=text, show_default=False)]  # type: ignore[valid-type]
        parameters.append(
            inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation)
        )

    @with_advice
    def run(**options: Any) -> None:
        _run(**options)

    run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    run.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return run
