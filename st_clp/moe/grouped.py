"""The experts' matrix products as one grouped product, with nothing that the host would have to wait for.

How many tokens each expert gets stands in a tensor on the device, and every other shape follows from the number of
positions alone. So a forward pass is queued without a look at its results, and can be captured in a graph or compiled
without a break. Padding is routed like tokens, since leaving it out would make shapes depend on the texts; nothing
reads what comes of it, and it counts as no expert's use.

A grouped product takes no bias for each group. Where the rows are copied anyway, as they are sorted, each gets one more
column that holds a 1, and the weights one that holds the bias: the bias, its gradient and its part of the router's
signal then come of the same products. That makes a product of 1,024 columns 0.8 % longer (a few more where the kernel
rounds up to its tiles); adding biases afterwards would read and write all the wide rows once more.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from st_clp.moe.precise import inner_products
from st_clp.moe.products import products, slices
from st_clp.moe.router_signal import TIE_BREAK

GROUPED_DEVICES = ("cuda", "cpu")
"""Where PyTorch has a grouped product."""
ALIGNMENT = 16
"""Bytes of which every row of a grouped product's matrices must be a multiple."""


def grouped_product(rows: Tensor, matrices: Tensor, ends: Tensor) -> Tensor:
    """Multiply each expert's part of the sorted ``rows`` (rows, in) by its matrix: (rows, out).

    Args:
        rows: Sorted by expert.
        matrices: (experts, in, out).
        ends: (experts,) int32, where each expert's rows end.
    """
    if _is_grouped(rows, *matrices.shape[1:]):
        return torch.nn.functional.grouped_mm(rows, matrices, offs=ends)
    return (product_op if torch.compiler.is_compiling() else _product_each)(rows, matrices, ends)


def grouped_outer_product(left: Tensor, right: Tensor, ends: Tensor) -> Tensor:
    """Multiply each expert's part of ``left`` (rows, out), transposed, by that of ``right`` (rows, in)."""
    if _is_grouped(left, left.shape[1], right.shape[1]):
        found = torch.nn.functional.grouped_mm(left.t(), right, offs=ends)
        empty = ends == torch.nn.functional.pad(ends, (1, -1))  # where the one before ends
        return found.masked_fill(empty.view(-1, 1, 1), 0)  # what a kernel leaves there is not said anywhere
    return (outer_product_op if torch.compiler.is_compiling() else _outer_product_each)(left, right, ends)


def _is_grouped(rows: Tensor, *sides: int) -> bool:
    """Whether PyTorch has a grouped product for these numbers; otherwise the host has to wait, and then loop."""
    aligned = all(side * rows.dtype.itemsize % ALIGNMENT == 0 for side in sides)
    return rows.dtype == torch.bfloat16 and rows.device.type in GROUPED_DEVICES and aligned


def _product_each(rows: Tensor, matrices: Tensor, ends: Tensor) -> Tensor:
    return products(rows, _counts(ends), list(matrices.unbind()))


def _outer_product_each(left: Tensor, right: Tensor, ends: Tensor) -> Tensor:
    return torch.stack([left[part].t() @ right[part] for part in slices(_counts(ends))])


def _counts(ends: Tensor) -> list[int]:
    return torch.diff(ends, prepend=ends.new_zeros(1)).tolist()


# The same as operations of a compiled graph, which has no shapes for the products in them.
product_op = torch.library.custom_op("st_clp::product_each", _product_each, mutates_args=())
product_op.register_fake(lambda rows, matrices, ends: rows.new_empty(rows.shape[0], matrices.shape[2]))
outer_product_op = torch.library.custom_op("st_clp::outer_product_each", _outer_product_each, mutates_args=())
outer_product_op.register_fake(lambda left, right, ends: left.new_empty(len(ends), left.shape[1], right.shape[1]))


