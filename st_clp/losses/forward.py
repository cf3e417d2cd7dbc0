"""Forward passes over the texts of a batch: each distinct text once, and texts of similar length together."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from sentence_transformers.base.losses.merged_forward import embed_columns, merge_feature_batches
from torch import Tensor, nn

PASS = 128  # tokens that take about as long as one more forward and backward pass does without any

Features = dict[str, Any]


def distinct_texts(columns: Sequence[Features], codes: Tensor) -> tuple[Features, Tensor] | None:
    """Make one column of the distinct texts of several columns. On a GPU this waits for the device.

    Args:
        columns: The features of each, as the model is given them.
        codes: ``(batch, columns)``, equal numbers for equal texts.

    Returns:
        The features of the distinct texts, and for each column and row the position of its text among them, ``(columns,
        batch)``. None if all texts differ, or if the columns are not padded and prepared alike.
    """
    flat = codes.T.reshape(-1)  # a column after the other, as they are merged
    different, places = torch.unique(flat, return_inverse=True)
    if len(different) == len(flat):
        return None
    merged = merge_feature_batches(list(columns)) if len(columns) > 1 else columns[0]
    if merged is None or merged["input_ids"].ndim != 2 or "cu_seq_lens_q" in merged:
        return None
    numbers = torch.arange(len(flat), device=flat.device)
    first = torch.full_like(different, len(flat)).scatter_reduce(0, places, numbers, "amin")
    # Values that are not one row a text, such as the prompt's length, are the same for all.
    chosen = {
        name: value[first] if isinstance(value, Tensor) and value.ndim > 1 else value for name, value in merged.items()
    }
    return chosen, places.reshape(len(columns), -1)


def embed_by_length(model: nn.Module, columns: Sequence[Features]) -> list[Tensor]:
    """Embed the columns of a batch with a forward pass for each group of texts of similar length, to save padding.

    A batch is as wide as its longest text. Of a hundred queries of 25 tokens on average one has 60, and more than half
    of the work is then for padding. The embeddings are the same, but for dropout and rounding. On a GPU, where the host
    would have to wait for the lengths, and among several processes, which all need the same number of passes, the
    columns share one pass.

    Args:
        model: The model that is trained.
        columns: The features of each, as the model is given them; columns of queries, or of documents.

    Returns:
        ``(batch, dim)`` for each column.
    """
    can_be_cut = _one_process() and all(map(_can_be_cut, columns))
    merged = merge_feature_batches(list(columns)) if can_be_cut else None
    if merged is not None:
        lengths = _lengths(merged["attention_mask"])
        groups = length_groups(lengths)
        if len(groups) > 1:
            parts = [model(_some(merged, torch.from_numpy(rows), int(lengths[rows].max()))) for rows in groups]
            places = torch.from_numpy(np.argsort(np.concatenate(groups)))
            embeddings = torch.cat([part["sentence_embedding"] for part in parts])[places]
            return list(embeddings.reshape(len(columns), -1, *embeddings.shape[1:]).unbind(0))
    return embed_columns(model, columns, separate_first=False)


def _one_process() -> bool:
    distributed = torch.distributed
    return not (distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1)


def _can_be_cut(features: Features) -> bool:
    """Whether the column consists of padded texts only, on a CPU, with padding on the right.

    With less padding on the left, tokens would have other positions.
    """
    if not _of_padded_texts(features):
        return False
    mask = features["attention_mask"]
    return mask.device.type == "cpu" and bool((mask[:, 0] != 0).all())


def _of_padded_texts(features: Features) -> bool:
    mask = features.get("attention_mask")
    if not isinstance(mask, Tensor) or mask.ndim != 2:
        return False
    tensors = [value for value in features.values() if isinstance(value, Tensor)]
    return all(value.ndim < 2 or len(value) == len(mask) for value in tensors)


def _lengths(mask: Tensor) -> np.ndarray:
    """``(texts,)``: the columns of the mask up to each text's last token."""
    tokens = mask.numpy() != 0
    return (tokens * np.arange(1, tokens.shape[1] + 1)).max(axis=1)


def _some(features: Features, rows: Tensor, width: int | None = None) -> Features:
    """The features of some of the texts, truncated to a width."""
    mask = features["attention_mask"]
    chosen = {}
    for name, value in features.items():
        if isinstance(value, Tensor) and value.ndim and len(value) == len(mask):
            value = value[rows]
            if value.ndim > 1 and value.shape[1] == mask.shape[1]:
                value = value[:, :width]
        chosen[name] = value
    return chosen


def shortest_first(features: Features) -> tuple[Features, Tensor | None]:
    """Sort a column's texts by length, for mini-batches with little padding.

    Nothing waits for a GPU here.

    Args:
        features: The column, as the model is given it.

    Returns:
        The sorted features and the position of each text among them; the column itself and None if it does not consist
        of padded texts only.
    """
    if not _of_padded_texts(features):
        return features, None
    order = (features["attention_mask"] != 0).sum(dim=1).argsort(stable=True)
    return _some(features, order), order.argsort()


def tokens_to_embed(lengths: np.ndarray, model: nn.Module) -> int:
    """How many tokens, padding included, :func:`embed_by_length` feeds to the model for texts of these lengths."""
    grouped = _one_process() and next(model.parameters()).device.type == "cpu"
    groups = length_groups(lengths) if grouped else [np.arange(len(lengths))]
    return sum(len(rows) * int(lengths[rows].max()) for rows in groups)


def length_groups(lengths: np.ndarray) -> list[np.ndarray]:
    """Group texts by length so that their passes cost least: padding counts as tokens, and each pass as some more.

    Args:
        lengths: ``(texts,)``, the tokens of each.

    Returns:
        The positions of each group's texts, every text in one group, from the shortest to the longest.
    """
    widths, counts = np.unique(lengths, return_counts=True)
    before = np.concatenate([[0], np.cumsum(counts)])  # texts that are shorter than each width
    least = np.zeros(len(widths) + 1)  # the cost of all texts that are shorter than each width
    first = np.zeros(len(widths) + 1, dtype=int)  # the first width of the last group there
    for end, width in enumerate(widths, start=1):
        costs = least[:end] + (before[end] - before[:end]) * width + PASS
        first[end] = costs.argmin()
        least[end] = costs[first[end]]
    order = np.argsort(lengths, kind="stable")
    groups, end = [], len(widths)
    while end:
        groups.append(order[before[first[end]] : before[end]])
        end = first[end]
    return groups[::-1]
