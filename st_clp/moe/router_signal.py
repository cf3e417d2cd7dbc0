"""What the backward pass tells the router about its choice."""

from __future__ import annotations

import os

import torch

from st_clp.moe.settings import MoESettings

MODE = os.environ.get("EST", "sampled+base")


class RouterSignal:
    def __init__(self, settings: MoESettings) -> None:
        self.stride = max(1, round(1 / settings.router_sample)) if settings.router_sample else 0
        self.turn = 0

    def __call__(self, into, gradient, rows, rows_gradient, counts, weights, biases) -> None:
        from st_clp.moe.grouped import slices

        n = rows.shape[0]
        chosen = (rows_gradient.float() * rows.float()).sum(-1)
        parts = slices(counts)
        for e, part in enumerate(parts):
            if biases[e] is not None:
                chosen[part] += (gradient[part] @ biases[e]).float()
        if MODE in ("chosen", "base"):
            v = chosen if MODE == "chosen" else chosen - chosen.mean()
            for e, part in enumerate(parts):
                into[part, e] = v[part]
            return
        if self.stride:
            self.turn = (self.turn + 1) % self.stride
            idx = torch.arange(self.turn, n, self.stride)
            g, x = gradient[idx], rows[idx]
            for e in range(len(weights)):
                d = ((g @ weights[e]).float() * x.float()).sum(-1)
                if biases[e] is not None:
                    d += (g @ biases[e]).float()
                into[idx, e] = d * self.stride
        if MODE == "sampled+base":
            v = (chosen - chosen.mean()) * 0.05
            for e, part in enumerate(parts):
                into[part, e] += v[part]
