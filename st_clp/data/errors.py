"""The error that a collection's reader raises."""

from __future__ import annotations


class CollectionError(ValueError):
    """A collection cannot be read or used as asked; the message names the place and the remedy."""
