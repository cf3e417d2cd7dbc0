"""Forward passes over the texts of a batch: each distinct text once, and texts of similar length together."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from sentence_transformers.base.losses.merged_forward import embed_columns, merge_feature_batches
from torch import Tensor, nn

from st_clp.losses.host_texts import Features, HostTexts, of_padded_texts, on_device
from st_clp.losses.passes import length_groups, pass_cost


class DistinctTexts(NamedTuple):
    """The distinct texts of several columns, as one column.

    Attributes:
        features: As the model is given them.
        known: What the host knows of them.
        places: ``(columns, batch)``, for each column and row the position of its text among them.
    """

    features: Features
    known: HostTexts | None
    places: Tensor


def distinct_texts(
    columns: Sequence[Features], known: Sequence[HostTexts | None], codes: Tensor
) -> DistinctTexts | None:
    """Make one column of the distinct texts of several columns. A GPU is waited for where the host does not know them.

    Args:
        columns: The features of each, as the model is given them.
        known: What the host knows of each column's texts.
        codes: ``(batch, columns)``, equal numbers for equal texts.

    Returns:
        The distinct texts. None if all texts differ, or if the columns are not padded and prepared alike.
    """
    there = _all_of(known)
    flat = codes.T.reshape(-1).cpu().numpy() if there is None else there.codes  # a column after the other
    different, first, places = np.unique(flat, return_index=True, return_inverse=True)
    if len(different) == len(flat):
        return None
    merged = merge_feature_batches(list(columns))  # a single column too: a loss may forbid new features altogether
    if merged is None or merged["input_ids"].ndim != 2 or "cu_seq_lens_q" in merged:
        return None
    device = merged["input_ids"].device
    rows = on_device(first, device)
    # Values that are not one row a text, such as the prompt's length, are the same for all.
    chosen = {
        name: value[rows] if isinstance(value, Tensor) and value.ndim > 1 else value for name, value in merged.items()
    }
    return DistinctTexts(
        chosen, None if there is None else there[first], on_device(places.reshape(len(columns), -1), device)
    )


def _all_of(known: Sequence[HostTexts | None]) -> HostTexts | None:
    """The texts of all columns, a column after the other, if the host knows them."""
    there = [texts for texts in known if texts is not None]
    if len(there) < len(known):
        return None
    return HostTexts(*(np.concatenate([getattr(texts, name) for texts in there]) for name in ("lengths", "codes")))


def embed_by_length(
    model: nn.Module, kinds: Sequence[Sequence[Features]], known: Sequence[Sequence[HostTexts | None]]
) -> list[Tensor]:
    """Embed the columns of a batch with a forward pass for each group of texts of similar length, to save padding.

    A batch is as wide as its longest text. Of a hundred queries of 25 tokens on average one has 60, and more than half
    of the work is then for padding. On the other hand, each pass costs time of its own: few short texts may well be
    embedded with longer ones. The embeddings are the same, but for dropout and rounding. Where the host does not know
    the lengths, and among several processes, which all need the same number of passes, each kind has one pass.

    Args:
        model: The model that is trained.
        kinds: Columns of queries, and columns of documents: the features of each, as the model is given them.
        known: What the host knows of each column's texts.

    Returns:
        ``(batch, dim)`` for each column of each kind.
    """
    there = [texts.lengths for texts in map(_all_of, known) if texts is not None]
    can_plan = len(there) == len(kinds) and one_process()
    merged = [merge_feature_batches(list(columns)) for columns in kinds] if can_plan else []
    ready = [features for features in merged if features is not None]
    if len(ready) < len(kinds):
        return [embedding for columns in kinds for embedding in embed_columns(model, columns, separate_first=False)]
    together = [slice(0, len(kinds))] if _alike(ready) else [slice(kind, kind + 1) for kind in range(len(kinds))]
    by_kind = [embeddings for these in together for embeddings in _embed(model, ready[these], there[these])]
    return [
        embedding
        for columns, embeddings in zip(kinds, by_kind, strict=True)
        for embedding in embeddings.reshape(len(columns), -1, *embeddings.shape[1:]).unbind(0)
    ]


def one_process() -> bool:
    """Whether this process trains by itself."""
    distributed = torch.distributed
    return not (distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1)


def _alike(kinds: Sequence[Features]) -> bool:
    """Whether texts of several kinds can share a pass: they have the same features, with a row for each text."""
    first = kinds[0]
    for features in kinds:
        if set(features) != set(first):
            return False
        for name, value in features.items():
            if isinstance(value, Tensor):
                like = first[name]
                texts = len(features["attention_mask"])
                fits = isinstance(like, Tensor) and value.ndim == like.ndim == 2 and value.dtype == like.dtype
                if not fits or len(value) != texts or value.is_floating_point():
                    return False
            elif value != first[name]:
                return False
    return True


def _embed(model: nn.Module, kinds: list[Features], lengths: list[np.ndarray]) -> list[Tensor]:
    """Embed texts of kinds that can share a pass; ``(texts, dim)`` for each kind."""
    every, device = np.concatenate(lengths), kinds[0]["input_ids"].device
    cost, sizes = pass_cost(device), [len(of_kind) for of_kind in lengths]
    ends = np.cumsum(sizes)
    groups, parts = length_groups(every, cost), []
    for rows in groups:
        width = cost.round_up(every[rows].max())
        of_kinds = np.split(rows, np.searchsorted(rows, ends[:-1]))  # texts of the first kind come first
        chosen = [
            _some(features, own - begin, width)
            for features, own, begin in zip(kinds, of_kinds, ends - sizes, strict=True)
            if len(own)
        ]
        parts.append(model(_joined(chosen))["sentence_embedding"])
    embeddings = parts[0]  # of all texts in their own order, if there is one group
    if len(groups) > 1:
        embeddings = torch.cat(parts)[on_device(np.argsort(np.concatenate(groups)), device)]
    return list(embeddings.split(sizes))


def _some(features: Features, rows: np.ndarray, width: int) -> Features:
    """The features of some of the texts, in ascending order, no wider than given."""
    mask = features["attention_mask"]
    every = len(rows) == len(mask)
    places = None if every else on_device(rows, mask.device)
    return {name: _cut(value, mask, places, width) for name, value in features.items()}


def _cut(value: Any, mask: Tensor, places: Tensor | None, width: int | None) -> Any:
    """The rows of a feature at these places, or all, if it has a row for each text, cut to a width."""
    if not isinstance(value, Tensor) or not value.ndim or len(value) != len(mask):
        return value
    value = value if places is None else value[places]
    return value[:, :width] if value.ndim > 1 and value.shape[1] == mask.shape[1] else value


def _joined(parts: Sequence[Features]) -> Features:
    """The texts of several kinds after each other, padded to one width."""
    if len(parts) == 1:
        return parts[0]
    width = max(part["attention_mask"].shape[1] for part in parts)
    return {
        name: torch.cat([F.pad(part[name], (0, width - part[name].shape[1])) for part in parts])
        if isinstance(value, Tensor)
        else value
        for name, value in parts[0].items()
    }


def shortest_first(features: Features) -> tuple[Features, Tensor | None]:
    """Sort a column's texts by length, for mini-batches with little padding.

    Nothing waits for a GPU here.

    Args:
        features: The column, as the model is given it.

    Returns:
        The sorted features and the position of each text among them; the column itself and None if it does not consist
        of padded texts only.
    """
    if not of_padded_texts(features):
        return features, None
    mask = features["attention_mask"]
    order = (mask != 0).sum(dim=1).argsort(stable=True)
    return {name: _cut(value, mask, order, None) for name, value in features.items()}, order.argsort()


def tokens_to_embed(kinds: Sequence[np.ndarray], device: torch.device) -> int:
    """How many tokens, padding included, :func:`embed_by_length` feeds to a model that can take all kinds in a pass.

    Args:
        kinds: The lengths of the texts of each kind.
        device: The model's.
    """
    if not one_process():
        return sum(len(lengths) * int(lengths.max()) for lengths in kinds)
    every, cost = np.concatenate(kinds), pass_cost(device)
    return sum(len(rows) * cost.round_up(every[rows].max()) for rows in length_groups(every, cost))
