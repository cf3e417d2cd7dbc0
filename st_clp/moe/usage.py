"""Statistics of the experts: their use by groups of texts, the router's entropy, and how far apart the experts are."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from itertools import combinations
from pathlib import Path
from typing import Any, cast

import torch
from sentence_transformers import SentenceTransformer
from torch import nn
from transformers import TrainerCallback

from st_clp.moe.convert import expert_layers
from st_clp.moe.layers import ExpertLinear
from st_clp.moe.routing import Router
from st_clp.terminal import new_figure, save_figure

logger = logging.getLogger(__name__)

DEAD_SHARE = 0.05
"""An expert with less than this part of an even share of its layer's tokens is reported as dead."""


@dataclass(frozen=True)
class LayerUsage:
    """The use of one layer's experts.

    Args:
        layer: Its index.
        tokens: Tokens that each expert has worked on.
        shares: The same as shares of 1; all 0 where no text has gone through yet.
        entropy: The mean entropy of the router's distribution, as a share of the highest possible: 0 where it is
            sure of its choice, 1 where it tosses a coin; None where it was not measured.
        distances: For each pair of experts, ``"0-1"`` and so on, the norm of their weights' difference over the mean
            norm of their weights.
        dead: Experts that are hardly used, by index.
        groups: Tokens of each expert by group of texts, where groups were asked for.
    """

    layer: int
    tokens: list[int]
    shares: list[float]
    entropy: float | None
    distances: dict[str, float]
    dead: list[int]
    groups: dict[str, list[int]]


@dataclass(frozen=True)
class ExpertUsage:
    """The use of a model's experts, layer by layer."""

    layers: list[LayerUsage]

    @property
    def dead(self) -> list[tuple[int, int]]:
        """The experts that are hardly used, as (layer, expert)."""
        return [(layer.layer, expert) for layer in self.layers for expert in layer.dead]

    def to_dict(self) -> dict[str, Any]:
        """Return plain lists and numbers, for a report."""
        return {**asdict(self), "dead": [list(pair) for pair in self.dead]}

    def __str__(self) -> str:
        lines = ["layer  share of tokens by expert"]
        for layer in self.layers:
            line = f"{layer.layer:>5}  " + "  ".join(f"{share:6.1%}" for share in layer.shares)
            if layer.entropy is not None:
                line += f"  entropy {layer.entropy:.2f}"
            if layer.dead:
                line += f"  hardly used: {', '.join(map(str, layer.dead))}"
            lines.append(line)
            lines += [f"       {name}: " + _shares_text(tokens) for name, tokens in layer.groups.items()]
        return "\n".join(lines)

    def plot(self, path: str | Path) -> None:
        """Draw a picture of the shares, a row per layer and a panel per group, and write it to ``path``.

        Raises:
            ModuleNotFoundError: matplotlib is not installed; the message says how to.
        """
        groups = list(self.layers[0].groups) or ["all texts"]
        figure = new_figure(2.2 + 2.2 * len(groups), 1.2 + 0.3 * len(self.layers))
        for place, group in enumerate(groups, start=1):
            axes = figure.add_subplot(1, len(groups), place)
            table = [_normalized(layer.groups.get(group, layer.tokens)) for layer in self.layers]
            image = axes.imshow(table, vmin=0, vmax=1, aspect="auto", cmap="viridis")
            axes.set_title(group)
            axes.set_xlabel("expert")
            axes.set_xticks(range(len(table[0])))
            axes.set_yticks(range(len(self.layers)), [str(layer.layer) for layer in self.layers])
            if place == 1:
                axes.set_ylabel("layer")
        figure.colorbar(image, ax=figure.axes, label="share of tokens")
        save_figure(figure, path)


