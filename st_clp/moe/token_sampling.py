"""Which tokens have their other experts tried (``router_signal.py``): one in n, by what the token is.

A token's lot depends on its text, its place in the text and the router's weights, so on nothing that differs between
one way of computing a step and another: the division into mini-batches, padding, the order of the rows, a layer that
gradient checkpointing runs again. A cached loss therefore has the gradients of the plain one, and a resumed training
those of one that was not stopped. The weights change with each step, and with them the lots.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def token_marks(features: dict[str, Any], mask: Tensor | None) -> Tensor | None:
    """A number for each token of a batch, the same wherever the same text is embedded.

    Args:
        features: What the tokenizer gave: ``input_ids`` (batch, length), or (1, tokens) of texts one after the other
            with ``position_ids`` that begin anew with each.
        mask: (batch, length), true at tokens and false at padding; None where every position is a token.

    Returns:
        (batch * length,) int64, or None where there are no token ids.
    """
    ids = features.get("input_ids")
    if not isinstance(ids, Tensor) or ids.ndim != 2 or (mask is not None and mask.shape != ids.shape):
        return None
    positions = features.get("position_ids")
    if mask is None and isinstance(positions, Tensor) and positions.shape == ids.shape and ids.shape[0] == 1:
        places = positions
        texts = (positions == positions[:, :1]).cumsum(1).reshape(-1) - 1
    else:
        kept = torch.ones_like(ids) if mask is None else (mask != 0).to(ids.dtype)
        places = kept.cumsum(1) * kept  # 0 at padding, and counted from the first token whatever side is padded
        texts = torch.arange(ids.shape[0], device=ids.device).repeat_interleave(ids.shape[1])
    places = places.reshape(-1).long()
    tokens = _mixed(ids.reshape(-1).long() * 0x10001 + places * 0x3C6EF372)
    if mask is not None:
        tokens = tokens.masked_fill(places == 0, 0)
    whole = torch.zeros(ids.numel(), dtype=torch.int64, device=ids.device).index_add_(0, texts, tokens)
    return _mixed(whole.index_select(0, texts) + places * 0x3C6EF372)


def drawn(marks: Tensor, weight: Tensor, stride: int) -> Tensor:
    """Draw one token in ``stride``.

    Args:
        marks: (tokens,) int64, what tells the tokens apart.
        weight: The router's weights; other weights, other lots.
        stride: Of how many tokens one is drawn; 1 draws all.

    Returns:
        (tokens,) bool.
    """
    width = {4: torch.int32, 2: torch.int16}.get(weight.element_size(), torch.int64)
    seed = weight.detach().contiguous().view(width).long().sum()
    return torch.remainder(_mixed(marks + _mixed(seed)), stride) == 0


def _mixed(values: Tensor) -> Tensor:
    """Spread int64 values over all 64 bits, after the finalizer of splitmix64 (Steele et al. 2014)."""
    values = (values ^ (values >> 30)) * -0x40A7B892E31B1A47
    values = (values ^ (values >> 27)) * -0x6B2FB644ECCEEE15
    return values ^ (values >> 31)
