"""Packages that only some of the work needs: they are imported when that work is asked for."""

from __future__ import annotations

import importlib
from typing import Any


def import_package(name: str, work: str, install: str) -> Any:
    """A module of a package that need not be installed.

    Args:
        name: The module, such as ``faiss``.
        work: What needs it, as the beginning of a sentence: ``"searching"``.
        install: What pip is to install.

    Raises:
        ModuleNotFoundError: It is not installed; the message says how to.
    """
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        package = name.partition(".")[0]
        quoted = f"'{install}'" if "[" in install else install
        raise ModuleNotFoundError(f"{work} needs {package}: pip install {quoted}", name=error.name) from error
