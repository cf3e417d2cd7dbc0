"""What all commands share: options derived from the declared settings, and errors shown as messages."""

from __future__ import annotations

import errno
import functools
import inspect
import os
import shlex
import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import MISSING, Field, fields
from pathlib import Path, PurePath
from typing import Annotated, Any, Literal, ParamSpec, get_args, get_origin

import typer
from rich.markup import escape

from st_clp.data.checks import CollectionError
from st_clp.declaring import Options, declared, group_of
from st_clp.files import parse
from st_clp.option_values import is_unicode, kind_of
from st_clp.settings import RunSettings, SettingsError
from st_clp.terminal import new_console

P = ParamSpec("P")

# Errors in the input: running again with the same input would fail in the same way.
ENDS_A_RUN = (SettingsError, CollectionError)

ALMOST_NOTHING = 64 * 1024  # bytes

# The output folder of the current run, for the advice that is printed when it is stopped.
under_way: list[str] = []

# Advice after a stop, for commands that are not runs.
after_a_stop: list[str] = []
SAME_COMMAND = "What was encoded is kept; the same command goes on from there."


def with_error_messages(command: Callable[P, None]) -> Callable[P, None]:
    """Show a message instead of a traceback for errors that the user can fix."""

    @functools.wraps(command)
    def guarded(*args: P.args, **kwargs: P.kwargs) -> None:
        console = new_console(stderr=True, soft_wrap=True)
        # Advice left by an earlier command in the same process does not apply to this one.
        under_way.clear()
        after_a_stop.clear()
        try:
            _require_unicode(kwargs.values())
            command(*args, **kwargs)
        except KeyboardInterrupt:
            console.print(f"\n[yellow]Stopped.[/yellow] {escape(_resume_advice())}")
            raise typer.Exit(130) from None
        except (ValueError, ModuleNotFoundError, OSError) as error:
            # ST_CLP_TRACEBACK=1 shows the traceback.
            if os.environ.get("ST_CLP_TRACEBACK"):
                raise
            console.print(f"[red]Error:[/red] {escape(_message(error))}")
            raise typer.Exit(1) from None
        except Exception as error:
            # Writers of weights have errors of their own for a full disk, none of them an OSError.
            if os.environ.get("ST_CLP_TRACEBACK") or not _disk_is_full(error):
                raise
            advice = escape(_resume_advice())
            console.print(f"[red]Error:[/red] No space left on the disk; make room. {advice}".rstrip())
            raise typer.Exit(1) from None

    return guarded


def _require_unicode(values: Iterable[Any]) -> None:
    """Refuse values that cannot be written to files: names with bytes that are not UTF-8, lone surrogates."""
    for value in values:
        if isinstance(value, (list, tuple)):
            _require_unicode(value)
        elif isinstance(value, (str, PurePath)) and not is_unicode(str(value)):
            raise SettingsError(f"{str(value)!r} is not valid UTF-8; rename what it names, or write it anew")


def _disk_is_full(error: BaseException) -> bool:
    seen: BaseException | None = error
    while seen is not None:
        if os.strerror(errno.ENOSPC) in str(seen):
            return True
        seen = seen.__cause__ or seen.__context__
    return any(shutil.disk_usage(path).free < ALMOST_NOTHING for path in under_way if os.path.isdir(path))


def _message(error: Exception) -> str:
    if isinstance(error, OSError) and error.strerror:
        where = f": {error.filename}" if error.filename else ""
        return f"{error.strerror}{where}. {_resume_advice()}".rstrip()
    if isinstance(error, ENDS_A_RUN):
        return str(error)
    return f"{error or type(error).__name__}\n{_resume_advice()}".rstrip()


def _resume_advice() -> str:
    if not under_way:
        return after_a_stop[-1] if after_a_stop else ""
    return f"What was finished is kept; go on with: st-clp run --output {shlex.quote(under_way[-1])} --resume"


# An option that is no setting: its kind, its default and its help; or its kind with what typer is to make of it.
Extra = tuple[Any, Any, str]

ARGUMENT = "argument"
"""The alias of what may stand without a name."""

CONFIG: Extra = (Path | None, None, "A YAML file with settings.")


def settings_command(
    work: Callable[..., None],
    name: str,
    settings: Sequence[str],
    extras: Mapping[str, Extra],
    *,
    of: type[Options] = RunSettings,
    aliases: Mapping[str, str] | None = None,
) -> Callable[..., None]:
    """A command with an option for each of these settings and for each extra.

    Args:
        work: Called with all options by name; a setting that was not given is None.
        name: The command's name.
        settings: Names of fields of ``of``.
        extras: Further options, by name with underscores.
        of: What the settings are of.
        aliases: Former names of options, which are not shown: name to what it is called now.
    """
    parameters = []
    for extra, (kind, default, text) in extras.items():
        flag = "--" + extra.replace("_", "-")
        option = typer.Option(flag, help=text, show_default=False)
        annotation = kind if get_origin(kind) is Annotated else Annotated[kind, option]
        parameters.append(
            inspect.Parameter(extra, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation)
        )

    shared = [_parameter(item, of) for item in fields(of) if item.name in settings]
    # Where most options are settings, those are what the command is about.
    parameters = [*shared, *parameters] if of is RunSettings else [*parameters, *shared]
    former = aliases or {}
    kinds = {parameter.name: parameter for parameter in parameters}
    parameters += [_hidden(alias, kinds[name]) for alias, name in former.items()]

    @with_error_messages
    def command(**options: Any) -> None:
        for alias, name in former.items():
            given = options.pop(alias)
            options[name] = given if options[name] == kinds[name].default else options[name]
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


def _parameter(item: Field[Any], of: type[Options]) -> inspect.Parameter:
    """A setting as a command-line option. None stands for "not given", so that a file's value is not covered."""
    kind, choices, _ = kind_of(declared(of)[item.name])
    flag = "--" + item.name.replace("_", "-")
    flags = [f"{flag}/--no-{flag[2:]}"] if kind is bool else [flag]
    shown = "" if item.default in (None, "", MISSING) else f" [default: {item.default}]"
    option = typer.Option(
        *flags,
        help=item.metadata["help"] + shown,
        rich_help_panel=group_of(of, item.name) if of is RunSettings else None,
        show_default=False,
    )
    given: Any = Literal[tuple(choices)] if choices else list[str] if kind in (list, dict) else kind
    return inspect.Parameter(
        item.name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=Annotated[given | None, option]
    )


def _hidden(alias: str, known: inspect.Parameter) -> inspect.Parameter:
    """A former name of an option, or a positional argument; it works but is not shown."""
    kind = get_args(known.annotation)[0]
    if alias == ARGUMENT:
        hidden: Any = typer.Argument(hidden=True, metavar=f"[{known.name.upper()}]")
    else:
        hidden = typer.Option("--" + alias.replace("_", "-"), hidden=True)
    return inspect.Parameter(
        alias, inspect.Parameter.KEYWORD_ONLY, default=known.default, annotation=Annotated[kind, hidden]
    )
