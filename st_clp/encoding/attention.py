"""How an encoder of one's own attends: by another function, and told whether a batch has padding rather than looking.

transformers looks at the mask on the device, for which the host has to wait until the device has done everything before
it; whoever has put the batch together knows. Without padding there is no mask at all, and attention runs in its fastest
kernel; with padding the mask is a row of keys for each text and not a square.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import bidirectional_mask_function, sdpa_mask

NAME = "st_clp_known_padding"
REPLACED = "sdpa"  # the implementation whose place another one can take
_state = threading.local()


@contextmanager
def known_padding(padded: bool) -> Iterator[None]:
    """Say for a while whether this thread's batches have any padding."""
    before = getattr(_state, "padded", True)
    _state.padded = padded
    try:
        yield
    finally:
        _state.padded = before


def attend_by(
    model: PreTrainedModel, name: str, attend: Callable[..., Any], make_mask: Callable[..., Tensor | None]
) -> bool:
    """Let a model that attends by PyTorch's own function attend by another one; whether it does.

    Args:
        model: A transformers model of one's own.
        name: What to call it in transformers' registry.
        attend: The attention, as transformers calls it.
        make_mask: What makes the mask for it.
    """
    if getattr(model.config, "_attn_implementation", None) != REPLACED:
        return False
    AttentionInterface.register(name, attend)
    AttentionMaskInterface.register(name, make_mask)
    try:
        model.set_attn_implementation(name)
    except (ValueError, AttributeError):
        return False
    return model.config._attn_implementation == name


def use_known_padding(model: PreTrainedModel) -> bool:
    """Let a model that attends by PyTorch's own function go by :func:`known_padding`; whether it does."""
    return attend_by(model, NAME, sdpa_attention_forward, make_mask)


def make_mask(*args: Any, **kwargs: Any) -> Tensor | None:
    """The mask as transformers asks for it: boolean, True where to attend; None where everything may be attended to."""
    padding, function = kwargs.get("attention_mask"), kwargs.get("mask_function")
    if function is bidirectional_mask_function and padding is not None and padding.ndim == 2:
        return padding.bool()[:, None, None, :] if getattr(_state, "padded", True) else None
    return sdpa_mask(*args, **kwargs)
