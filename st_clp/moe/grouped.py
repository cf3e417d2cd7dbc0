"""What a mixture's layers do with gradients: rows sorted by expert, multiplied by their expert's weight, and put back.

Three autograd functions; no routing and no modules here. The products themselves are in ``products.py``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from st_clp.moe.products import products, slices


class GatherRows(Function):
    """Rows in token order -> rows sorted by expert; ``source`` (rows,) names each sorted row's token."""

    @staticmethod
    def forward(ctx: Any, tokens: Tensor, source: Tensor, back: Tensor | None, slots: int) -> Tensor:
        ctx.save_for_backward(source, back)
        ctx.shape = tokens.shape
        ctx.slots = slots
        return tokens.index_select(0, source)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None]:
        source, back = ctx.saved_tensors
        if back is None:
            return gradient.new_zeros(ctx.shape).index_add_(0, source, gradient), None, None, None
        gradient = gradient.index_select(0, back)
        if ctx.slots > 1:
            gradient = gradient.view(-1, ctx.slots, gradient.shape[-1]).sum(1)
        return gradient, None, None, None


class ScatterRows(Function):
    """Sorted rows -> one row a slot (token times experts per token) in token order; unrouted slots are zero."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, order: Tensor, back: Tensor | None, slots: int) -> Tensor:
        ctx.save_for_backward(order)
        if back is not None:
            return rows.index_select(0, back)
        return rows.new_zeros(slots, rows.shape[1]).index_copy_(0, order, rows)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None]:
        (order,) = ctx.saved_tensors
        return gradient.index_select(0, order), None, None, None


class GroupedLinear(Function):
    """``rows[s:t] @ weight[e].T + bias[e]`` for each expert e and its slice s:t of the sorted rows.

    ``shares`` (rows, experts) is the router's distribution over the experts at each row. It leaves the result as it
    is and receives the gradient that it would have if the layer computed ``sum_e m_e E_e(x)`` with ``m`` one at the
    chosen expert and zero elsewhere, in value, and ``shares`` in the backward pass (a straight-through estimate).
    """

    @staticmethod
    def forward(
        ctx: Any, rows: Tensor, shares: Tensor | None, counts: Sequence[int], signal: Any, *parameters: Tensor | None
    ) -> Tensor:
        experts = len(counts)
        weights, biases = parameters[:experts], parameters[experts:]
        ctx.counts, ctx.signal = counts, signal
        result = products(rows, counts, [cast(Tensor, weight).t() for weight in weights], biases)
        # The router's signal is an inner product of either what came in or what went out; the narrower is less to read.
        ctx.keeps_result = signal is not None and shares is not None and result.shape[1] < rows.shape[1]
        ctx.save_for_backward(rows, result if ctx.keeps_result else None, *parameters)
        return result

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Any, ...]:
        rows, result, *parameters = ctx.saved_tensors
        experts = len(ctx.counts)
        weights, biases = parameters[:experts], parameters[experts:]
        needs_rows, needs_shares, *_ = ctx.needs_input_grad
        gradient = gradient.contiguous()
        signal = ctx.signal if needs_shares else None
        rows_gradient = None
        if needs_rows or (signal is not None and result is None):
            rows_gradient = products(gradient, ctx.counts, weights)
        weight_gradients: list[Tensor | None] = []
        bias_gradients: list[Tensor | None] = []
        for expert, part in enumerate(slices(ctx.counts)):
            needs_weight, needs_bias = ctx.needs_input_grad[4 + expert], ctx.needs_input_grad[4 + experts + expert]
            # an expert without tokens gets a gradient of zeros, not none: distributed training waits for every one
            weight_gradients.append(gradient[part].t() @ rows[part] if needs_weight else None)
            bias_gradients.append(gradient[part].sum(0) if needs_bias else None)
        shares_gradient = None
        if needs_shares:
            shares_gradient = gradient.new_zeros(rows.shape[0], experts, dtype=torch.float32)
            if signal is not None:
                signal(shares_gradient, gradient, rows, rows_gradient, result, slices(ctx.counts), weights, biases)
        return (
            rows_gradient if needs_rows else None,
            shares_gradient,
            None,
            None,
            *weight_gradients,
            *bias_gradients,
        )
