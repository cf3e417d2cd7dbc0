"""Sampling whose result does not depend on what else is in the batch."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import LogitsProcessor

# Of SplitMix64 (Steele, Lea and Flood (2014), Fast Splittable Pseudorandom Number Generators), as signed numbers.
_STEP, _FIRST, _SECOND = (number - 2**64 for number in (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB))


class SeededSampling(LogitsProcessor):
    """Samples each row by a seed of its own, so that a row's text is the same in any batch.

    Adds Gumbel noise to the k likeliest tokens and leaves the best one: its token is a sample from the softmax over
    them (Maddison et al. (2014), A* Sampling, arXiv:1411.0030). The noise is a hash of seed, step and token, so that
    rounding, which padding changes, tips near ties alone. Use it with ``do_sample=False``, anew for each call.

    Args:
        seeds: One for each row.
        temperature: Of the softmax; 0 takes the likeliest token.
        top_k: Sample from no more tokens than this.
        top_p: Sample from the likeliest tokens that hold this share together.
    """

    def __init__(self, seeds: Sequence[int], *, temperature: float, top_k: int, top_p: float) -> None:
        self._state = torch.tensor(list(seeds), dtype=torch.int64)[:, None]
        self._temperature = temperature
        self._top_k = top_k
        self._top_p = top_p

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        """Scores, (rows, vocabulary), with all but one token of each row at -inf."""
        best, tokens = scores.float().topk(min(self._top_k, scores.shape[-1]), dim=-1)
        if self._temperature > 0:
            best = torch.log_softmax(best / self._temperature, dim=-1)
            before = best.exp().cumsum(-1) - best.exp()
            best = best.masked_fill(before >= self._top_p, -torch.inf)
            self._state = _mix(self._state.to(tokens.device) + _STEP)
            best = best - torch.log(-torch.log(_uniform(self._state + tokens * _STEP)))
        chosen = tokens.gather(-1, best.argmax(-1, keepdim=True))
        return torch.full_like(scores, -torch.inf).scatter(-1, chosen, 0.0)  # type: ignore[return-value]


def _mix(state: Tensor) -> Tensor:
    """SplitMix64's output function, element by element, int64; products wrap around."""
    state = (state ^ _shift(state, 30)) * _FIRST
    state = (state ^ _shift(state, 27)) * _SECOND
    return state ^ _shift(state, 31)


def _shift(state: Tensor, bits: int) -> Tensor:
    """To the right, with zeros from the left: signed numbers would bring their sign."""
    return (state >> bits) & ((1 << (64 - bits)) - 1)


def _uniform(state: Tensor) -> Tensor:
    """Between 0 and 1, neither of them reached, float32."""
    return ((_shift(_mix(state), 40).double() + 0.5) / 2**24).clamp(max=1 - 1e-7).float()
