"""Faster bfloat16 layers on a CPU: packed weights, and attention by batched matrix products.

Attention is two batched matrix products and powers of two between them. PyTorch's fused kernel, with AVX512-BF16, runs
its products far below the rate of the hardware; as batched products the same attention takes from half to two thirds of
the time. Computing a few heads at a time keeps the score matrix small, as the fused kernel does. With AMX the fused
kernel has its own code path, which is left alone.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import bidirectional_mask_function, sdpa_mask

from st_clp.encoding.attention import attend_by

logger = logging.getLogger(__name__)

ROWS = 2048
"""The number of rows that the arrangement is chosen for; any number can be multiplied."""


class PackedLinear(nn.Linear):
    """A linear layer for inference that multiplies by a packed copy of its weight.

    The plain weight stays, for encoders that look at it or multiply by it themselves.
    """

    packed: Tensor

    def forward(self, input: Tensor) -> Tensor:
        return torch.ops.mkldnn._linear_pointwise(input, self.packed, self.bias, "none", [], "")


def pack_linear_layers(encoder: nn.Module) -> int:
    """Pack the linear layers of an encoder for inference on a CPU; return how many. The encoder is changed.

    Only plain ``nn.Linear`` layers are packed, and none inside a module that sets ``multiplies_by_weights``, which
    would not call them. Where PyTorch lacks the operation, the encoder stays as it is.
    """
    layers = list(dict.fromkeys(_linear_layers(encoder)))  # an encoder may use one layer in several places
    if not torch.backends.mkldnn.is_available() or not torch.backends.mkldnn.enabled:
        return 0
    try:
        packed = [torch.ops.mkldnn._reorder_linear_weight(layer.weight.detach(), ROWS) for layer in layers]
    except (AttributeError, RuntimeError) as error:  # not in this build, or not for this processor
        logger.debug("linear layers stay as they are (%s)", error)
        return 0
    for layer, weight in zip(layers, packed, strict=True):
        layer.__class__ = PackedLinear
        layer.packed = weight
    return len(layers)


def _linear_layers(module: nn.Module) -> Iterator[nn.Linear]:
    if type(module) is nn.Linear:
        yield module
    elif not getattr(module, "multiplies_by_weights", False):
        for child in module.children():
            yield from _linear_layers(child)


NAME = "st_clp_batched_products"
LOG2_E = math.log2(math.e)
SAFE = 2.0**-100, 2.0**120  # sums of a row's powers, of which bfloat16 knows 2^-126 to 2^127
SCORES = 1 << 22  # of the score matrix that are computed together: 8 MiB, with heads for many threads in short texts


def use_batched_products(model: PreTrainedModel) -> bool:
    """Let a model use batched products for attention, if its attention can be replaced; returns whether it does."""
    return attend_by(model, NAME, attend, make_mask)


def make_mask(*args: Any, **kwargs: Any) -> Tensor | None:
    """The mask for transformers: boolean, True where to attend; None to attend everywhere."""
    padding, function = kwargs.get("attention_mask"), kwargs.get("mask_function")
    if function is bidirectional_mask_function and padding is not None and padding.ndim == 2:
        padding = padding.bool()
        # The padded keys are the same for every query, so one row is enough.
        if bool(padding.all()):
            return None
        return padding[:, None, None, :]
    return sdpa_mask(*args, **{**kwargs, "allow_is_causal_skip": False})


def attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """Attention with the signature that transformers expects.

    Args:
        module: The attention layer.
        query: (batch, heads, queries, width).
        key: (batch, heads, keys, width).
        value: (batch, heads, keys, width).
        attention_mask: Boolean, broadcast over (batch, heads, queries, keys), True where to attend; None: everywhere.
        dropout: The share of scores to drop.
        scaling: What the products are multiplied by. None: 1 / √width.
        **kwargs: What other implementations take.

    Returns:
        (batch, queries, heads, width), and None in place of the scores.
    """
    plain = not dropout and key.shape == value.shape and query.shape[:2] == key.shape[:2]
    causal = kwargs.get("is_causal") or (attention_mask is None and getattr(module, "is_causal", False))
    special = kwargs.get("position_bias") is not None or kwargs.get("softcap") is not None
    if not plain or causal or special or (attention_mask is not None and attention_mask.dtype != torch.bool):
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
        )
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    return attend_in_parts(query, key, value, attention_mask, scaling), None


def attend_in_parts(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scaling: float) -> Tensor:
    """Compute some heads at a time, of one text or several, so that long texts do not need memory for all scores."""
    batch, heads, queries, width = query.shape
    keys = key.shape[2]
    found = query.new_empty(batch * heads, queries, width)
    query, key, value = (states.reshape(batch * heads, -1, width) for states in (query, key, value))
    bias = None if mask is None else _bias(mask, query.dtype).expand(batch, heads, -1, keys)
    together = max(1, SCORES // (queries * keys))
    for begin in range(0, batch * heads, together):
        part = torch.arange(begin, min(begin + together, batch * heads))
        rows = slice(begin, begin + len(part))
        added = None if bias is None else bias[part // heads, part % heads]
        if not _by_powers(added, query[rows], key[rows], value[rows], scaling, found[rows]):
            scores = _scores(added, query[rows], key[rows], scaling)
            torch.bmm(torch.softmax(scores, dim=-1), value[rows], out=found[rows])
    return found.view(batch, heads, queries, width).transpose(1, 2).contiguous()


def _scores(bias: Tensor | None, query: Tensor, key: Tensor, scaling: float) -> Tensor:
    """The scaled products of some heads' queries and keys, (heads, queries, keys), and the bias, if there is one."""
    added = query.new_empty(1, 1, 1) if bias is None else bias  # without a bias it is not read
    return torch.baddbmm(added, query, key.transpose(1, 2), beta=0 if bias is None else 1, alpha=scaling)


def _by_powers(bias: Tensor | None, query: Tensor, key: Tensor, value: Tensor, scaling: float, into: Tensor) -> bool:
    """Attention without subtracting the maximum, and by powers of two; returns whether the numbers allowed it.

    PyTorch's softmax of bfloat16 takes as long as both products; powers, row sums and a division after the second
    product take half of that. Where a row's powers are too large or too small for bfloat16, softmax is needed.
    """
    powers = _scores(bias, query, key, scaling * LOG2_E).exp2_()
    sums = powers.sum(dim=-1, keepdim=True)
    least, greatest = sums.aminmax()
    if not (SAFE[0] < least and greatest < SAFE[1]):
        return False
    torch.bmm(powers, value, out=into)
    into /= sums
    return bool(into.sum().isfinite())  # great powers of great values may have been too much for a product


def _bias(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """What is added to the scores, of the mask's shape: 0, or the lowest number where masked."""
    return torch.zeros(mask.shape, dtype=dtype).masked_fill_(~mask, torch.finfo(dtype).min)
