"""The experts' matrix products, one for each expert, where the host knows how many rows each expert has.

Rows are sorted by expert, multiplied by their expert's weight, and put back, by three autograd functions. This is how a
processor computes them, on which PyTorch's grouped product is a slower loop. Accelerators and compiled graphs use
:mod:`st_clp.moe.grouped`, and come back to these products for numbers that the grouped one does not take.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any, cast

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable


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


PIECE = 1024
"""Rows of a piece, at most (in float32, where shorter products are slower, about)."""
MULTIPLE = 8
"""What the rows of a product are filled up to a multiple of, where that pays."""


def slices(counts: Sequence[int]) -> list[slice]:
    """Return each expert's slice of the sorted rows."""
    result, start = [], 0
    for count in counts:
        result.append(slice(start, start + count))
        start += count
    return result


def products(
    rows: Tensor, counts: Sequence[int], matrices: Sequence[Tensor], biases: Sequence[Tensor | None] | None = None
) -> Tensor:
    """Multiply each expert's slice of the sorted ``rows`` (rows, in) by its matrix (in, out): (rows, out)."""
    total, (_, out) = rows.shape[0], matrices[0].shape
    result = rows.new_empty(total, out)
    for expert, part in enumerate(slices(counts)):
        bias = None if biases is None else biases[expert]
        for piece in _pieces(rows, part):
            taken, kept = _filled_up(rows, piece, total), None
            if taken.start < piece.start:  # nothing follows: rows that are done already are taken along instead
                kept = result[taken.start : piece.start].clone()
            _multiply(rows[taken], matrices[expert], bias, result[taken])
            if kept is not None:
                result[taken.start : piece.start] = kept
    return result


def gathered_products(
    tokens: Tensor,
    source: Tensor,
    counts: Sequence[int],
    matrices: Sequence[Tensor],
    biases: Sequence[Tensor | None],
) -> Tensor:
    """As :func:`products` of the rows that ``source`` (rows,) names, without a sorted copy of the tokens.

    The rows of one piece after the other go through the same memory, which wide rows need not wait for again. Elsewhere
    than on a processor new memory costs nothing and few large products are best: there a copy is made after all.
    """
    if tokens.device.type != "cpu":
        return products(tokens.index_select(0, source), counts, matrices, biases)
    total = source.shape[0]
    spare = total + MULTIPLE  # room for what the last product takes along
    result = tokens.new_empty(spare, matrices[0].shape[1])
    parts = [(expert, piece) for expert, part in enumerate(slices(counts)) for piece in _pieces(tokens, part)]
    longest = max((piece.stop - piece.start for _, piece in parts), default=0)
    room = tokens.new_zeros(longest + MULTIPLE, tokens.shape[1])
    for expert, piece in parts:
        taken = _filled_up(tokens, piece, spare)
        rows = room[: taken.stop - taken.start]
        torch.index_select(tokens, 0, source[piece], out=rows[: piece.stop - piece.start])
        _multiply(rows, matrices[expert], biases[expert], result[taken])
    return result[:total]


def _pieces(rows: Tensor, part: slice) -> Iterator[slice]:
    """Cut a part into even pieces; a short last one would read all the weights for few rows."""
    count = part.stop - part.start
    if rows.device.type != "cpu":
        size = count
    elif _fills_up(rows):
        size = _multiple(math.ceil(count / math.ceil(count / PIECE))) if count else 0
    else:
        size = math.ceil(count / max(1, round(count / PIECE)))
    for start in range(part.start, part.stop, max(1, size)):
        yield slice(start, min(start + size, part.stop))


def _filled_up(rows: Tensor, piece: slice, total: int) -> slice:
    """The piece with neighbouring rows, so that there is a multiple of them; as it is where that does not pay."""
    if not _fills_up(rows):
        return piece
    stop = piece.start + _multiple(piece.stop - piece.start)
    if stop <= total:
        return slice(piece.start, stop)
    return slice(max(0, piece.stop - (stop - piece.start)), piece.stop)


def _fills_up(rows: Tensor) -> bool:
    return rows.device.type == "cpu" and rows.dtype in (torch.bfloat16, torch.float16)


def _multiple(count: int) -> int:
    return -(-count // MULTIPLE) * MULTIPLE


def _multiply(rows: Tensor, matrix: Tensor, bias: Tensor | None, into: Tensor) -> None:
    if bias is None:
        torch.mm(rows, matrix, out=into)
    else:
        torch.addmm(bias, rows, matrix, out=into)
