"""Change the attention of our copy of an encoder: another function, and a flag that tells whether a batch has padding.

transformers inspects the mask on the device, so the host has to wait for all work queued before it; the code that built
the batch knows the answer. Without padding there is no mask, so attention runs in its fastest kernel; with padding the
mask has one row of keys for each text instead of a square.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import bidirectional_mask_function, sdpa_mask

NAME = "st_clp_known_padding"
REPLACED = "sdpa"  # the implementation whose place another one can take
_state = threading.local()


@contextmanager
def known_padding(padded: bool) -> Iterator[None]:
    """Declare whether this thread's batches have padding, within the context."""
    before = getattr(_state, "padded", True)
    _state.padded = padded
    try:
        yield
    finally:
        _state.padded = before


def attend_by(
    model: PreTrainedModel, name: str, attend: Callable[..., Any], make_mask: Callable[..., Tensor | None]
) -> bool:
    """Replace the attention function of a model that uses PyTorch's own; returns whether it was replaced.

    Args:
        model: A transformers model; it is changed.
        name: The name in transformers' registry.
        attend: The attention function, with the signature that transformers expects.
        make_mask: Makes the mask for it.
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
    """Let a model that uses PyTorch's attention go by :func:`known_padding`; returns whether it does."""
    return attend_by(model, NAME, sdpa_attention_forward, make_mask)


@contextmanager
def masks_unread(model: nn.Module) -> Iterator[None]:
    """Let the encoders within a model make their masks without looking at them, so that the host does not wait.

    Every batch counts as padded unless :func:`known_padding` says otherwise. Encoders whose attention is not PyTorch's
    own stay as they are.
    """
    encoders = [module for module in model.modules() if isinstance(module, PreTrainedModel)]
    changed = [encoder for encoder in encoders if use_known_padding(encoder)]
    try:
        yield
    finally:
        for encoder in changed:
            encoder.set_attn_implementation(REPLACED)


def make_mask(*args: Any, **kwargs: Any) -> Tensor | None:
    """The mask for transformers: boolean, True where to attend; None to attend everywhere."""
    padding, function = kwargs.get("attention_mask"), kwargs.get("mask_function")
    if function is bidirectional_mask_function and padding is not None and padding.ndim == 2:
        return padding.bool()[:, None, None, :] if getattr(_state, "padded", True) else None
    return sdpa_mask(*args, **kwargs)


# Here too, not only when a model is changed: a changed model may come from another process.
AttentionInterface.register(NAME, sdpa_attention_forward)
AttentionMaskInterface.register(NAME, make_mask)
