"""The context of a forward pass for the routers: which tokens are padding, and whether to count.

The layers between a pipeline's module and its projections pass on hidden states alone, so the mask travels beside
them. Gradient checkpointing runs a layer again in the backward pass, when other texts may have gone through the
model since; its checkpoint function therefore takes the forward pass's own context along.
"""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from st_clp.moe.router_signal import drawn


def places_of(chosen: Tensor, stride: int) -> Tensor:
    """The positions where ``chosen`` (rows,) bool is true, ascending, in a tensor whose size does not depend on them.

    One row in ``stride`` is expected to be chosen. There is room for that number, e, and for e/16 + 145 more, which is
    more than six standard deviations of independent draws (6 √e). Unused places are -1; more positions are left out.
    """
    rows = chosen.shape[0]
    expected = -(-rows // stride)
    room = min(rows, expected + expected // 16 + 145)
    place = chosen.cumsum(0) - 1
    place = torch.where(chosen & (place < room), place, room)  # the last one is for what has no place
    places = torch.full((room + 1,), -1, dtype=torch.int64, device=chosen.device)
    return places.scatter_(0, place, torch.arange(rows, device=chosen.device))[:room]


def stays_on_device(tokens: Tensor) -> bool:
    """Whether routing leaves its counts on the device: always, except in eager mode on a CPU."""
    return tokens.device.type != "cpu" or torch.compiler.is_compiling()


class ForwardContext:
    """One forward pass of a MoETransformer.

    Args:
        mask: (batch, length), true at tokens and false at padding; None where every position is a token.
        counts: Whether the pass counts as use. Of a cached loss's two passes only the one with gradients does.
        marks: Returns numbers that identify the tokens, (batch * length,); None uses their positions in the batch.
    """

    def __init__(self, mask: Tensor | None, counts: bool, marks: Callable[[], Tensor | None] | None = None) -> None:
        self.counts = counts
        self._marks = marks
        self._tried: Tensor | None = None
        self._places: tuple[Tensor, Tensor] | None = None
        self._kept: Tensor | None = None
        self.mask: Tensor | None = None
        if mask is not None:
            flat = mask.reshape(-1) != 0
            if stays_on_device(flat) or not bool(flat.all()):
                self.mask = flat

    def mask_for(self, positions: int) -> Tensor | None:
        """Return the flat mask (positions,) for hidden states at ``positions``; None where all of them are tokens.

        The mask does not fit an encoder that drops or adds positions: there every position is a token.
        """
        return None if self.mask is None or positions != self.mask.numel() else self.mask

    def kept_for(self, positions: int) -> Tensor | None:
        """Return :meth:`mask_for` as numbers, (positions, 1) float32; every layer has the same tensor."""
        if self.mask_for(positions) is None:
            return None
        if self._kept is None:
            assert self.mask is not None
            self._kept = self.mask.float().unsqueeze(1)
        return self._kept

    def tried_tokens(self, weight: Tensor, positions: int, stride: int) -> Tensor:
        """Return which tokens have their other experts tried, (positions,) bool: the same ones in every layer.

        The first router that asks decides for the whole pass, with its ``weight``.
        """
        if self._tried is None or self._tried.numel() != positions:
            marks = None if self._marks is None else self._marks()
            if marks is None or marks.numel() != positions:  # as where an encoder drops or adds positions
                marks = torch.arange(positions, device=weight.device)
            self._tried, self._places = drawn(marks, weight, stride), None
        return self._tried

    def tried_places(self, weight: Tensor, positions: int, stride: int) -> tuple[Tensor, Tensor]:
        """Return the places of :meth:`tried_tokens`, so many whatever is drawn, and how many fold each counts.

        Unused places are at position 0 and count nothing.
        """
        tried = self.tried_tokens(weight, positions, stride)
        if self._places is None:
            places = places_of(tried, stride)
            self._places = places.clamp(min=0), (places >= 0).float() * stride
        return self._places

    def again(self) -> ForwardContext:
        """This pass for a layer that is run again, without counting tokens twice."""
        other = copy.copy(self)
        other.counts = False
        return other


_state = threading.local()


@contextmanager
def entered(context: ForwardContext | None) -> Iterator[None]:
    """Make ``context`` this thread's forward pass within the context."""
    outer = current_context()
    _state.context = context
    try:
        yield
    finally:
        _state.context = outer


def current_context() -> ForwardContext | None:
    """Return the forward pass that this thread is in; None outside a MoETransformer."""
    return getattr(_state, "context", None)


class _Recalling:
    """A layer's checkpoint function that runs the layer in its forward pass's context, however late it is run."""

    def __init__(self, checkpoint: Callable[..., Any]) -> None:
        self.checkpoint = checkpoint

    def __call__(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        context = current_context()
        if context is None:
            return self.checkpoint(function, *args, **kwargs)

        runs = [context]  # then those without counting

        def in_context(*inner_args: Any, **inner_kwargs: Any) -> Any:
            with entered(runs.pop() if runs else context.again()):
                return function(*inner_args, **inner_kwargs)

        # a reentrant checkpoint gives no gradient to what is inside it unless one of its inputs has one, and below
        # the first trainable layer none has
        reentrant = getattr(self.checkpoint, "keywords", {}).get("use_reentrant", False)
        if reentrant and args and isinstance(args[0], Tensor) and torch.is_grad_enabled():
            hidden = args[0] if args[0].requires_grad else args[0].detach().requires_grad_()
            args = (hidden, *args[1:])
        return self.checkpoint(in_context, *args, **kwargs)


def recall_context_in_checkpoints(layers: list[nn.Module]) -> None:
    """Make checkpointed ``layers`` take the context along; to be repeated when checkpointing is switched on again."""
    for layer in layers:
        checkpoint = getattr(layer, "_gradient_checkpointing_func", None)
        if getattr(layer, "gradient_checkpointing", False) and not isinstance(checkpoint, _Recalling):
            layer._gradient_checkpointing_func = _Recalling(checkpoint)  # type: ignore[arg-type, assignment]


def attention_mask(features: dict[str, Any]) -> Tensor | None:
    """Return which positions of ``features`` are tokens, (batch, length); None where all are (flattened inputs).

    Positions added by query expansion are scored, so they count as tokens even if attention skips them.
    """
    mask = features.get("attention_mask")
    if not isinstance(mask, Tensor) or mask.ndim != 2:
        return None
    expansion = features.get("query_expansion_positions")
    if isinstance(expansion, Tensor):
        mask = torch.logical_or(mask != 0, expansion != 0)
    return mask
