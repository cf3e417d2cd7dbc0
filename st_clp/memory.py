"""The host's memory: whether glibc keeps what a model on a CPU frees, and batches that a GPU can copy by itself."""

from __future__ import annotations

import ctypes
import sys
from typing import Any

import torch
from torch.utils.data._utils.pin_memory import pin_memory

HAND_BACK_EVERY = 25  # steps of a training
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


def hand_back_freed_memory() -> None:
    """Let glibc hand freed memory back to the system, once; where another allocator is used, nothing happens."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform.startswith("linux") else None
    if trim is not None:
        trim(0)


def pinned(batch: Any) -> Any:
    """The batch with all its tensors in pinned memory, as a data loader with ``pin_memory`` does it."""
    return pin_memory(batch)