class StackedLinear(Function):
    """``tokens[source[r]] @ weight[e].T + bias[e]`` for each row r of expert e: GroupedLinear, but on the device.

    Args of ``apply``:
        tokens: (tokens, in) in token order; or (rows, in) sorted by expert, where ``source`` is None.
        shares: (rows, experts) float32 or None, as for :class:`st_clp.moe.products.GroupedLinear`.
        source: (rows,) each sorted row's token, or None.
        back: (tokens * slots,) the sorted row of each slot, or None where ``source`` is.
        slots: Experts a token.
        ends: (experts,) int32, where each expert's rows end.
        owner: (rows,) int64, each sorted row's expert.
        stride: Of how many tokens one has its other experts tried; None where the router learns nothing.
        tried: (rows that may be tried,) int64 of sorted rows; None where none is.
        tried_weights: (rows that may be tried,) float32, how many fold each counts.
        parameters: Each expert's weight (out, in), then each one's bias (out,) or None.
    """

    @staticmethod
    def forward(
        ctx: Any,
        tokens: Tensor,
        shares: Tensor | None,
        source: Tensor | None,
        back: Tensor | None,
        slots: int,
        ends: Tensor,
        owner: Tensor,
        stride: int | None,
        tried: Tensor | None,
        tried_weights: Tensor | None,
        *parameters: Tensor | None,
    ) -> Tensor:
        experts = len(parameters) // 2
        weights, biases = parameters[:experts], parameters[experts:]
        with_column = source is not None and biases[0] is not None
        stack = _stack(weights, biases if with_column else None, tokens.dtype)
        rows = tokens if source is None else _sorted_rows(tokens, source, stack.shape[2])
        result = grouped_product(rows, stack.transpose(1, 2), ends)
        bias = None
        if biases[0] is not None and not with_column:
            bias = torch.stack([each for each in biases if each is not None]).to(result.dtype)
            result = result + bias.index_select(0, owner.long())
        learns = stride is not None and shares is not None
        # the signal is an inner product of either what came in or what went out; the narrower is less to read
        keeps_result = learns and result.shape[1] < rows.shape[1]
        ctx.save_for_backward(
            rows, stack, bias, result if keeps_result else None, back, ends, owner, tried, tried_weights
        )
        ctx.width, ctx.slots, ctx.experts, ctx.with_column = tokens.shape[1], slots, experts, with_column
        ctx.stride = stride if learns else None
        ctx.dtypes = [None if each is None else each.dtype for each in parameters]
        return result

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Any, ...]:
        rows, stack, bias, result, back, ends, owner, tried, tried_weights = ctx.saved_tensors
        needs_tokens, needs_shares = ctx.needs_input_grad[:2]
        needed = ctx.needs_input_grad[10:]
        gradient = gradient.contiguous()
        learns = needs_shares and ctx.stride is not None
        rows_gradient = None
        if needs_tokens or (learns and result is None):
            rows_gradient = grouped_product(gradient, stack, ends)
        parameter_gradients: list[Tensor | None] = [None] * len(needed)
        if any(needed):
            parameter_gradients = _parameter_gradients(ctx, gradient, rows, ends, owner)
        shares_gradient = None
        if needs_shares:
            shares_gradient = gradient.new_zeros(rows.shape[0], ctx.experts, dtype=torch.float32)
        if learns:
            signal = _Signal(gradient, rows, rows_gradient, result, stack, bias, owner)
            shares_gradient = signal.of_chosen(TIE_BREAK if ctx.stride else 1.0, tried, tried_weights)
            if tried is not None and ctx.experts > 1:
                signal.add_others(shares_gradient, tried, tried_weights)
        tokens_gradient = None
        if needs_tokens:
            assert rows_gradient is not None
            tokens_gradient = _to_tokens(rows_gradient[:, : ctx.width], back, ctx.slots)
        return (tokens_gradient, shares_gradient, *[None] * 8, *parameter_gradients)


def _stack(weights: Sequence[Any], biases: Sequence[Any] | None, dtype: torch.dtype) -> Tensor:
    """The experts' weights in one tensor (experts, out, in), with the biases as a column after them if given.

    It is made anew in every pass. A cast to autocast's precision costs that anyway; and a copy that is kept would have
    to know of every change of a weight, but PyTorch does not tell of changes by ``weight.data``.
    """
    out, width = weights[0].shape
    stack = weights[0].new_empty(len(weights), out, width + (0 if biases is None else _columns(dtype)), dtype=dtype)
    for place, weight in zip(stack[:, :, :width].unbind(), weights, strict=True):
        place.copy_(weight)
    if biases is not None:
        for place, bias in zip(stack[:, :, width].unbind(), biases, strict=True):
            place.copy_(bias)
        stack[:, :, width + 1 :].zero_()
    return stack


def _sorted_rows(tokens: Tensor, source: Tensor, width: int) -> Tensor:
    """The rows of ``tokens`` that ``source`` names, with ones after them up to ``width``.

    The first of these columns meets the biases, the others the zeros that follow them (:func:`_stack`).
    """
    dim = tokens.shape[1]
    if width == dim:
        return tokens.index_select(0, source)
    if torch.compiler.is_compiling():  # one kernel, generated
        return torch.cat([tokens.index_select(0, source), tokens.new_ones(source.shape[0], width - dim)], dim=1)
    rows = tokens.new_empty(source.shape[0], width)
    torch.index_select(tokens, 0, source, out=rows[:, :dim])
    rows[:, dim:].fill_(1)
    return rows


def _columns(dtype: torch.dtype) -> int:
    """How many columns are added for the bias."""
    return ALIGNMENT // dtype.itemsize


def _parameter_gradients(ctx: Any, gradient: Tensor, rows: Tensor, ends: Tensor, owner: Tensor) -> list[Tensor | None]:
    """The gradients of weights and biases; zeros for an expert without tokens, as distributed training wants."""
    needed, experts, dtypes = ctx.needs_input_grad[10:], ctx.experts, ctx.dtypes
    found: list[Tensor | None] = [None] * len(needed)
    if any(needed[:experts]) or ctx.with_column:
        together = grouped_outer_product(gradient, rows, ends)
        if any(needed[:experts]):
            found[:experts] = together[:, :, : ctx.width].to(dtypes[0]).unbind()
        if ctx.with_column:
            found[experts:] = together[:, :, ctx.width].to(dtypes[experts]).unbind()
    if not ctx.with_column and any(needed[experts:]):
        which = (owner.unsqueeze(0) == torch.arange(experts, device=owner.device).unsqueeze(1)).to(gradient.dtype)
        found[experts:] = (which @ gradient).to(dtypes[experts]).unbind()
    return [
        None if value is None or not is_needed else value.to(dtype)
        for value, is_needed, dtype in zip(found, needed, dtypes, strict=True)
    ]


