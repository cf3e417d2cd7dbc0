"""``st-clp demo``: the whole method on the embedded collection."""

from __future__ import annotations

from typing import Annotated

import typer

from st_clp.cli.error_messages import with_error_messages


@with_error_messages
def demo(
    output: Annotated[str, typer.Option(help="The folder for the run.")] = "demo-run",
) -> None:
    """The whole method on a small collection in Korean, Persian, Hindi and English, in minutes, without a network."""
    from st_clp.cli.demo_run import run_demo

    run_demo(output)
