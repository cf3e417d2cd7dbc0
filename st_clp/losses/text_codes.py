"""Numbers that identify equal texts of a batch, by their tokens or their embeddings."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

_MODALITY_PREFIXES = ("pixel_", "image_", "video_", "input_features", "input_values")
# splitmix64 (Steele, Lea and Flood 2014) as signed 64-bit numbers: the factors of its output function, and its step.
_FIRST, _SECOND, _STEP = (value - (1 << 64) for value in (0xBF58476D1CE4E5B9, 0x94D049BB133111EB, 0x9E3779B97F4A7C15))


def text_codes(features: dict[str, Any]) -> Tensor | None:
    """A number for every text of a column, equal for equal tokens.

    The number is the sum of one 64-bit hash for each (token, position), so padding on either side does not
    matter and columns of different width, mini-batches and processes agree. Two different texts share a number with
    a chance of about 2^-64; all that would follow is one negative that does not count.

    Args:
        features: A column as the model is given it: padded (``input_ids`` and ``attention_mask`` of
            ``(batch, tokens)``), flattened (``cu_seq_lens_q``), or a bag of tokens (``offsets``).

    Returns:
        ``(batch,)`` int64, or None where the features are not, or not only, tokens.
    """
    ids = features.get("input_ids")
    if not isinstance(ids, Tensor) or any(key.startswith(_MODALITY_PREFIXES) for key in features):
        return None
    if "cu_seq_lens_q" in features:
        return _codes_of_segments(ids.reshape(-1), features["cu_seq_lens_q"][:-1])
    if "offsets" in features:
        return _codes_of_segments(ids, features["offsets"])
    mask = features.get("attention_mask")
    if ids.ndim != 2 or (mask is not None and mask.shape != ids.shape):
        return None
    mask = torch.ones_like(ids) if mask is None else (mask != 0).long()
    positions = mask.cumsum(dim=1)
    return (_hash(ids.long() + (positions << 32)) * mask).sum(dim=1)


def embedding_codes(embeddings: Tensor) -> Tensor:
    """As :func:`text_codes`, for inputs that are not tokens: equal embeddings ``(batch, dim)`` share a number.

    Where dropout is active the same input has two embeddings and is not recognised.
    """
    bits = (embeddings.detach().double() + 0.0).contiguous().view(torch.int64)
    positions = torch.arange(1, bits.shape[1] + 1, device=bits.device)
    return _hash(bits + _hash(positions)).sum(dim=1)


def _codes_of_segments(ids: Tensor, starts: Tensor) -> Tensor:
    starts = starts.long()
    lengths = torch.diff(starts, append=starts.new_tensor([len(ids)]))
    segments = torch.repeat_interleave(torch.arange(len(starts), device=ids.device), lengths)
    positions = torch.arange(1, len(ids) + 1, device=ids.device) - starts[segments]
    hashes = _hash(ids.long() + (positions << 32))
    return torch.zeros(len(starts), dtype=torch.int64, device=ids.device).index_add_(0, segments, hashes)


def _hash(numbers: Tensor) -> Tensor:
    """splitmix64's output function: every bit of the input moves about half the bits of the output."""
    numbers = numbers * _STEP
    numbers = (numbers ^ _shift(numbers, 30)) * _FIRST
    numbers = (numbers ^ _shift(numbers, 27)) * _SECOND
    return numbers ^ _shift(numbers, 31)


def _shift(numbers: Tensor, bits: int) -> Tensor:
    """Shift to the right, filling up with zeros (torch's own shift repeats the sign)."""
    return (numbers >> bits) & ((1 << (64 - bits)) - 1)