def _to_tokens(rows: Tensor, back: Tensor | None, slots: int) -> Tensor:
    """Sorted rows' gradients to those of the tokens, of which each is the sum over its slots."""
    if back is None:
        return rows
    rows = rows.index_select(0, back)
    return rows if slots == 1 else rows.view(-1, slots, rows.shape[-1]).sum(1)


class _Signal:
    """What :class:`st_clp.moe.router_signal.RouterSignal` says, by grouped products; its docstring has the meaning.

    Args:
        gradient: (rows, out) of the layer's output.
        rows: (rows, in), its input, sorted, perhaps with the bias's column.
        rows_gradient: (rows, in), or None where ``result`` is there.
        result: (rows, out), the output, or None.
        stack: (experts, out, in), perhaps with the bias's column.
        bias: (experts, out), where it is no column and there is one.
        owner: (rows,) each row's expert.
    """

    def __init__(
        self,
        gradient: Tensor,
        rows: Tensor,
        rows_gradient: Tensor | None,
        result: Tensor | None,
        stack: Tensor,
        bias: Tensor | None,
        owner: Tensor,
    ) -> None:
        self.gradient, self.rows, self.result = gradient, rows, result
        self.stack, self.bias, self.owner = stack, bias, owner.long()
        if result is not None:
            self.own = inner_products(gradient, result)
        else:
            assert rows_gradient is not None
            self.own = inner_products(rows_gradient, rows)
            if bias is not None:
                self.own = self.own + inner_products(gradient, bias.index_select(0, self.owner))

    def of_chosen(self, everywhere: float, tried: Tensor | None, counted: Tensor | None) -> Tensor:
        """The term of each row's own expert, (rows, experts) float32, zero elsewhere.

        It counts ``everywhere``, and at the rows ``tried`` so many fold more.
        """
        factors = torch.full_like(self.own, everywhere)
        if tried is not None and counted is not None:
            factors.index_add_(0, tried, counted)
        into = self.own.new_zeros(self.rows.shape[0], self.stack.shape[0])
        return into.scatter_(1, self.owner.unsqueeze(1), (self.own * factors).unsqueeze(1))

    def add_others(self, into: Tensor, tried: Tensor, counted: Tensor) -> None:
        """Add to ``into`` (rows, experts) what the other experts would have done at the rows ``tried``."""
        experts = self.stack.shape[0]
        owner = self.owner.index_select(0, tried)
        others = owner.unsqueeze(1) + torch.arange(1, experts, device=owner.device)
        pairs = sort_by_expert(others.remainder(experts).reshape(-1), experts)
        which = pairs.order // (experts - 1)
        at = tried.index_select(0, which)
        gradient, rows = self.gradient.index_select(0, at), self.rows.index_select(0, at)
        if self.result is not None:
            value = inner_products(gradient, grouped_product(rows, self.stack.transpose(1, 2), pairs.ends))
        else:
            value = inner_products(grouped_product(gradient, self.stack, pairs.ends), rows)
        if self.bias is not None:
            value = value + inner_products(gradient, self.bias.index_select(0, pairs.owner.long()))
        into.view(-1).index_add_(0, at * experts + pairs.owner, value * counted.index_select(0, which))


class SortedSlots(NamedTuple):
    """Slots sorted by their expert.

    Args:
        order: (rows,) int64, the slot of each row.
        owner: (rows,) uint8, or int64 with more than 256 experts: each row's expert.
        ends: (experts,) int32, where each expert's rows end.
    """

    order: Tensor
    owner: Tensor
    ends: Tensor


def sort_by_expert(slots: Tensor, experts: int) -> SortedSlots:
    """Sort ``slots`` (slots,), whole numbers each of which names one of so many experts, on the device."""
    narrow = slots.to(torch.uint8) if experts <= 256 else slots  # a radix sort makes a pass for every few bits
    owner, order = torch.sort(narrow, stable=True)
    each = torch.arange(experts, dtype=owner.dtype, device=owner.device)
    return SortedSlots(order, owner, torch.searchsorted(owner, each, right=True, out_int32=True))


def counts_by_expert(slots: Tensor, experts: int, mask: Tensor | None = None) -> Tensor:
    """How often each expert stands in ``slots`` (slots,) where ``mask`` is true: (experts,) int64."""
    each = slots.unsqueeze(1) == torch.arange(experts, device=slots.device)
    return (each if mask is None else each & mask.unsqueeze(1)).sum(0)
