"""All experts' products in one kernel, on an accelerator, where that is faster than a product an expert.

Whether it is depends on the device, on how many experts there are and on how large they are: the one kernel spares a
launch an expert and fills a device that one expert's few rows leave half empty, but it needs the weights beside each
other, and the biases cost a pass over the result. So both ways are timed once for each shape and the faster one is
kept. On a processor PyTorch's grouped product is a loop that is slower than ours, and is not tried.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

logger = logging.getLogger(__name__)

DEVICES = ("cuda",)
"""Where it is tried."""
REPEATS, GAIN = 5, 1.05
"""How often each way is timed, and how much sooner the one kernel must be done: the two round differently."""

Way = Callable[[Tensor, Sequence[int], Sequence[Tensor], Sequence[Tensor | None] | None], Tensor]
_faster: dict[tuple[object, ...], bool] = {}


def choose(
    each: Way,
    rows: Tensor,
    counts: Sequence[int],
    matrices: Sequence[Tensor],
    biases: Sequence[Tensor | None] | None,
) -> Way:
    """Return the faster way for products of this kind: ``each``, a product an expert, or :func:`in_one_kernel`.

    Args:
        each: What computes one product an expert.
        rows: (rows, in), sorted by expert.
        counts: Rows of each expert.
        matrices: Each expert's (in, out).
        biases: Each expert's (out,), or None.
    """
    if not _can(rows, counts, matrices):
        return each
    shape = tuple(matrices[0].shape)
    magnitude = rows.shape[0].bit_length()  # what is so many rows, to a factor of two, is alike
    kind = (rows.device, rows.dtype, shape, matrices[0].stride(), len(counts), magnitude, biases is None)
    if kind not in _faster:
        _faster[kind] = _is_faster(each, rows, counts, matrices, biases)
    return in_one_kernel if _faster[kind] else each


def in_one_kernel(
    rows: Tensor, counts: Sequence[int], matrices: Sequence[Tensor], biases: Sequence[Tensor | None] | None
) -> Tensor:
    """Multiply each expert's slice of the sorted ``rows`` (rows, in) by its matrix (in, out): (rows, out)."""
    ends = torch.tensor(counts, device=rows.device).cumsum(0)
    if matrices[0].stride(0) == 1:  # of a weight (out, in) that is read the other way round
        stacked = torch.stack([matrix.t() for matrix in matrices]).transpose(1, 2)
    else:
        stacked = torch.stack(list(matrices))
    result = torch.nn.functional.grouped_mm(rows.contiguous(), stacked, offs=ends.int())
    if biases is not None and biases[0] is not None:
        added = torch.stack([bias for bias in biases if bias is not None])
        expert = torch.searchsorted(ends, torch.arange(rows.shape[0], device=rows.device), right=True)
        result += added.index_select(0, expert)
    return result


def _can(rows: Tensor, counts: Sequence[int], matrices: Sequence[Tensor]) -> bool:
    """Whether it can be tried: the kernel reads rows of whole 16 bytes, and its results may not differ by a choice."""
    return (
        rows.device.type in DEVICES
        and rows.dtype == torch.bfloat16
        and rows.shape[0] > 0
        and len(counts) > 1
        and all(side % 8 == 0 for side in matrices[0].shape)
        and hasattr(torch.nn.functional, "grouped_mm")
        and not torch.are_deterministic_algorithms_enabled()
        and not torch.compiler.is_compiling()
    )


def _is_faster(
    each: Way,
    rows: Tensor,
    counts: Sequence[int],
    matrices: Sequence[Tensor],
    biases: Sequence[Tensor | None] | None,
) -> bool:
    def seconds(way: Way) -> float:
        best = float("inf")
        for _ in range(REPEATS):
            _finish(rows.device)
            begin = time.perf_counter()
            way(rows, counts, matrices, biases)
            _finish(rows.device)
            best = min(best, time.perf_counter() - begin)
        return best

    try:
        one, several = seconds(in_one_kernel), seconds(each)
    except RuntimeError as error:  # not for this device
        logger.debug("no grouped product on %s (%s)", rows.device, error)
        return False
    faster = one * GAIN < several
    logger.debug(
        "%d rows, %d experts of %s on %s: %.3f ms in one kernel, %.3f ms with one each",
        rows.shape[0], len(counts), tuple(matrices[0].shape), rows.device, 1e3 * one, 1e3 * several,
    )  # fmt: skip
    return faster


def _finish(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
