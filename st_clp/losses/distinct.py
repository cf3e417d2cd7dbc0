"""The different texts of a batch's columns, each once."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from sentence_transformers.base.losses.merged_forward import merge_feature_batches
from torch import Tensor


def distinct_texts(columns: Sequence[dict[str, Any]], codes: Tensor) -> tuple[dict[str, Any], Tensor] | None:
    """One column that has every text of several columns once. On a GPU this waits for the device.

    Args:
        columns: The features of each, as the model is given them.
        codes: ``(batch, columns)``, equal numbers for equal texts.

    Returns:
        The features of the different texts, and for each column and row the place of its text among them, ``(columns,
        batch)``. None where all texts differ, or where the columns are not padded and prepared alike.
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
    # What is not a row for each text, such as the prompt's length, is the same for all.
    chosen = {
        name: value[first] if isinstance(value, Tensor) and value.ndim > 1 else value for name, value in merged.items()
    }
    return chosen, places.reshape(len(columns), -1)
