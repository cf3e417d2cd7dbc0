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
        Exception: Of ``error_class``; the file is not there, is no UTF-8, no YAML or no mapping.
    """
    try:
        values = parse(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise error_class(f"the {kind} {path} is not there") from error
    except UnicodeDecodeError as error:
        raise error_class(f"{path} is no UTF-8 text ({error.reason}, byte {error.start})") from error
    except ValueError as error:
        raise error_class(f"{path} is no valid YAML: {error}") from error
    if not isinstance(values, dict):
        raise error_class(f"{path} must hold {content}")
    return values


def parse(text: str) -> Any:
    """What YAML text holds, a plain value, list or mapping.

    Raises:
        ValueError: It is no YAML, names a tag that is no plain value, or is nested too deep.
    """
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ValueError(" ".join(str(error).split())) from error
    except RecursionError:
        raise ValueError("nested too deep to be read") from None
    except (ValueError, TypeError, AttributeError, KeyError) as error:
        # A value that looks like a date or a number and is none, such as 2026-13-01, or a tag with the wrong content.
        raise ValueError(f"a value that cannot be read ({error})") from error
