"""Which parameters train."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn
from transformers import PreTrainedModel

from st_clp.moe.architectures import find_feed_forwards
from st_clp.moe.convert import expert_layers
from st_clp.moe.routing import Router

PARTS = ("moe", "intermediate", "output", "router", "all")


@dataclass(frozen=True)
class TrainableParameters:
    """How many of a model's parameters train.

    Args:
        what: The part that was chosen.
        trainable: Parameters that train.
        total: All parameters.
    """

    what: str
    trainable: int
    total: int

    def __str__(self) -> str:
        share = self.trainable / self.total if self.total else 0.0
        return f"{self.what}: {self.trainable:,} of {self.total:,} parameters train ({share:.1%})"


def train_only(model: nn.Module, what: str) -> TrainableParameters:
    """Let one part of ``model`` train and freeze the rest.

    Args:
        model: A model, dense or a mixture; with ``"all"`` any module.
        what: ``"moe"``, the routers and experts; ``"intermediate"``, the up projections of the feed-forward layers,
            dense ones and experts with their routers; ``"output"``, the same for the down projections; ``"router"``,
            the routers alone; ``"all"``.

    Returns:
        How many parameters train, of how many.

    Raises:
        ValueError: If ``what`` is unknown, or the model has no such part; nothing is frozen then.
    """
    if what not in PARTS:
        raise ValueError(f"what must be one of {', '.join(PARTS)}; got {what!r}.")
    chosen = {id(parameter) for module in _modules(model, what) for parameter in module.parameters()}
    for parameter in model.parameters():
        parameter.requires_grad_(id(parameter) in chosen)
    return TrainableParameters(
        what,
        sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad),
        sum(parameter.numel() for parameter in model.parameters()),
    )


def _modules(model: nn.Module, what: str) -> list[nn.Module]:
    if what == "all":
        return [model]
    if what in ("moe", "router"):
        found: list[nn.Module] = list(expert_layers(model))
        if what == "router":
            found = [module for module in model.modules() if isinstance(module, Router)]
        if not found:
            raise ValueError(
                f"The model has no mixture of experts, so there is no part {what!r} to train. Convert it first "
                '(st_clp.upcycle), or choose "intermediate", "output" or "all".'
            )
        return found
    encoders = [module for module in model.modules() if isinstance(module, PreTrainedModel)]
    inner = {id(module) for encoder in encoders for module in encoder.modules() if module is not encoder}
    outermost = [encoder for encoder in encoders if id(encoder) not in inner]
    if not outermost:
        raise ValueError(f"There is no transformer encoder in the model, so no {what} projections to train.")
    feed_forwards = [feed_forward for encoder in outermost for feed_forward in find_feed_forwards(encoder)]
    if what == "output":
        return [feed_forward.output.module for feed_forward in feed_forwards]
    return [projection.module for feed_forward in feed_forwards for projection in feed_forward.intermediate]
