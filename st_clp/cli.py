"""``st-clp``: the command line."""

from __future__ import annotations

import functools
import inspect
import logging
import os
import sys
import types
from collections.abc import Callable
from dataclasses import Field, fields
from pathlib import Path
from typing import Annotated, Any, Literal, ParamSpec, get_type_hints

import typer
import yaml
from rich.console import Console
from rich.markup import escape

import st_clp
from st_clp.data.errors import CollectionError
from st_clp.settings import RunSettings, SettingsError

P = ParamSpec("P")

# These are about the input: trying again with the same would end the same way.
ENDS_A_RUN = (SettingsError, CollectionError)

app = typer.Typer(
    name="st-clp",
    help="Fine-tune text-embedding models for retrieval: hard negatives mined by the model itself (ANCE), a "
    "contrastive loss with a penalty (CLP), and a mixture of experts (MoE).",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
)

RUN_HELP = """Evaluate, mine, fine-tune, evaluate again and save, in one go.

Stopped at any point, the run goes on from what was finished with `--resume`.

Every option can stand in a YAML file too (`--config`), with underscores or dashes: `num_negatives: 4`. What the
command line gives comes before what the file gives.

**Examples**

`st-clp run --model BAAI/bge-m3 --collection miracl/ko --output bge-m3-ko`

`st-clp run --model BAAI/bge-m3 --collection ./my-collection --experts 0 --output my-model`

`st-clp run --output bge-m3-ko --resume`
"""


def main() -> None:
    """The entry point."""
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    app()


def with_advice(command: Callable[P, None]) -> Callable[P, None]:
    """End a command with a message, not a traceback, where it meets an error that its user can mend."""

    @functools.wraps(command)
    def guarded(*args: P.args, **kwargs: P.kwargs) -> None:
        console = Console(stderr=True, soft_wrap=True, highlight=False)
        try:
            command(*args, **kwargs)
        except KeyboardInterrupt:
            console.print(f"\n[yellow]Stopped.[/yellow] {_resume_advice()}")
            raise typer.Exit(130) from None
        except (ValueError, ModuleNotFoundError, OSError) as error:
            # Whoever wants to see where an error comes from sets ST_CLP_TRACEBACK=1.
            if os.environ.get("ST_CLP_TRACEBACK"):
                raise
            console.print(f"[red]Error:[/red] {escape(_message(error))}")
            raise typer.Exit(1) from None

    return guarded


def _message(error: Exception) -> str:
    if isinstance(error, OSError) and error.strerror:
        where = f": {error.filename}" if error.filename else ""
        return f"{error.strerror}{where}. {_resume_advice()}".rstrip()
    if isinstance(error, ENDS_A_RUN):
        return str(error)
    return f"{error or type(error).__name__}\n{_resume_advice()}".rstrip()


# The output folder of the run that is under way, for the advice after it was stopped.
_under_way: list[str] = []


def _resume_advice() -> str:
    if not _under_way:
        return ""
    return f"What was finished is kept; go on with: st-clp run --output {_under_way[-1]} --resume"


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
    _under_way.append(settings.output)
    run(settings, resume=resume, overwrite=overwrite, console=console)
    _under_way.clear()
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
        found[name.replace("-", "_")] = yaml.safe_load(value)
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


def _run_command() -> Callable[..., None]:
    """``run`` with one option for each setting, so that settings are defined in one place."""
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


app.command("run", help=RUN_HELP, no_args_is_help=True)(_run_command())


@app.command()
@with_advice
def search(
    path: Annotated[str, typer.Argument(help="The output folder of a finished run.")],
    query: Annotated[
        list[str] | None, typer.Argument(help="What to search for; read line by line if left out.")
    ] = None,
    k: Annotated[int, typer.Option("-k", min=1, help="How many documents to show.")] = 5,
    corpus: Annotated[
        list[str] | None, typer.Option(help="Search only this corpus (miracl/ko) or language (ko); may be repeated.")
    ] = None,
) -> None:
    """Answer a query from the collections that a run was evaluated on, with the model that it made."""
    from st_clp.searching import RunSearcher

    console = Console(highlight=False)
    searcher = RunSearcher(path, corpus)
    if query:
        print_answers(console, searcher.search(" ".join(query), k))
        return
    for line in sys.stdin if not sys.stdin.isatty() else iter(lambda: console.input("[bold]query>[/bold] "), ""):
        if line.strip():
            print_answers(console, searcher.search(line.strip(), k))


def print_answers(console: Console, answers: list[Any]) -> None:
    """Show answers, a block each."""
    for rank, answer in enumerate(answers, start=1):
        text = " ".join(answer.text.split())
        shown = text if len(text) <= 240 else text[:239] + "…"
        console.print(
            f"[bold]{rank}[/bold]  {answer.score:.4f}  [dim]{escape(f'{answer.corpus_name} {answer.doc_id}')}[/dim]"
        )
        console.print(f"   {escape(shown)}")


@app.command()
@with_advice
def demo(
    output: Annotated[str, typer.Option(help="The folder for the run.")] = "demo-run",
) -> None:
    """The whole method on a small collection in Korean, Persian, Hindi and English, in minutes, without a network."""
    from st_clp.demo import run_demo

    run_demo(output)


def _version(show: bool) -> None:
    if show:
        print(f"st-clp {st_clp.__version__}")
        raise typer.Exit()


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version and leave.")
    ] = False,
) -> None:
    pass


if __name__ == "__main__":
    main()
