"""What the experts do: how often each is used, by whom, how sure the router is and how far the experts have moved."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from itertools import combinations
from typing import Any

import torch
from torch import nn

from st_clp.moe.convert import expert_layers

DEAD_SHARE = 0.01
"""An expert with less than this part of an even share of its layer's tokens is reported as dead."""


@dataclass(frozen=True)
class LayerUsage:
    """The use of one layer's experts.

    Args:
        layer: Its index.
        tokens: Tokens that each expert has worked on.
        shares: The same as shares of 1; all 0 where no text has gone through yet.
        distance: The mean distance of two experts: the norm of their weights' difference over that of the weights.
        dead: Experts that are hardly used, by index.
    """

    layer: int
    tokens: list[int]
    shares: list[float]
    distance: float
    dead: list[int]


@dataclass(frozen=True)
class ExpertUsage:
    """The use of a model's experts, layer by layer."""

    layers: list[LayerUsage]
    groups: dict[str, list[list[int]]] = field(default_factory=dict)

    @property
    def dead(self) -> list[tuple[int, int]]:
        """The experts that are hardly used, as (layer, expert)."""
        return [(layer.layer, expert) for layer in self.layers for expert in layer.dead]

    def to_dict(self) -> dict[str, Any]:
        """Return plain lists and numbers, for a report."""
        return {**asdict(self), "dead": [list(pair) for pair in self.dead]}

    def __str__(self) -> str:
        lines = ["layer  share of tokens by expert"]
        lines += [
            f"{layer.layer:>5}  "
            + "  ".join(f"{share:6.1%}" for share in layer.shares)
            + (f"  dead: {', '.join(map(str, layer.dead))}" if layer.dead else "")
            for layer in self.layers
        ]
        return "\n".join(lines)


def expert_usage(model: nn.Module) -> ExpertUsage:
    """Say how often each expert has been used since the model was made or loaded, or use was last reset.

    Padding does not count, and a token counts once however often a cached loss or gradient checkpointing runs it.

    Raises:
        ValueError: If the model has no mixture of experts.
    """
    routed = [layer for layer in expert_layers(model) if layer.gate is not None]
    if not routed:
        raise ValueError("The model has no mixture of experts, so there is no use of experts to report.")
    return ExpertUsage([_layer_usage(layer) for layer in routed])


def reset_usage(model: nn.Module) -> None:
    """Start counting anew."""
    for layer in expert_layers(model):
        if layer.gate is not None:
            layer.gate.balance.reset()


def _layer_usage(layer: Any) -> LayerUsage:
    tokens = list(layer.gate.balance.used)
    total = sum(tokens)
    shares = [count / total if total else 0.0 for count in tokens]
    dead = [e for e, share in enumerate(shares) if total and share < DEAD_SHARE / len(tokens)]
    return LayerUsage(layer.layer, tokens, shares, _distance(layer), dead)


@torch.no_grad()
def _distance(layer: Any) -> float:
    pairs = list(combinations([expert.weight.float() for expert in layer.experts], 2))
    if not pairs:
        return 0.0
    return float(sum((a - b).norm() / ((a.norm() + b.norm()) / 2).clamp(min=1e-12) for a, b in pairs) / len(pairs))
