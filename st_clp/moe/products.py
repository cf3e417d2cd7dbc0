"""One product an expert, each in the shapes that a processor multiplies fast.

In bfloat16 and float16 a processor's product takes blocks of rows whose number divides the whole: 1,058 rows, which
are 2 times 23 times 23, cost up to a quarter more by the row than 1,064, and multiples of 8 up to 1,024 cost nearly the
same (``benchmarks/moe.md``). How many rows an expert gets is chance. So its product takes a few of the next expert's
rows along, whose results the next product writes anew, and a long part goes in even pieces. Float32 hardly minds, and
an accelerator, which has its own choice to make (``one_kernel.py``), is given whole parts.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from st_clp.moe.one_kernel import choose

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
    way = choose(one_each, rows, counts, matrices, biases)
    return way(rows, counts, matrices, biases)


def one_each(
    rows: Tensor, counts: Sequence[int], matrices: Sequence[Tensor], biases: Sequence[Tensor | None] | None
) -> Tensor:
    """As :func:`products`, by one product an expert."""
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

    The rows of one piece after the other go through the same memory, which wide rows need not wait for again. On an
    accelerator, where new memory costs nothing and few large products are best, a copy is made after all.
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
