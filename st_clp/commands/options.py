"""Settings as options of a command, so that they are defined in one place."""

from __future__ import annotations

import inspect
import types
from collections.abc import Callable, Mapping, Sequence
from dataclasses import Field, fields
from pathlib import Path
from typing import Annotated, Any, Literal, get_type_hints

import typer

from st_clp.commands.advice import with_advice
from st_clp.settings import RunSettings, SettingsError
from st_clp.yaml_files import parse

# An option that is no setting: its kind, its default and its help.
Extra = tuple[Any, Any, str]

CONFIG: Extra = (Path | None, None, "A YAML file with settings.")


def settings_command(
    work: Callable[..., None], name: str, settings: Sequence[str], extras: Mapping[str, Extra]
) -> Callable[..., None]:
    """A command with an option for each of these settings and for each extra.

    Args:
        work: Called with all options by name; a setting that was not given is None.
        name: The command's name.
        settings: Names of fields of :class:`st_clp.settings.RunSettings`.
        extras: Further options, by name with underscores.
    """
    kinds = get_type_hints(RunSettings)
    parameters = [_parameter(item, kinds[item.name]) for item in fields(RunSettings) if item.name in settings]
    for extra, (kind, default, text) in extras.items():
        flag = "--" + extra.replace("_", "-")
        annotation = Annotated[kind, typer.Option(flag, help=text, show_default=False)]  # type: ignore[valid-type]
        parameters.append(
            inspect.Parameter(extra, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation)
        )

    @with_advice
    def command(**options: Any) -> None:
        work(**options)

    command.__name__ = name
    command.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    command.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return command


def given_settings(options: Mapping[str, Any]) -> dict[str, Any]:
    """The settings that the command line gives, without those that it does not."""
    given = {name: value for name, value in options.items() if value not in (None, [], ())}
    if "training_arg" in given:
        given["training_arg"] = _name_values(given["training_arg"])
    return given


def _name_values(pairs: list[str]) -> dict[str, Any]:
    found = {}
    for pair in pairs:
        name, separator, value = pair.partition("=")
        if not separator:
            raise SettingsError(f"--training-arg takes NAME=VALUE, got {pair!r}")
        # To YAML a bare no is false, but save_strategy=no means the word.
        word = value == "no" and name.endswith("strategy")
        try:
            found[name.replace("-", "_")] = value if word else parse(value)
        except ValueError as error:
            raise SettingsError(f"--training-arg {pair}: the value is no valid YAML: {error}") from None
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
