"""What the host knows of a batch: how long its texts are, and which of them are equal.

A GPU works through what the host has queued. To read a number from it, the host has to wait until all of that is done,
and then the GPU waits for the host. The data collator has the tokens before they are copied to the device.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from st_clp.losses.text_codes import text_codes

KEY = "host_texts"  # among a column's features

Features = dict[str, Any]


@dataclass(frozen=True)
class HostTexts:
    """A column's texts as the host knows them.

    Attributes:
        lengths: ``(texts,)``, the tokens of each, up to the last one that is not padding.
        codes: ``(texts,)`` int64, equal numbers for equal texts, from :func:`st_clp.losses.text_codes.text_codes`.
    """

    lengths: np.ndarray
    codes: np.ndarray

    @classmethod
    def of(cls, features: Features) -> HostTexts | None:
        """Read them from a column's features.

        None if the column is on another device, does not consist of padded texts only, or is padded on the left: with
        less padding there, tokens would have other positions.
        """
        if not of_padded_texts(features) or features["attention_mask"].device.type != "cpu":
            return None
        codes = text_codes(features)
        tokens = features["attention_mask"].numpy() != 0
        if codes is None or not tokens[:, 0].all():
            return None
        return cls((tokens * np.arange(1, tokens.shape[1] + 1)).max(axis=1), codes.numpy())

    def __getitem__(self, rows: np.ndarray) -> HostTexts:
        return HostTexts(self.lengths[rows], self.codes[rows])

    def __len__(self) -> int:
        return len(self.lengths)


def of_padded_texts(features: Features) -> bool:
    """Whether a column has a row of tokens for each text, and no other tensors of two or more dimensions."""
    mask = features.get("attention_mask")
    if not isinstance(mask, Tensor) or mask.ndim != 2 or not mask.numel():
        return False
    tensors = [value for value in features.values() if isinstance(value, Tensor)]
    return all(value.ndim < 2 or len(value) == len(mask) for value in tensors)


@contextmanager
def host_texts(columns: Sequence[Features]) -> Iterator[list[HostTexts | None]]:
    """What the host knows of each column's texts: it is told, or the column is in its own memory.

    Within the context the columns hold what the model takes; what was told is put back afterwards, as losses around
    another one call it several times with the same columns.
    """
    told = [features.pop(KEY, None) for features in columns]
    try:
        yield [_still(texts, features) for texts, features in zip(told, columns, strict=True)]
    finally:
        for texts, features in zip(told, columns, strict=True):
            if texts is not None:
                features[KEY] = texts


def _still(told: HostTexts | None, features: Features) -> HostTexts | None:
    """The texts of a column: those that were told, unless the batch was split over devices since."""
    if told is None:
        return HostTexts.of(features)
    return told if of_padded_texts(features) and len(features["attention_mask"]) == len(told) else None


def on_device(numbers: np.ndarray, device: torch.device) -> Tensor:
    """Copy numbers to a device without waiting for it."""
    found = torch.from_numpy(numbers)
    return (found.pin_memory() if device.type == "cuda" else found).to(device, non_blocking=True)


class TellingPreprocess:
    """Preprocesses texts, and adds what the host knows of them to their features."""

    def __init__(self, preprocess: Callable[..., Features]) -> None:
        self.preprocess = preprocess

    def __call__(self, inputs: Any, **options: Any) -> Features:
        features = self.preprocess(inputs, **options)
        texts = HostTexts.of(features)
        return features if texts is None else {**features, KEY: texts}
