"""The title of a document, or else its first sentence, as a query: free, and a last resort."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator

from st_clp.data import Document
from st_clp.queries.interface import DocumentQueries, NegativeQuery, QuerySource
from st_clp.queries.wording import EMPTY

DEFAULT_WEIGHT = 0.5
LONGEST_LEAD = 160  # characters
# A sentence ends at its script's full stop; a Latin one must be followed by a space, as 3.14 is no end.
_END = re.compile(r"(?<=[.!?؟۔])\s+|(?<=[。！？।॥])")


class TitleOrLead(QuerySource):
    """A document's title, marked ``"title"``; where its source knows none, the first sentence, marked ``"lead"``.

    Args:
        weight: The weight of the queries.
    """

    name = "title"
    free = True

    def __init__(self, *, weight: float = DEFAULT_WEIGHT) -> None:
        self.weight = weight

    def generate(self, documents: Iterable[Document], *, language: str | None = None) -> Iterator[DocumentQueries]:
        """Yield answers in the documents' order."""
        for document in documents:
            text, source = " ".join(document.title.split()), "title"
            if not text:
                text, source = lead(document.text), "lead"
            queries = (NegativeQuery(text, source, self.weight),) if text else ()
            yield DocumentQueries(document.doc_id, queries, None if text else EMPTY)


def lead(text: str) -> str:
    """The first sentence that says something, cut between words where it is long."""
    sentences = (" ".join(part.split()) for part in _END.split(text))
    first = next((part for part in sentences if any(character.isalnum() for character in part)), "")
    if len(first) <= LONGEST_LEAD:
        return first
    cut = first[: LONGEST_LEAD + 1].rpartition(" ")[0]
    return cut or first[:LONGEST_LEAD]
