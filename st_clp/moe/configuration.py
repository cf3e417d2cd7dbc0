"""The settings of a mixture of experts, which are saved with the model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any, get_args

from st_clp.options import ExpertOptions, Projection

PROJECTIONS = get_args(Projection)
ROUTINGS = ("learned", "reference")
BALANCES = ("bias", "loss", "none")
CONFIG_KEY = "st_clp_moe"
"""The key of the encoder's ``config.json`` under which the settings are saved."""


@dataclass(frozen=True)
class MoESettings:
    """The settings of a mixture of experts.

    Args:
        num_experts: Experts in each converted layer, at least 1.
        num_experts_per_tok: Experts that work on each token, 1 to ``num_experts``.
        projection: ``"intermediate"`` (the up projection; the gate projection too where the feed-forward is
            gated), ``"output"`` (the down projection) or ``"feed_forward"`` (both, with one routing decision).
        layers: The indices of the converted layers, in ascending order.
        routing: ``"learned"`` or ``"reference"`` (a softmax over the selected logits and nothing else: with one
            expert per token its gradient is zero, so the router stays as it was drawn).
        balance: ``"bias"`` (a bias that is used for selecting only, adjusted by use), ``"loss"`` (the auxiliary
            load-balance loss, added in the backward pass) or ``"none"``.
        balance_rate: How far one optimizer step moves the bias, in standard deviations of the router's logits.
        balance_weight: The weight of the auxiliary loss where ``balance="loss"``.
        router_sample: The share of tokens, 0 to 1, whose other experts are tried in the backward pass to tell the
            router which one would have served better.
        only_train: What a reference checkpoint says was trained; kept so that it can be written again.

    Raises:
        ValueError: If a setting is out of its range; the message names it.
    """

    num_experts: int = 2  # as in the paper; whether there are any is asked elsewhere (ExpertOptions.experts)
    num_experts_per_tok: int = ExpertOptions.experts_per_token
    projection: str = ExpertOptions.projection
    layers: tuple[int, ...] = ()
    routing: str = "learned"
    balance: str = "bias"
    balance_rate: float = 0.2
    balance_weight: float = 0.01
    router_sample: float = 0.125
    only_train: str | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "layers", tuple(int(layer) for layer in self.layers))
        for name in ("num_experts", "num_experts_per_tok"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"{name} must be a whole number of at least 1, got {value!r}.")
        if self.num_experts_per_tok > self.num_experts:
            raise ValueError(
                f"num_experts_per_tok is {self.num_experts_per_tok}, but there are only {self.num_experts} experts "
                "(num_experts): a token cannot go to more experts than there are."
            )
        for name, choices in (("projection", PROJECTIONS), ("routing", ROUTINGS), ("balance", BALANCES)):
            if getattr(self, name) not in choices:
                raise ValueError(f"{name} must be one of {', '.join(choices)}; got {getattr(self, name)!r}.")
        if not 0 <= self.router_sample <= 1:
            raise ValueError(f"router_sample is a share of the tokens, 0 to 1; got {self.router_sample!r}.")
        for name in ("balance_rate", "balance_weight"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must not be negative; got {getattr(self, name)!r}.")

    @property
    def uses_bias(self) -> bool:
        """Whether a selection bias balances the experts."""
        return self.routing == "learned" and self.balance == "bias" and self.num_experts > 1

    @property
    def sample_stride(self) -> int:
        """One of so many tokens has its other experts tried; 0: none."""
        return round(1 / self.router_sample) if self.router_sample else 0

    def to_dict(self) -> dict[str, Any]:
        """Return the settings as they are written to ``config.json``."""
        return {**asdict(self), "layers": list(self.layers)}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> MoESettings:
        """Read the settings of a saved model; unknown names are refused, since they would change what it computes."""
        known = {field.name for field in fields(cls)}
        if unknown := sorted(set(values) - known):
            raise ValueError(
                f"The saved mixture of experts has settings that this version of st_clp does not know: "
                f"{', '.join(unknown)}. Update st-clp, or remove them from {CONFIG_KEY!r} in config.json."
            )
        return cls(**values)


def resolve_layers(layers: str | Sequence[int], count: int) -> tuple[int, ...]:
    """Turn ``"all"``, ``"every_other"`` or indices (negative ones count from the last) into ascending indices.

    Args:
        layers: ``"all"``; ``"every_other"``, which takes the second, the fourth and so on; or a list of indices.
        count: How many layers the encoder has.

    Raises:
        ValueError: If an index is not there, named twice, or none is left.
    """
    if isinstance(layers, str):
        if layers == "all":
            return tuple(range(count))
        if layers == "every_other":
            return tuple(range(1, count, 2)) or (0,)
        raise ValueError(f'layers must be "all", "every_other" or a list of layer indices; got {layers!r}.')
    wanted = list(layers)
    if not wanted:
        raise ValueError("layers is empty: name at least one layer to convert.")
    for layer in wanted:
        if isinstance(layer, bool) or not isinstance(layer, int) or not -count <= layer < count:
            raise ValueError(f"There is no layer {layer!r}: the encoder has {count} layers, 0 to {count - 1}.")
    resolved = sorted(layer % count for layer in wanted)
    if len(set(resolved)) < len(resolved):
        raise ValueError(f"layers names a layer twice: {wanted}.")
    return tuple(resolved)
