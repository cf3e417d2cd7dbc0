"""Reading a setting's value by the kind that its field declares, wherever it was written."""

from __future__ import annotations

import json
import math
from typing import Any

KINDS: dict[str, type] = {
    "str": str,
    "int": int,
    "float": float,
    "bool": bool,
    "list[str]": list,
    "dict[str, Any]": dict,
}
LARGEST_INT = 2**63 - 1  # what the libraries below can hold


def read_setting(name: str, kind: str, value: Any, choices: tuple[str, ...] | None = None) -> Any:
    """The value of a setting, as its field declares it.

    YAML has words of its own for what a user means otherwise: ``2e-5`` and ``1e3`` are text to it, and ``off`` and
    ``no`` are false.

    Args:
        name: The setting, for the message.
        kind: As it is written in the field's annotation, such as ``"float | None"``.
        value: What was given.
        choices: What it may be, or None.

    Raises:
        ValueError: It is of another kind, no finite number, or no text that can be written to a file.
    """
    plain = kind.removesuffix(" | None")
    if value is None:
        if kind != plain:
            return None
        raise ValueError(f"{name} has no value")
    wanted = KINDS[plain]
    if wanted in (int, float):
        value = read_number(name, wanted, value)
    elif wanted is str and value is False and "off" in (choices or ()):
        value = "off"
    elif wanted is list and isinstance(value, str):
        value = [value]
    if not isinstance(value, wanted) or (wanted is int and isinstance(value, bool)):
        raise ValueError(f"{name} must be of the kind {plain}, got {shown(value)}")
    for text in value if isinstance(value, list) else [value] if isinstance(value, str) else []:
        _check_text(name, text, part_of_list=isinstance(value, list))
    if isinstance(value, dict):
        _check_dict(name, value)
    return value


def _check_dict(name: str, value: dict[Any, Any]) -> None:
    """Refuse what the report, which is JSON, could not repeat after all the work."""
    for key, item in value.items():
        if not isinstance(key, str):
            raise ValueError(f"{name} must give names a value each, and {shown(key)} is no name")
        try:
            is_plain = is_unicode(json.dumps(item, allow_nan=False, ensure_ascii=False))
        except (TypeError, ValueError, RecursionError):
            is_plain = False
        if not is_plain:
            raise ValueError(
                f"{name}: {key} must be text, a finite number, or a list or mapping of such, got {shown(item)}"
            )


def _check_text(name: str, text: Any, *, part_of_list: bool) -> None:
    if not isinstance(text, str):
        raise ValueError(f"{name} must be a list of text, and {shown(text)} is none")
    if part_of_list and not text:
        raise ValueError(f"{name} holds an empty text")
    if not is_unicode(text):
        raise ValueError(f"{name}={text!r} is not valid UTF-8; rename what it names, or write it anew")


def is_unicode(text: str) -> bool:
    """Whether the text can be written as UTF-8; half a surrogate, which stands for a stray byte too, cannot."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def read_number(name: str, kind: type, value: Any) -> Any:
    """A number written as a number or as text, ``1e-2`` among others; what is no number comes back as it is.

    Args:
        name: What it is for, for the message.
        kind: ``int`` or ``float``.
        value: What was given.

    Raises:
        ValueError: It is infinite, no number (NaN), or beyond 64 bits.
    """
    number = value
    if isinstance(value, str):
        try:
            number = int(value)
        except ValueError:
            try:
                number = float(value)
            except ValueError:
                return value
    if isinstance(number, bool) or not isinstance(number, (int, float)):
        return value
    if isinstance(number, float) and not math.isfinite(number):
        raise ValueError(f"{name} must be a finite number, got {number:g}")
    if abs(number) > LARGEST_INT and kind is int:
        raise ValueError(f"{name} must be at most {LARGEST_INT}, got {shown(value)}")
    if kind is int:
        return int(number) if number == int(number) else value
    try:
        return float(number)
    except OverflowError:
        raise ValueError(f"{name} must be a finite number, got {shown(value)}") from None


def shown(value: Any) -> str:
    """The value as a message shows it, cut off where it is long."""
    try:
        text = repr(value)
    except (ValueError, RecursionError):  # an integer of thousands of digits, or nested too deep
        text = f"a {type(value).__name__} too large to show"
    return text if len(text) <= 80 else f"{text[:77]}..."
