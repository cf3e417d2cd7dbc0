"""What glibc does with the memory that a model on a processor frees: kept for the next layer, or handed back."""

from __future__ import annotations

import ctypes
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

LARGEST = 31 << 20  # bytes; glibc learns from blocks of up to 32 MiB


def keep_freed_memory() -> None:
    """Let glibc keep the blocks that a forward pass on a processor frees, in this process from now on.

    A transformer's layers take and free the same few blocks of some MiB again and again. glibc hands blocks of that
    size back to the system and asks for new ones, whose pages the kernel clears at their first touch: up to a sixth
    of the time of encoding (``benchmarks/README.md``). It learns to keep what is as large as the largest block that
    was freed so far (``M_MMAP_THRESHOLD`` in mallopt(3)), so one is allocated, never touched, and freed. Up to
    twice its size of freed memory stays with the process for each of its threads; where more is freed, all of it
    goes back, so a batch's own blocks have to be a good deal smaller. Where another allocator is used, or glibc's
    thresholds were set by hand, nothing changes.
    """
    torch.empty(LARGEST, dtype=torch.uint8)


M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of malloc.h
KEPT = 32 << 20  # bytes; what glibc keeps at most by itself
HANDED_BACK = 1 << 20  # bytes, from which on blocks go back


@contextmanager
def handing_back_large_blocks() -> Iterator[None]:
    """Let glibc hand every large block back to the system as soon as it is freed, for a while.

    A training keeps what its layers compute for the backward pass, in blocks whose sizes change with every batch. Of
    what glibc keeps of them only some fits what the next batch needs, and a process comes to hold twice the memory that
    it uses (``benchmarks/README.md``). After it glibc keeps blocks as :func:`keep_freed_memory` has it. Where another
    allocator is used, or glibc's thresholds were set by hand, nothing changes.
    """
    mallopt = _mallopt()
    if mallopt is None:
        yield
        return
    mallopt(M_MMAP_THRESHOLD, HANDED_BACK)
    try:
        yield
    finally:
        mallopt(M_MMAP_THRESHOLD, KEPT)
        mallopt(M_TRIM_THRESHOLD, 2 * KEPT)


def _mallopt() -> Callable[[int, int], int] | None:
    """mallopt(3); None where there is none, or where the user has set what it sets."""
    by_hand = "glibc.malloc" in os.environ.get("GLIBC_TUNABLES", "") or any(
        name in os.environ for name in ("MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_", "MALLOC_TOP_PAD_")
    )
    if by_hand or not sys.platform.startswith("linux"):
        return None
    return getattr(ctypes.CDLL(None), "mallopt", None)
