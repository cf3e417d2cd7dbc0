"""Float32 arithmetic on rows kept in their own precision, a block of rows at a time.

A router decides in float32. A whole float32 copy of bfloat16 rows is twice their size, and for the wide rows before a
down projection it took longer to write than the rest of the routing; a block's copy stays in the cache.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

CPU_BLOCK, BLOCK = 2**20, 2**24
"""Numbers in a block: 4 MiB as float32, which a processor's cache holds; elsewhere few blocks matter more."""


class PreciseLinear(Function):
    """``rows.float() @ weight.float().T``: (rows, dim) and (out, dim) to float32 (rows, out), with gradients.

    The gradient of the rows comes of a product in their own precision, in which it is handed on anyway: over so few
    columns a product is all writing, and of float32 there is twice as much to write. What the logits' gradient loses by
    rounding is a second factor of the same product.
    """

    @staticmethod
    def forward(ctx: Any, rows: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(rows, weight)
        factors = weight.float().t()
        if rows.dtype == torch.float32 or torch.compiler.is_compiling():
            return rows.float() @ factors
        if rows.device.type == "cuda":
            return _wide_product(rows, weight)
        result = rows.new_empty(rows.shape[0], weight.shape[0], dtype=torch.float32)
        for block, copied in float_blocks(rows):
            torch.mm(copied, factors, out=result[block])
        return result

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor | None]:
        rows, weight = ctx.saved_tensors
        needs_rows, needs_weight = ctx.needs_input_grad
        rows_gradient = _narrow_product(gradient, weight.to(rows.dtype)) if needs_rows else None
        weight_gradient = weighted_sums(gradient, rows).to(weight.dtype) if needs_weight else None
        return rows_gradient, weight_gradient


def _wide_product(rows: Tensor, weight: Tensor) -> Tensor:
    """``rows`` (rows, dim) times ``weight`` (out, dim) in float32, reading the rows in their own precision.

    What the weight loses by rounding to that precision is a second factor of the same product.
    """
    rounded = weight.to(rows.dtype)
    if weight.dtype == rows.dtype:
        return torch.mm(rows, rounded.t(), out_dtype=torch.float32)
    lost = (weight.float() - rounded.float()).to(rows.dtype)
    both = torch.mm(rows, torch.cat([rounded, lost]).t(), out_dtype=torch.float32)
    return both[:, : weight.shape[0]] + both[:, weight.shape[0] :]


def _narrow_product(gradient: Tensor, weight: Tensor) -> Tensor:
    """``gradient`` (rows, out) float32 times ``weight`` (out, dim), in the latter's precision, rounded once."""
    if weight.dtype == torch.float32:
        return gradient @ weight
    rounded = gradient.to(weight.dtype)
    lost = (gradient - rounded.float()).to(weight.dtype)
    return torch.cat([rounded, lost], dim=1) @ torch.cat([weight, weight])


def weighted_sums(weights: Tensor, rows: Tensor) -> Tensor:
    """Sum ``rows`` (rows, dim) by each column of the float32 ``weights`` (rows, sums): (sums, dim) float32."""
    if _at_once(rows):
        return weights.t() @ rows.float()
    total = torch.zeros(weights.shape[1], rows.shape[1], dtype=torch.float32, device=rows.device)
    for block, copied in float_blocks(rows):
        total.addmm_(weights[block].t(), copied)
    return total


def inner_products(a: Tensor, b: Tensor) -> Tensor:
    """The inner product of each row of ``a`` (rows, dim) with that of ``b``, in float32: (rows,)."""
    if _at_once(a):
        return (a.float() * b).sum(-1)  # the product is in float32, whatever b is in
    result = a.new_empty(a.shape[0], dtype=torch.float32)
    for (block, one), (_, other) in zip(float_blocks(a), float_blocks(b), strict=True):
        torch.linalg.vecdot(one, other, out=result[block])
    return result


def _at_once(rows: Tensor) -> bool:
    """Whether there is one block; or a compiled kernel, which makes no copy."""
    return torch.compiler.is_compiling() or rows.shape[0] <= _block_size(rows)


def _block_size(rows: Tensor) -> int:
    """The rows of a block."""
    return max(16, (CPU_BLOCK if rows.device.type == "cpu" else BLOCK) // max(1, rows.shape[1]))


def float_blocks(rows: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """Slices of ``rows`` (rows, dim) with their float32 copies: small ones, each written where the last one was."""
    size = _block_size(rows)
    if rows.dtype == torch.float32:
        room = None
    else:
        room = rows.new_empty(min(size, rows.shape[0]), rows.shape[1], dtype=torch.float32)
    for start in range(0, rows.shape[0], size):
        block = slice(start, min(start + size, rows.shape[0]))
        # new memory for every block would cost as much as the arithmetic
        yield block, rows[block] if room is None else room[: block.stop - start].copy_(rows[block])
