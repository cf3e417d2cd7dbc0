"""Commands that end with a message and what to do, not with a traceback."""

from __future__ import annotations

import errno
import functools
import os
import shlex
import shutil
from collections.abc import Callable, Iterable
from pathlib import PurePath
from typing import Any, ParamSpec

import typer
from rich.markup import escape

from st_clp.data.checks import CollectionError
from st_clp.option_values import is_unicode
from st_clp.settings import SettingsError
from st_clp.terminal import new_console

P = ParamSpec("P")

# These are about the input: trying again with the same would end the same way.
ENDS_A_RUN = (SettingsError, CollectionError)

ALMOST_NOTHING = 64 * 1024  # bytes

# The output folder of the run that is under way, for the advice after it was stopped.
under_way: list[str] = []

# What else to do after a stop, for commands that are no runs.
after_a_stop: list[str] = []
SAME_COMMAND = "What was encoded is kept; the same command goes on from there."


def with_error_messages(command: Callable[P, None]) -> Callable[P, None]:
    """End a command with a message, not a traceback, where it meets an error that its user can mend."""

    @functools.wraps(command)
    def guarded(*args: P.args, **kwargs: P.kwargs) -> None:
        console = new_console(stderr=True, soft_wrap=True)
        try:
            _require_unicode(kwargs.values())
            command(*args, **kwargs)
        except KeyboardInterrupt:
            console.print(f"\n[yellow]Stopped.[/yellow] {escape(_resume_advice())}")
            raise typer.Exit(130) from None
        except (ValueError, ModuleNotFoundError, OSError) as error:
            # Whoever wants to see where an error comes from sets ST_CLP_TRACEBACK=1.
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
    """Refuse what no file or report could repeat: names with bytes that are not UTF-8, half surrogates."""
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
