"""The small training that the tests of refreshed negatives share."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest


@pytest.fixture(scope="session")
def refresh_run() -> ModuleType:
    """The module ``refresh_run.py``, which is a script of its own too."""
    path = Path(__file__).parent / "refresh_run.py"
    spec = importlib.util.spec_from_file_location("refresh_run", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["refresh_run"] = module
    spec.loader.exec_module(module)
    return module
