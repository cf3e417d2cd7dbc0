"""The columns of training rows, and the weights in their labels."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, TypeVar

import torch
from torch import Tensor

logger = logging.getLogger(__name__)

Column = TypeVar("Column")


@dataclass(frozen=True)
class Layout:
    """The columns of a row: anchor, positive, n negatives, then m queries for each negative in order.

    Inside the losses the columns are in "queries first" order: anchor, queries of the negatives, positive,
    negatives. Queries are short and documents long, so each half can share one forward pass.
    """

    num_negatives: int
    queries_per_negative: int

    @classmethod
    def from_columns(cls, num_columns: int, queries_per_negative: int) -> Layout:
        """Settle the number of negatives from the number of columns.

        Args:
            num_columns: Columns of a row, without the label.
            queries_per_negative: m, the queries that each negative has.

        Raises:
            ValueError: The columns cannot be split into negatives with m queries each.
        """
        if num_columns == 2:
            return cls(0, queries_per_negative)
        per_negative = 1 + queries_per_negative
        num_negatives, left_over = divmod(num_columns - 2, per_negative)
        if num_columns < 2 or left_over:
            fitting = ", ".join(str(2 + count * per_negative) for count in range(4))
            queries = "query" if queries_per_negative == 1 else "queries"
            raise ValueError(
                f"got {num_columns} columns, which cannot be split: with queries_per_negative={queries_per_negative} "
                f"a row is an anchor, a positive, n negatives and then {queries_per_negative} {queries} for each "
                f"negative, so {fitting}, ... columns. Fill up the missing columns (an empty text with label 0 stands "
                "for a query that a negative does not have), or set queries_per_negative to what the dataset has: 0 "
                "for negatives without queries."
            )
        return cls(num_negatives, queries_per_negative)

    @property
    def num_negative_queries(self) -> int:
        return self.num_negatives * self.queries_per_negative

    @property
    def num_queries(self) -> int:
        """The anchor and the queries of the negatives."""
        return 1 + self.num_negative_queries

    def queries_first(self, columns: Sequence[Column]) -> list[Column]:
        """Reorder columns from the order of the dataset to anchor, negative queries, positive, negatives."""
        first_query = 2 + self.num_negatives
        return [columns[0], *columns[first_query:], *columns[1:first_query]]

    def names(self) -> list[str]:
        """A description of each column, in the order of the dataset."""
        negatives = [f"negative {number}" for number in range(1, self.num_negatives + 1)]
        queries = [
            f"query {number} of {negative}"
            for negative in negatives
            for number in range(1, self.queries_per_negative + 1)
        ]
        return ["anchor", "positive", *negatives, *queries]


def weights_from_labels(labels: Tensor | None, batch_size: int, layout: Layout) -> Tensor | None:
    """Read the labels as the weights of the negative queries.

    A one-dimensional tensor of integer zeros is what ``InputExample`` gives when no label was set
    (``model.old_fit`` passes it on), and so means the same as no labels. Where there is no query to weigh, labels can
    be no weights: they are ignored with a warning, as the losses of sentence-transformers ignore them.

    Args:
        labels: ``(batch, n * m)``, each from 0 to 1, or None where the dataset has no label column. That they are in
            this range is for :class:`RangeCheck` to see.
        batch_size: Rows in the batch.
        layout: The columns of a row.

    Returns:
        ``(batch, n * m)`` weights, or None where every query counts fully.

    Raises:
        ValueError: The labels have another shape or kind.
    """
    if labels is None:
        return None
    unset = labels.ndim == 1 and not labels.is_floating_point() and not labels.is_complex() and not bool(labels.any())
    if unset:
        return None
    expected = (batch_size, layout.num_negative_queries)
    if not layout.num_negative_queries and tuple(labels.shape) != expected:
        _warn_of_unread_labels(tuple(labels.shape[1:]))
        return None
    if tuple(labels.shape) != expected:
        raise ValueError(
            f"labels must have the shape {expected}, one weight for each query of a negative ({batch_size} rows, "
            f"{layout.num_negatives} negatives with {layout.queries_per_negative} queries each), but have the shape "
            f"{tuple(labels.shape)}. Give each row a list of {expected[1]} numbers from 0 to 1, or take out of "
            "the dataset what the Trainer reads as the label: dataset.remove_columns('label'), or 'labels', 'score' or "
            "'scores', whichever it has."
        )
    if labels.is_complex():
        raise ValueError("labels are the weights of the negatives' queries, from 0 to 1, and no complex numbers.")
    return labels


class RangeCheck:
    """Checks that weights lie between 0 and 1 without waiting for a GPU: there an error is raised one step later."""

    def __init__(self) -> None:
        self._waiting: tuple[Tensor, torch.cuda.Event] | None = None

    def __call__(self, weights: Tensor | None) -> None:
        """Check the weights of a batch; on a GPU the batch before is judged.

        Raises:
            ValueError: Some weight is not from 0 to 1, or no number.
        """
        if self._waiting is not None:
            (bounds, copied), self._waiting = self._waiting, None
            copied.synchronize()  # a whole step ago
            _check_bounds(bounds, "in the batch before this one")
        if weights is None or not weights.numel():
            return
        bounds = torch.stack([*weights.detach().float().aminmax(), weights.detach().float().sum()])
        if weights.device.type != "cuda":
            _check_bounds(bounds, "in this batch")
            return
        here = torch.empty(bounds.shape, dtype=bounds.dtype, pin_memory=True)
        here.copy_(bounds, non_blocking=True)
        copied = torch.cuda.Event()
        copied.record(torch.cuda.current_stream(weights.device))
        self._waiting = here, copied

    def __getstate__(self) -> dict[str, Any]:
        return {"_waiting": None}  # an event belongs to its process


def _check_bounds(bounds: Tensor, where: str) -> None:
    """Raise unless (minimum, maximum, sum) are those of weights; the sum is NaN if any weight is."""
    least, greatest, total = bounds.tolist()
    if not (least >= 0 and greatest <= 1 and math.isfinite(total)):
        raise ValueError(
            "labels are the weights of the negatives' queries and must lie between 0 (no such query) and 1; "
            f"those {where} lie between {least} and {greatest}."
        )


@lru_cache
def _warn_of_unread_labels(shape: tuple[int, ...]) -> None:
    """Warn once, not in every step."""
    logger.warning(
        "the dataset has a label or score column (%s a row), which is not read: no negative has a query that it could "
        "weigh. dataset.remove_columns takes it out.",
        "one number" if not shape else f"numbers of the shape {shape}",
    )


def drop_foreign_features(columns: Sequence[dict[str, Any]]) -> None:
    """Remove, in place, features that the Trainer put into a column because of another column's name.

    The Trainer tells columns apart by the beginning of their feature names, so that the column "negative" is also
    given what belongs to "negative_query". Columns with odd features could not share a forward pass.
    """
    suffix = "_input_ids"
    prefixes = [{key[: -len(suffix)] for key in features if key.endswith(suffix)} for features in columns]
    everywhere = set.intersection(*prefixes) if prefixes else set()
    for features, found in zip(columns, prefixes, strict=True):
        for prefix in found - everywhere:
            for key in [key for key in features if key.startswith(f"{prefix}_")]:
                del features[key]


def check_finite(columns: Sequence[Tensor], names: Sequence[str]) -> None:
    """Raise where a column's embeddings hold NaN or infinite values, naming the column.

    Raises:
        ValueError: Some embedding is not finite.
    """
    for embeddings, name in zip(columns, names, strict=True):
        rows = (~torch.isfinite(embeddings)).any(dim=-1)
        if bool(rows.any()):
            raise ValueError(
                f"{int(rows.sum())} of {len(rows)} embeddings of the column {name!r} are NaN or infinite (the first "
                f"in row {int(rows.nonzero()[0])} of the batch). Common causes: float16 overflow, a learning rate that "
                "is too high, a text without any token."
            )
