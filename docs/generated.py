"""Pages that are made of the code: the commands and the options of every stage (a hook of mkdocs)."""

from __future__ import annotations

import dataclasses
from typing import Any

import typer.cli
import typer.main

from st_clp import options
from st_clp.cli import app
from st_clp.declaring import Options, declared
from st_clp.option_values import kind_of

CLASSES = (
    options.DataOptions,
    options.EncodingOptions,
    options.MiningOptions,
    options.QueryOptions,
    options.LossOptions,
    options.ExpertOptions,
    options.TrainingOptions,
    options.RefreshOptions,
    options.EvaluationOptions,
)


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Fill the pages that hold a mark for it."""
    return markdown.replace("<!-- commands -->", _commands()).replace("<!-- options -->", _options())


def _commands() -> str:
    command = typer.main.get_command(app)
    text = typer.cli.get_docs_for_click(obj=command, ctx=typer.Context(command), name="st-clp", title="Commands")
    return text.replace("<str>", "TEXT").replace("<", "&lt;").replace(">", "&gt;").replace("# Commands", "", 1)


def _options() -> str:
    return "\n\n".join(_table(cls) for cls in CLASSES)


def _table(cls: type[Options]) -> str:
    lines = [
        f"## {cls.__name__}",
        "",
        f"`st_clp.options.{cls.__name__}`: {(cls.__doc__ or '').strip().splitlines()[0]}",
        "",
        "| option | default | what it does |",
        "| --- | --- | --- |",
    ]
    for item in dataclasses.fields(cls):
        choices = kind_of(declared(cls)[item.name])[1]
        default = "" if item.default in (None, "", dataclasses.MISSING) else f"`{item.default}`"
        among = f" One of {', '.join(f'`{choice}`' for choice in choices)}." if choices else ""
        keyword = item.metadata["keyword"]
        name = f"`{item.name}`" + (f" (`{keyword}` in Python)" if keyword else "")
        lines.append(f"| {name} | {default} | {item.metadata['help']}{among} |".replace("\n", " "))
    return "\n".join(lines)
