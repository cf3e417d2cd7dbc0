"""The registry of collection sources; each recognises its own names."""

from __future__ import annotations

import difflib
import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from st_clp.data.checks import CollectionError

if TYPE_CHECKING:
    from st_clp.data.collection import Collection
    from st_clp.data.corpus import Corpus


class Source(Protocol):
    """What a module of this package offers."""

    def recognises(self, source: str) -> bool:
        """Whether ``source`` names a collection of this kind."""

    def splits(self, source: str) -> list[str]:
        """The splits with judgments."""

    def load(self, source: str, *, split: str | None, text_fields: Sequence[str] | None) -> Collection:
        """Load the collection."""

    def documents(self, source: str, *, text_fields: Sequence[str] | None) -> Corpus:
        """Load the documents alone; there need not be any queries."""

    def known_names(self) -> list[str]:
        """Names to suggest when one is not known."""


SOURCES: list[Source] = []


def register_source(source: Any) -> None:
    """Register an object with the methods of :class:`Source`. Sources are asked in the order of registration."""
    SOURCES.append(source)


def find_source(source: str) -> Source:
    """Find the source that recognises this name.

    Raises:
        CollectionError: No source recognises it; the message suggests the nearest known names.
    """
    for kind in SOURCES:
        if kind.recognises(source):
            return kind
    raise CollectionError(_unknown(source))


def open_corpus(source: str, *, text_fields: Sequence[str] | None = None) -> Corpus:
    """Open the documents of a collection, which may have no queries or judgments.

    Args:
        source: As for :meth:`st_clp.Collection.load`; a folder may hold ``corpus.jsonl`` alone.
        text_fields: Fields of a document to join by a space. None: the title and text.

    Raises:
        CollectionError: An unknown source, a broken file, or no documents.
    """
    return find_source(source).documents(source, text_fields=text_fields)


def _unknown(source: str) -> str:
    path = Path(source)
    if path.is_dir():
        return (
            f"{source} is a folder, but has no corpus.jsonl (or corpus.jsonl.gz) in it. A BEIR folder holds "
            "corpus.jsonl, queries.jsonl and qrels/SPLIT.tsv."
        )
    if path.is_file():
        return f'{source} is a file, but no .jsonl or .jsonl.gz of training rows ({{"query": …, "pos": […]}}).'
    if importlib.util.find_spec("ir_datasets") is None:
        return (
            f"unknown collection {source!r}; ids of ir_datasets can be named once it is there: pip install ir-datasets"
        )
    known = [name for kind in SOURCES for name in kind.known_names()]
    nearest = difflib.get_close_matches(source, known, n=5, cutoff=0.6)
    advice = f"Did you mean {', '.join(nearest)}?" if nearest else "Any id of the ir_datasets catalogue can be named."
    if path.suffix or source.startswith((".", "/", "~")):
        return f"no file or folder {source!r} ({path.absolute().parent} {_there(path.absolute().parent)}). {advice}"
    return f"unknown collection {source!r}: no such file or folder, and no such ir_datasets id. {advice}"


def _there(folder: Path) -> str:
    return "is there" if folder.is_dir() else "is not there either"
