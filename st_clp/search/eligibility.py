"""Which documents can be candidates for a query, in a run file and as negatives.

A document that has the query's own id is the query itself in collections where queries are documents too (ArguAna,
Quora): it is neither an answer nor a negative, as in BEIR. A document that has the query's own text may be an answer,
so it stays in a run, but it must never be a negative.
"""

from __future__ import annotations

import unicodedata


def is_own_document(query_id: str, doc_id: str, *, ignore_identical_ids: bool = True) -> bool:
    """Whether a document has the query's own id, so that it is neither retrieved nor a negative.

    Args:
        query_id: The query's id.
        doc_id: The document's id.
        ignore_identical_ids: The switch of that name, as in BEIR. False where queries and documents are numbered
            independently of each other: then no document is left out for its id.
    """
    return ignore_identical_ids and query_id == doc_id


def is_own_text(query: str, text: str) -> bool:
    """Whether a document has the query's own text, so that it is no negative; see :func:`normalised_text`."""
    return normalised_text(query) == normalised_text(text)


def may_be_negative(query_id: str, query: str, doc_id: str, text: str, *, ignore_identical_ids: bool = True) -> bool:
    """Whether a document that is not judged relevant may be a query's negative.

    Args:
        query_id: The query's id.
        query: The query's text.
        doc_id: The document's id.
        text: The document's text, as a model encodes it.
        ignore_identical_ids: As in :func:`is_own_document`.
    """
    if is_own_document(query_id, doc_id, ignore_identical_ids=ignore_identical_ids):
        return False
    return not is_own_text(query, text)


def normalised_text(text: str) -> str:
    """A normal form that is equal for equal texts.

    Unicode's compatibility forms are unified (NFKC: composed and decomposed letters, half and full width), every run of
    white space becomes one space, and the ends are stripped. Case and punctuation are kept.
    """
    # White space first and last: compatibility forms can bring some of their own.
    return " ".join(unicodedata.normalize("NFKC", " ".join(text.split())).split())
