"""Dense projections -> experts, and back."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from st_clp.moe.architectures import FeedForward, Projection, find_feed_forwards
from st_clp.moe.configuration import CONFIG_KEY, MoESettings
from st_clp.moe.layers import Dispatch, ExpertLinear, SortedLinear

ROUTER_SCALE = 0.02
"""The standard deviation with which a router's weights are drawn."""


def build_experts(encoder: nn.Module, settings: MoESettings, seed: int | None = None) -> None:
    """Replace the projections that ``settings`` names, in place; each expert is a copy of the dense weights.

    Everything is checked before anything is changed. Works on the meta device too, where nothing is copied.

    Raises:
        ValueError: If the encoder cannot be converted; it is left as it was.
    """
    layers = find_feed_forwards(encoder)
    if too_high := [layer for layer in settings.layers if layer >= len(layers)]:
        raise ValueError(f"There is no layer {too_high[0]}: the encoder has {len(layers)} layers.")
    if getattr(getattr(encoder, "config", None), "chunk_size_feed_forward", 0):
        raise ValueError(
            "The encoder runs its feed-forwards in chunks (chunk_size_feed_forward); a mixture of experts does not "
            "support that. Set it to 0 in the encoder's config and load the model again."
        )
    wanted = [layers[layer] for layer in settings.layers]
    for feed_forward in wanted:
        for projection in (*feed_forward.intermediate, feed_forward.output):
            _check_dense(projection)
    generator = None if seed is None else torch.Generator().manual_seed(seed)
    for feed_forward in wanted:
        _convert_layer(feed_forward, settings, generator)


def _check_dense(projection: Projection) -> None:
    module = projection.module
    if isinstance(module, ExpertLinear | SortedLinear):
        raise ValueError(f"{projection.path} is a mixture of experts already: a model is converted once.")
    if type(module) is not nn.Linear:
        raise ValueError(
            f"{projection.path} is a {type(module).__name__} and not a plain linear layer. Convert the model before "
            "it is quantized or given adapters."
        )


def _convert_layer(feed_forward: FeedForward, settings: MoESettings, generator: torch.Generator | None) -> None:
    dispatch, down = Dispatch(), feed_forward.output
    if settings.projection == "output":
        _put_experts(down, settings, feed_forward.layer, dispatch, generator, routes=True, sorts=True, restores=True)
        return
    # the weighted sum over a token's experts comes right after the projection, before the activation; with one
    # expert a token there is none, and the sorted rows go on
    restores = settings.projection == "intermediate" and settings.num_experts_per_tok > 1
    for index, up in enumerate(feed_forward.intermediate):
        _put_experts(
            up,
            settings,
            feed_forward.layer,
            dispatch,
            generator,
            routes=index == 0,
            sorts=True,
            restores=restores,
            last_sorted=index == len(feed_forward.intermediate) - 1,
        )
    if settings.projection == "feed_forward":
        _put_experts(down, settings, feed_forward.layer, dispatch, generator, routes=False, sorts=False, restores=True)
    elif not restores:
        assert isinstance(down.module, nn.Linear)
        down.replace(SortedLinear(down.module, feed_forward.layer, dispatch))
        dispatch.sorted_down = (down.parent, down.name)


def _put_experts(
    projection: Projection,
    settings: MoESettings,
    layer: int,
    dispatch: Dispatch,
    generator: torch.Generator | None,
    **role: bool,
) -> None:
    dense = projection.module
    assert isinstance(dense, nn.Linear)
    factory: dict[str, Any] = {"device": dense.weight.device, "dtype": dense.weight.dtype}
    with torch.device("meta"):  # the weights come from the dense layer: draw none, and leave the generator alone
        module = ExpertLinear(
            dense.in_features, dense.out_features, dense.bias is not None, settings, layer, dispatch, **role
        )
    module.to_empty(device=factory["device"]).to(factory["dtype"]).train(dense.training)
    for expert in module.experts:
        _copy(dense, expert)
    if module.gate is not None and not dense.weight.is_meta:
        module.gate.draw(ROUTER_SCALE, generator)
        for buffer in module.gate.buffers():
            buffer.zero_()
    projection.replace(module)


def _copy(source: nn.Module, target: nn.Module) -> None:
    with torch.no_grad():
        for name, parameter in target.named_parameters():
            dense = source.get_parameter(name)
            if not dense.is_meta:
                parameter.copy_(dense)
            parameter.requires_grad_(dense.requires_grad)


def merge_experts(encoder: nn.Module, how: str | int) -> None:
    """Put one dense layer in the place of every mixture in ``encoder``: an expert, or the mean of all of a layer."""
    for feed_forward in find_feed_forwards(encoder):
        for projection in (*feed_forward.intermediate, feed_forward.output):
            module = projection.module
            if isinstance(module, ExpertLinear | SortedLinear):
                projection.replace(_merged(module, how))


def _merged(module: ExpertLinear | SortedLinear, how: str | int) -> nn.Linear:
    with torch.device("meta"):
        dense = nn.Linear(module.in_features, module.out_features, module.bias is not None)
    sources = [module] if isinstance(module, SortedLinear) else list(module.experts)
    if isinstance(how, int) and len(sources) > 1:
        sources = [sources[how]]
    for name in ("weight", "bias"):
        values = [getattr(source, name).detach() for source in sources if getattr(source, name) is not None]
        if values:
            mean = torch.stack([value.double() for value in values]).mean(0).to(values[0].dtype)
            setattr(dense, name, nn.Parameter(mean, requires_grad=getattr(sources[0], name).requires_grad))
    return dense.train(module.training)


def expert_layers(module: nn.Module) -> list[ExpertLinear]:
    """Return every mixture projection inside ``module``, in the order of its layers."""
    return [inner for inner in module.modules() if isinstance(inner, ExpertLinear)]


def settings_of(encoder: nn.Module) -> MoESettings | None:
    """Return the settings that an encoder's config carries; None for a dense encoder."""
    values = getattr(getattr(encoder, "config", None), CONFIG_KEY, None)
    return None if values is None else MoESettings.from_dict(values)
