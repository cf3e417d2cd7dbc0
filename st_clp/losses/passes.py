"""Which texts share a forward pass, so that a step takes least time."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch


@dataclass(frozen=True)
class PassCost:
    """What a forward and backward pass costs besides its tokens, in tokens that would take as long.

    A GPU works while the host prepares what comes next, so a step takes as long as the slower of the two.

    Attributes:
        device: For the device.
        host: For the host, if it works beside the device; otherwise 0.
        multiple: Widths are rounded up to a multiple of this, which suits the device's kernels.
    """

    device: int
    host: int = 0
    multiple: int = 1

    def of(self, tokens: int, passes: int) -> int:
        """The cost of so many tokens, padding included, in so many passes."""
        return max(tokens + passes * self.device, passes * self.host)

    def round_up(self, width: int) -> int:
        """The width of a pass whose longest text has so many tokens."""
        return int(-(-width // self.multiple) * self.multiple)


# Measured on CPUs. For a GPU it is arithmetic: a pass of twelve layers, forward and backward, takes the host 20 ms, in
# which an H100 trains a model of 384 dimensions on 7,000 tokens (measured), and one of 1024 on some 2,000 (guessed).
ON_CPU = PassCost(device=128)
ON_GPU = PassCost(device=512, host=4096, multiple=8)


def pass_cost(device: torch.device) -> PassCost:
    """What a pass costs on this device."""
    return ON_CPU if device.type == "cpu" else ON_GPU


def length_groups(lengths: np.ndarray, cost: PassCost) -> list[np.ndarray]:
    """Group texts by length so that their passes cost least. Padding counts as tokens.

    Args:
        lengths: ``(texts,)``, the tokens of each.
        cost: What a pass costs.

    Returns:
        The positions of each group's texts in ascending order, every text in one group, that of the shortest first.
    """
    rounded = -(-lengths // cost.multiple) * cost.multiple
    widths, counts = np.unique(rounded, return_counts=True)
    before = np.concatenate([[0], np.cumsum(counts)])  # texts that are shorter than each width
    # (end, first): the tokens of one group of the widths from the first up to, not including, the end
    one_group = (before[1:, None] - before[None, :-1]) * widths[:, None]
    one_group = np.where(np.tri(len(widths), dtype=bool), one_group, np.iinfo(np.int64).max // 4)
    least = [one_group[:, 0]]  # with each number of groups: the tokens of all widths up to and with each one
    starts = [np.zeros(len(widths), dtype=int)]  # ... and the first width of the last group there
    # Tokens fall ever more slowly with more groups, so the first number that does not pay is the end.
    while len(least) < len(widths):
        sums = one_group[:, 1:] + least[-1][None, :-1]
        more = np.concatenate([least[-1][:1], sums[1:].min(axis=1)])
        if cost.of(more[-1], len(least) + 1) >= cost.of(least[-1][-1], len(least)):
            break
        least.append(more)
        starts.append(np.concatenate([[0], sums[1:].argmin(axis=1) + 1]))
    groups, end = [], len(widths)
    for first in reversed(starts):
        begin = int(first[end - 1])
        groups.append(np.flatnonzero((rounded >= widths[begin]) & (rounded <= widths[end - 1])))
        end = begin
    return groups[::-1]
