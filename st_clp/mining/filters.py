"""Filters: which ranked documents may be negatives of a query, and why the others may not."""

from __future__ import annotations

from collections.abc import Set
from dataclasses import dataclass
from typing import NamedTuple

from st_clp.options import MiningOptions
from st_clp.search import normalised_text


@dataclass(frozen=True)
class Candidate:
    """A document that the model ranked for a query.

    Attributes:
        doc_id: Its id.
        rank: Its place in the ranking, the query's relevant documents left out, from 0.
        score: Its similarity to the query by the model, or the cross-encoder's score where one rescored.
    """

    doc_id: str
    rank: int
    score: float


class Refusal(NamedTuple):
    """The reason why a candidate may not be a negative, and by how much its score exceeds the limit."""

    reason: str
    excess: float


def refusal(candidate: Candidate, positive_score: float, options: MiningOptions) -> Refusal | None:
    """The reason to refuse a candidate for its score; None if it may be a negative.

    The limits have the meanings of ``sentence_transformers.util.mine_hard_negatives``.
    """
    limits: list[tuple[str, float]] = []
    if options.absolute_margin is not None:
        limits.append(("within absolute_margin of the positive", positive_score - options.absolute_margin))
    if options.relative_margin is not None:
        # The margin is a share of the positive's absolute score, so that it lowers the limit for negative scores too.
        margin = options.relative_margin * abs(positive_score)
        limits.append(("within relative_margin of the positive", positive_score - margin))
    if options.max_score is not None:
        limits.append(("above max_score", options.max_score))
    for reason, limit in limits:
        if candidate.score > limit:
            return Refusal(reason, candidate.score - min(limit for _, limit in limits))
    if options.min_score is not None and candidate.score < options.min_score:
        return Refusal("below min_score", options.min_score - candidate.score)
    return None


@dataclass(frozen=True)
class RowTexts:
    """The normalised texts (:func:`st_clp.search.normalised_text`) that a candidate's text is compared with.

    Attributes:
        query: The query.
        answers: Its relevant documents.
    """

    query: str
    answers: Set[str]


def text_refusal(text: str, row: RowTexts, options: MiningOptions) -> str | None:
    """The reason to refuse a candidate for its text; None if it may be a negative.

    Only the texts of candidates that would be taken are read, so a filter of texts may be expensive.
    """
    found = normalised_text(text)
    if found == row.query:
        return "the query's own text"
    if found in row.answers:
        return "same text as a relevant document"
    return None
