"""Tokenised texts sorted by length, and batches filled by number of tokens."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

TOKENISE_TOGETHER = 256  # texts of like length, so that short ones are not held at the longest one's width

Features = dict[str, Any]


@dataclass(frozen=True)
class Batch:
    """Texts for one forward pass.

    Args:
        rows: Their positions in the window.
        features: The model's inputs.
        tokens: Their number of tokens, padding included.
        padded: Whether there is any padding.
    """

    rows: np.ndarray
    features: Features
    tokens: int
    padded: bool

    def __len__(self) -> int:
        return len(self.rows)


@dataclass(frozen=True)
class _Part:
    """Some of a window's tokenised texts, longest first."""

    rows: np.ndarray
    lengths: np.ndarray
    features: Features


class Window:
    """A window's texts, tokenised."""

    def __init__(self, parts: Sequence[_Part]) -> None:
        self._parts = parts
        self._ends = np.cumsum([len(part.rows) for part in parts])

    def __len__(self) -> int:
        return int(self._ends[-1])

    @property
    def lengths(self) -> np.ndarray:
        """(texts,): the tokens of each text without padding, in arbitrary order."""
        return np.concatenate([part.lengths for part in self._parts])

    def batch(self, position: int, tokens: int, batch_size: int | None) -> Batch:
        """The batch that begins at this position in the order by length.

        Args:
            position: How many texts precede it.
            tokens: The batch takes as many texts as fit into so many tokens, padding included, and at least one.
            batch_size: No more texts than this; None for any number.
        """
        index = int(np.searchsorted(self._ends, position, side="right"))
        part, begin = self._parts[index], position - (int(self._ends[index - 1]) if index else 0)
        width = max(1, int(part.lengths[begin]))
        number = max(1, tokens // width)
        if batch_size is not None:
            number = min(number, batch_size)
        rows = part.rows[begin : begin + number]
        features = _trim(_take(part.features, slice(begin, begin + number)), width)
        padded = int(part.lengths[begin : begin + number].min()) < width
        return Batch(rows, features, len(rows) * width, padded)


def tokenise(preprocess: Callable[[list[str]], Features], texts: list[str]) -> Window:
    """Tokenise texts with ``preprocess``, sorted by length."""
    order = np.argsort([-len(text) for text in texts], kind="stable")
    parts = []
    for begin in range(0, len(order), TOKENISE_TOGETHER):
        rows = order[begin : begin + TOKENISE_TOGETHER]
        features = preprocess([texts[row] for row in rows])
        lengths = features["attention_mask"].sum(dim=1).numpy()
        # By characters they were sorted roughly; by tokens they are sorted exactly.
        exact = np.argsort(-lengths, kind="stable")
        parts.append(_Part(rows[exact], lengths[exact], _take(features, torch.from_numpy(exact))))
    return Window(parts)


def _take(features: Features, rows: Any) -> Features:
    """The features of some of the texts; values that are not one row a text are kept."""
    number = len(features["attention_mask"])
    return {
        name: value[rows] if isinstance(value, torch.Tensor) and value.ndim and len(value) == number else value
        for name, value in features.items()
    }


def _trim(features: Features, width: int) -> Features:
    """Remove columns that are padding in every row, on whichever side the tokenizer pads."""
    mask = features["attention_mask"]
    left = not bool(mask[:, 0].all())
    columns = slice(mask.shape[1] - width, None) if left else slice(0, width)
    return {
        name: value[:, columns]
        if isinstance(value, torch.Tensor) and value.ndim >= 2 and value.shape[:2] == mask.shape
        else value
        for name, value in features.items()
    }
