"""Files of YAML that a user writes."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import yaml


def read_mapping(path: str | os.PathLike[str], kind: str, content: str, error_class: type[Exception]) -> dict[Any, Any]:
    """What a file of names and values holds.

    Args:
        path: The file.
        kind: What it is, for the message when it is not there.
        content: What it must hold, with an example, for the message when it holds something else.
        error_class: What to raise.

    Raises:
        Exception: Of ``error_class``; the file is not there, is no YAML or no mapping.
    """
    try:
        values = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise error_class(f"the {kind} {path} is not there") from error
    except yaml.YAMLError as error:
        raise error_class(f"{path} is no valid YAML: {' '.join(str(error).split())}") from error
    if not isinstance(values, dict):
        raise error_class(f"{path} must hold {content}")
    return values
