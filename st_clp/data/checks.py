"""Checks of ids, texts and grades, shared by every reader and command.

The limits are those of TREC run files and pytrec_eval, so that bad input is refused when it is read, not after the
corpus was encoded.
"""

from __future__ import annotations

import operator
import os
import re
from collections.abc import Iterable
from typing import Any

from st_clp.files import shown


class CollectionError(ValueError):
    """A collection cannot be read or used as asked; the message names the place and the remedy."""


# pytrec_eval counts the documents of each grade in an array as long as the largest grade, for every query.
LARGEST_GRADE = 10_000

_NOT_IN_AN_ID = re.compile(r"[\s\x00-\x1f\x7f-\x9f\ud800-\udfff]")
_NOT_FOR_C = re.compile(r"[\x00\ud800-\udfff]")
_GRADE = re.compile(r"([+-]?[0-9]{1,18})(?:\.0{0,18})?")


def require_id(identifier: Any, what: str, where: str) -> str:
    """Check an id: TREC run files and pytrec_eval must be able to carry it.

    Args:
        identifier: What was given.
        what: ``"query"`` or ``"document"``.
        where: What the message names: a file and line, or a collection.

    Raises:
        CollectionError: It is not a string, is empty, or contains white space, a control character or a lone surrogate.
    """
    if not isinstance(identifier, str):
        raise CollectionError(f"{where}: a {what} id must be a text, not {type(identifier).__name__}")
    if identifier and not _NOT_IN_AN_ID.search(identifier):
        return identifier
    reason, remedy = _fault(identifier)
    raise CollectionError(
        f"{where}: the {what} id {shown(identifier)} {reason}, which a TREC run file cannot carry; give the "
        f"collection ids without {remedy}"
    )


def _fault(identifier: str) -> tuple[str, str]:
    if identifier.split() != [identifier]:
        return "is empty or holds white space", "white space"
    if has_half_character(identifier):
        return "holds half a character (a lone surrogate)", "any"
    return "holds a control character", "any"


def require_ids(identifiers: Iterable[str], what: str, where: str) -> None:
    """As :func:`require_id`, for many ids at once."""
    known = list(identifiers)
    # One look at all of them together; "/" is a sign that is allowed.
    if all(map(bool, known)) and not _NOT_IN_AN_ID.search("/".join(known)):
        return
    for identifier in known:
        require_id(identifier, what, where)


def require_scorable_ids(identifiers: Iterable[str], what: str) -> None:
    """Refuse ids that crash pytrec_eval (lone surrogates) or that it truncates (null characters).

    Raises:
        CollectionError: There is one.
    """
    known = list(identifiers)
    if _NOT_FOR_C.search("/".join(known)):
        wrong = next(identifier for identifier in known if _NOT_FOR_C.search(identifier))
        raise CollectionError(
            f"the {what} id {shown(wrong)} holds half a character or a null character and cannot be scored; give the "
            "collection and the run ids without any"
        )


def require_text(text: Any, what: str, where: str) -> str:
    """Check that a text can be encoded.

    Args:
        text: What was given.
        what: What it is, such as ``"'text'"`` or ``"the query 'q1'"``.
        where: What the message names: a file and line, or a collection.

    Raises:
        CollectionError: It is not a string, or contains a lone surrogate.
    """
    if not isinstance(text, str):
        raise CollectionError(f"{where}: {what} must be text, not {type(text).__name__}")
    if has_half_character(text):
        place = next(n for n, letter in enumerate(text) if "\ud800" <= letter <= "\udfff")
        raise CollectionError(
            f"{where}: {what} is no valid text: it has half a character ({text[place]!r}, a lone surrogate) at place "
            f"{place}; remove it"
        )
    return text


def has_half_character(text: str) -> bool:
    """Whether there is a lone surrogate, which cannot be written as UTF-8."""
    if text.isascii():
        return False
    try:
        text.encode()
    except UnicodeEncodeError:
        return True
    return False


def require_grade(grade: Any, where: str) -> int:
    """A judgment's grade: a whole number, 10,000 at most either way.

    trec_eval uses grades directly as the gains of nDCG, with memory and time proportional to the largest grade; it
    turns grades beyond its range into 0.

    Raises:
        CollectionError: It is something else.
    """
    try:
        number = operator.index(grade)
    except TypeError:
        raise CollectionError(
            f"{where}: a grade must be a whole number, such as 0 or 1, not {shown(grade)} ({type(grade).__name__})"
        ) from None
    if abs(number) > LARGEST_GRADE:
        raise CollectionError(
            f"{where}: the grade {shown(number)} is beyond {LARGEST_GRADE:,}, the largest that can be scored; divide "
            "all grades by one number, which changes no nDCG"
        )
    return number


def read_grade(text: str) -> int | None:
    """Parse a grade from a file: a whole number in ASCII digits, also written like ``1.0``; None for anything else."""
    found = _GRADE.fullmatch(text)
    return int(found[1]) if found else None


def add_judgment(
    judgments: dict[str, dict[str, int]], query_id: str, doc_id: str, grade: int, counts: dict[str, int]
) -> None:
    """Add a judgment. Where a pair comes again with another grade, the last one wins, as in BEIR, and is counted."""
    grades = judgments.setdefault(query_id, {})
    if grades.get(doc_id, grade) != grade:
        cause = "judgments that came again with another grade (the last one counts)"
        counts[cause] = counts.get(cause, 0) + 1
    grades[doc_id] = grade


def readable_path(path: str | os.PathLike[str]) -> str:
    """A path as printable text, even if its name is not valid UTF-8."""
    return os.fsencode(path).decode("utf-8", "backslashreplace")