def expert_usage(
    model: nn.Module,
    texts: Sequence[str] | None = None,
    by: Sequence[str] | None = None,
    batch_size: int = 32,
    show_progress_bar: bool = False,
) -> ExpertUsage:
    """Measure how often each expert is used.

    Padding does not count, and a token counts once however often a cached loss or gradient checkpointing runs it.

    Args:
        model: A model with a mixture of experts.
        texts: Texts to embed for it. None reports the passes since the model was made or loaded, or since
            :func:`reset_usage`; these counts are left alone otherwise.
        by: A name for each text, such as its language: the use is given for each name as well.
        batch_size: As for ``model.encode``.
        show_progress_bar: As for ``model.encode``.

    Raises:
        ValueError: If the model has no mixture of experts, ``texts`` is empty, or ``by`` is not as long as ``texts``.
    """
    routed = _routed(model)
    if by is not None and (texts is None or len(by) != len(texts)):
        raise ValueError(f"by needs a name for each text: {len(by)} names for {len(texts or [])} texts.")
    if texts is None:
        return ExpertUsage([_layer_usage(layer, _router(layer).balance.used, None, {}) for layer in routed])
    if not texts:
        raise ValueError("texts is empty: give at least one text to embed, or None for the passes so far.")
    names = ["all texts"] * len(texts) if by is None else [str(name) for name in by]
    counts: dict[str, list[list[int]]] = {}
    with _measuring(routed) as entropies:
        for name in dict.fromkeys(names):
            for layer in routed:
                _router(layer).balance.reset()
            chosen = [text for text, other in zip(texts, names, strict=True) if other == name]
            cast(SentenceTransformer, model).encode(
                chosen, batch_size=batch_size, show_progress_bar=show_progress_bar, convert_to_tensor=True
            )
            counts[name] = [list(_router(layer).balance.used) for layer in routed]
    layers = []
    for index, layer in enumerate(routed):
        total = [sum(column) for column in zip(*(counts[name][index] for name in counts), strict=True)]
        groups = {} if by is None else {name: counts[name][index] for name in counts}
        layers.append(_layer_usage(layer, total, entropies[index], groups))
    return ExpertUsage(layers)


def reset_usage(model: nn.Module) -> None:
    """Start counting the use of the experts anew; the balance of the routers is left alone."""
    for layer in _routed(model):
        _router(layer).balance.reset()


class ExpertUsageCallback(TrainerCallback):
    """Log the use of the experts while training, with the Trainer's own logs, and warn of dead experts.

    Each log gets ``expert_max_share``, the largest share of a layer's tokens that one expert has had since the last
    log, in units of an even share (1 is even), and ``dead_experts``, how many are hardly used.

    Args:
        model: The model that is trained.
    """

    def __init__(self, model: nn.Module) -> None:
        _routed(model)
        self.model = model
        self._warned: set[tuple[int, int]] = set()

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        reset_usage(self.model)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        usage = expert_usage(self.model)
        if logs is None or not any(any(layer.tokens) for layer in usage.layers):
            return
        logs["expert_max_share"] = round(max(max(layer.shares) * len(layer.shares) for layer in usage.layers), 4)
        logs["dead_experts"] = len(usage.dead)
        if state.log_history:
            state.log_history[-1].update({key: logs[key] for key in ("expert_max_share", "dead_experts")})
        for layer, expert in usage.dead:
            if (layer, expert) not in self._warned:
                self._warned.add((layer, expert))
                logger.warning("Expert %d of layer %d is hardly used at step %d.", expert, layer, state.global_step)
        reset_usage(self.model)


@contextmanager
def _measuring(routed: list[ExpertLinear]) -> Iterator[list[float]]:
    """Count from zero and measure entropies within the context; afterwards the former counts are restored."""
    before = [list(_router(layer).balance.used) for layer in routed]
    entropies: list[float] = []
    for layer in routed:
        _router(layer).entropy = (0.0, 0)
    try:
        yield entropies
    finally:
        for layer, used in zip(routed, before, strict=True):
            router = _router(layer)
            total, tokens = router.entropy or (0.0, 0)
            entropies.append(float(total) / max(tokens, 1))
            router.entropy = None
            router.balance.used = used


def _routed(model: nn.Module) -> list[ExpertLinear]:
    routed = [layer for layer in expert_layers(model) if layer.gate is not None]
    if not routed:
        raise ValueError("The model has no mixture of experts, so there is no use of experts to report.")
    return routed


def _router(layer: ExpertLinear) -> Router:
    return cast(Router, layer.gate)


def _layer_usage(
    layer: ExpertLinear, tokens: list[int], entropy: float | None, groups: dict[str, list[int]]
) -> LayerUsage:
    shares = _normalized(tokens)
    dead = [expert for expert, share in enumerate(shares) if any(tokens) and share < DEAD_SHARE / len(tokens)]
    return LayerUsage(layer.layer, list(tokens), shares, entropy, _distances(layer), dead, groups)


@torch.no_grad()
def _distances(layer: ExpertLinear) -> dict[str, float]:
    weights = [cast(torch.Tensor, expert.weight).float() for expert in layer.experts]
    norms = [weight.norm() for weight in weights]
    return {
        f"{a}-{b}": float((weights[a] - weights[b]).norm() * 2 / (norms[a] + norms[b]).clamp(min=1e-12))
        for a, b in combinations(range(len(weights)), 2)
    }


def _normalized(tokens: Sequence[int]) -> list[float]:
    total = sum(tokens)
    return [count / total if total else 0.0 for count in tokens]


def _shares_text(tokens: Sequence[int]) -> str:
    return "  ".join(f"{share:6.1%}" for share in _normalized(tokens))
