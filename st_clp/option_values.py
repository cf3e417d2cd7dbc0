"""Reading an option's value by the kind that its field declares, wherever it was written."""

from __future__ import annotations

import json
import math
import os
import re
import urllib.parse
from collections.abc import Sequence
from numbers import Integral, Real
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin

from st_clp.files import shown

LARGEST_INT = 2**63 - 1  # what the libraries below can hold


class SettingsError(ValueError):
    """A setting is unknown, of the wrong kind or out of range; the message names it and the remedy."""


def kind_of(declared: Any) -> tuple[type, Sequence[str], bool]:
    """(the kind, the choices if it has any, whether it may be None) of what a field's annotation means."""
    optional = False
    if get_origin(declared) in (Union, UnionType):
        (declared,) = [one for one in get_args(declared) if one is not type(None)]
        optional = True
    if get_origin(declared) is Literal:
        return str, get_args(declared), optional
    return get_origin(declared) or declared, (), optional


def read_value(name: str, declared: Any, value: Any) -> Any:
    """The value of an option, as its field declares it.

    YAML has words of its own for what a user means otherwise: ``2e-5`` and ``1e3`` are text to it, and ``off`` and
    ``no`` are false.

    Args:
        name: The option, for the message.
        declared: What the field's annotation means, such as ``float | None``.
        value: What was given.

    Raises:
        SettingsError: It is of another kind, no finite number, none of the choices, or no text that can be written to a
            file.
    """
    kind, choices, optional = kind_of(declared)
    if value is None:
        if optional:
            return None
        raise SettingsError(f"{name} has no value")
    if kind in (int, float):
        value = read_number(name, kind, value)
    elif kind is str and value is False and "off" in choices:
        value = "off"
    elif kind is list and isinstance(value, (str, tuple)):
        value = [value] if isinstance(value, str) else list(value)
    if choices and value not in choices:
        raise SettingsError(f"{name} must be one of {', '.join(choices)}, got {shown(value)}")
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        plain = f"{kind.__name__}[str]" if kind is list else kind.__name__
        raise SettingsError(f"{name} must be of the kind {plain}, got {shown(value)}")
    for text in value if isinstance(value, list) else [value] if isinstance(value, str) else []:
        _check_text(name, text, part_of_list=isinstance(value, list))
    if isinstance(value, dict):
        _check_dict(name, value)
    return value


def _check_dict(name: str, value: dict[Any, Any]) -> None:
    """Refuse values that could not be written to the report, which is JSON."""
    for key, item in value.items():
        if not isinstance(key, str):
            raise SettingsError(f"{name} must give names a value each, and {shown(key)} is no name")
        try:
            is_plain = is_unicode(json.dumps(item, allow_nan=False, ensure_ascii=False))
        except (TypeError, ValueError, RecursionError):
            is_plain = False
        if not is_plain:
            raise SettingsError(
                f"{name}: {key} must be text, a finite number, or a list or mapping of such, got {shown(item)}"
            )


def _check_text(name: str, text: Any, *, part_of_list: bool) -> None:
    if not isinstance(text, str):
        raise SettingsError(f"{name} must be a list of text, and {shown(text)} is none")
    if part_of_list and not text:
        raise SettingsError(f"{name} holds an empty text")
    if not is_unicode(text):
        raise SettingsError(f"{name}={text!r} is not valid UTF-8; rename what it names, or write it anew")


def is_unicode(text: str) -> bool:
    """Whether the text can be written as UTF-8; half a surrogate, which stands for a stray byte too, cannot."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def read_number(name: str, kind: type, value: Any) -> Any:
    """Read a number that is given as a number or as text such as ``1e-2``; anything else is returned unchanged.

    Args:
        name: What it is for, for the message.
        kind: ``int`` or ``float``.
        value: What was given.

    Raises:
        SettingsError: It is infinite, no number (NaN), or beyond 64 bits.
    """
    number: Any = value
    if isinstance(value, str):
        try:
            number = int(value)
        except ValueError:
            try:
                number = float(value)
            except ValueError:
                return value
    if isinstance(number, bool) or not isinstance(number, Real):
        return value
    return _as_number(name, kind, value, number)


def _as_number(name: str, kind: type, value: Any, number: Any) -> Any:
    if isinstance(number, Integral):
        number = int(number)
    elif not math.isfinite(number):
        raise SettingsError(f"{name} must be a finite number, got {number:g}")
    if kind is int and abs(number) > LARGEST_INT:
        raise SettingsError(f"{name} must be at most {LARGEST_INT}, got {shown(value)}")
    if kind is int:
        return int(number) if number == int(number) else value
    try:
        return float(number)
    except OverflowError:
        raise SettingsError(f"{name} must be a finite number, got {shown(value)}") from None


# What looks like a variable's name even if it is not set: capitals with an underscore, unlike a key.
_NAME = re.compile(r"[A-Z][A-Z0-9]*(?:_[A-Z0-9]+)+")


def require_key_variable(name: str) -> None:
    """Refuse what is not the name of an environment variable. The message does not repeat it: it may be the key itself.

    Raises:
        ValueError: No variable of this name is set, and it does not look like a variable's name.
    """
    try:
        known = name in os.environ
    except (TypeError, ValueError):  # no text, or none that a variable can be called
        known = False
    if not known and not (isinstance(name, str) and len(name) <= 64 and _NAME.fullmatch(name)):
        raise ValueError(
            "query_key_variable takes the name of an environment variable, such as OPENAI_API_KEY, and what was given "
            "is none that is set (it is not repeated here, for it may be the key): put the key into a variable, and "
            "give the variable's name"
        )


def read_key(variable: str) -> str | None:
    """The key in a variable; None where there is none.

    Raises:
        ValueError: It holds characters that an HTTP header cannot carry, such as a line break.
    """
    key = os.environ.get(variable)
    if key and not re.fullmatch(r"[!-~]+", key):
        raise ValueError(
            f"the key in the environment variable {variable} holds a space, a line break or a letter outside ASCII, "
            "which no key has: set it again"
        )
    return key or None


def require_address(address: str, key_variable: str) -> str:
    """The host of an endpoint's address.

    Raises:
        ValueError: It is not an HTTP address, or it carries a password or key, which the message does not repeat.
    """
    try:
        parts = urllib.parse.urlsplit(address)
        host = parts.hostname
        _ = parts.port
    except ValueError:  # whose message may repeat the address
        host = None
    if host is None or parts.scheme not in ("http", "https"):
        raise ValueError("the endpoint's address must be like http://localhost:8000/v1, and what was given is not")
    if "@" in parts.netloc or parts.query or parts.fragment:
        raise ValueError(
            f"the address of the endpoint at {host} carries a password or key: leave it out and put the key into the "
            f"environment variable {key_variable}"
        )
    return host
