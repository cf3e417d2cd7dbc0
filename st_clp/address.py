"""Where an endpoint is and which variable holds its key, checked so that no message or file ever repeats a key."""

from __future__ import annotations

import os
import re
import urllib.parse

# What a variable that is not set may be called: capitals with an underscore, which keys do not look like.
_NAME = re.compile(r"[A-Z][A-Z0-9]*(?:_[A-Z0-9]+)+")


def require_key_variable(name: str) -> None:
    """Refuse what is no name of an environment variable, without repeating it: it may be the key itself.

    Raises:
        ValueError: No variable of this name is set, and it does not look like one's name.
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
        ValueError: It holds what no header can, such as a line break.
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
        ValueError: It is no address of HTTP, or carries a password or key, which the message does not repeat.
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
