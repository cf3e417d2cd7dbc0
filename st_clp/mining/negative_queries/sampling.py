"""Sampling whose result does not depend on what else is in the batch."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from transformers import LogitsProcessor


class SeededSampling(LogitsProcessor):
    """Samples each row by a generator of its own, so that a row's text is the same in any batch.

    Adds Gumbel noise to the k likeliest tokens and leaves the best one: its token is a sample from the softmax over
    them (Maddison et al. (2014), A* Sampling, arXiv:1411.0030). Use it with ``do_sample=False``.

    Args:
        seeds: One for each row.
        temperature: Of the softmax; 0 takes the likeliest token.
        top_k: Sample from no more tokens than this.
        top_p: Sample from the likeliest tokens that hold this share together.
    """

    def __init__(self, seeds: Sequence[int], *, temperature: float, top_k: int, top_p: float) -> None:
        self._generators = [torch.Generator().manual_seed(seed) for seed in seeds]
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
            noise = torch.stack([torch.rand(best.shape[-1], generator=generator) for generator in self._generators])
            best = best - torch.log(-torch.log(noise.clamp(1e-20, 1 - 1e-7))).to(best.device)
        chosen = tokens.gather(-1, best.argmax(-1, keepdim=True))
        return torch.full_like(scores, -torch.inf).scatter(-1, chosen, 0.0)  # type: ignore[return-value]
