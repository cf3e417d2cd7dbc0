"""Find feed-forward layers, replace them by experts, and make them dense again."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from st_clp.moe.configuration import CONFIG_KEY, MoESettings
from st_clp.moe.layers import Dispatch, ExpertLinear, SortedLinear


@dataclass(frozen=True)
class FeedForwardPaths:
    """The attribute paths of one layer's projections.

    Args:
        intermediate: The up projection; for a gated feed-forward also the gate projection, in the order in which
            the layer calls them. A projection that computes both at once (ModernBERT's ``Wi``) is one entry.
        output: The down projection.
    """

    intermediate: tuple[str, ...]
    output: str


@dataclass(frozen=True)
class Architecture:
    """The path of an encoder's layers, and the possible layouts of their feed-forwards."""

    layers: tuple[str, ...]
    feed_forwards: tuple[FeedForwardPaths, ...]


@dataclass(frozen=True)
class Projection:
    """One linear projection of an encoder: its path, the module that holds it and its name there."""

    path: str
    parent: nn.Module
    name: str

    @property
    def module(self) -> nn.Module:
        return getattr(self.parent, self.name)

    def replace(self, module: nn.Module) -> None:
        setattr(self.parent, self.name, module)


@dataclass(frozen=True)
class FeedForward:
    """The projections of one layer's feed-forward."""

    layer: int
    intermediate: tuple[Projection, ...]
    output: Projection


_BERT = Architecture(("encoder.layer",), (FeedForwardPaths(("intermediate.dense",), "output.dense"),))
_T5 = Architecture(
    ("encoder.block",),
    (
        FeedForwardPaths(("layer.1.DenseReluDense.wi",), "layer.1.DenseReluDense.wo"),
        FeedForwardPaths(("layer.1.DenseReluDense.wi_0", "layer.1.DenseReluDense.wi_1"), "layer.1.DenseReluDense.wo"),
    ),
)
_GATED = Architecture(
    ("layers", "encoder.layers"), (FeedForwardPaths(("mlp.gate_proj", "mlp.up_proj"), "mlp.down_proj"),)
)

_ARCHITECTURES: dict[str, Architecture] = {
    **dict.fromkeys(
        ("bert", "roberta", "xlm-roberta", "xlm-roberta-xl", "camembert", "electra", "ernie", "mpnet", "data2vec-text"),
        _BERT,
    ),
    "distilbert": Architecture(("transformer.layer",), (FeedForwardPaths(("ffn.lin1",), "ffn.lin2"),)),
    "modernbert": Architecture(("layers",), (FeedForwardPaths(("mlp.Wi",), "mlp.Wo"),)),
    **dict.fromkeys(("t5", "mt5", "umt5"), _T5),
    **dict.fromkeys(("nomic_bert", "gte", "eurobert", "gemma3_text", "qwen3"), _GATED),
}


def known_architectures() -> list[str]:
    """Return the ``model_type`` names whose projections are known, in alphabetical order."""
    return sorted(_ARCHITECTURES)


def register_architecture(model_type: str, layers: str, intermediate: str | Sequence[str], output: str) -> None:
    """Register the projections of another encoder family.

    Args:
        model_type: The ``model_type`` of the family's ``config.json``.
        layers: The path of the list of layers inside the encoder, such as ``"encoder.layer"``.
        intermediate: The path of the up projection inside a layer; for a gated feed-forward with two projections
            both paths, in the order in which the layer calls them.
        output: The path of the down projection inside a layer.

    Example::

        register_architecture("my-encoder", "blocks", ["mlp.gate", "mlp.up"], "mlp.down")
    """
    paths = (intermediate,) if isinstance(intermediate, str) else tuple(intermediate)
    _ARCHITECTURES[model_type] = Architecture((layers,), (FeedForwardPaths(paths, output),))


def find_feed_forwards(encoder: nn.Module) -> list[FeedForward]:
    """Find the feed-forward projections of every layer of ``encoder``, a transformers model.

    Raises:
        ValueError: If the architecture is not known, or a layer is not laid out as its entry says.
    """
    model_type = getattr(getattr(encoder, "config", None), "model_type", None)
    architecture = _ARCHITECTURES.get(str(model_type))
    if architecture is None:
        raise ValueError(
            f"The architecture {model_type!r} is not known. Known are: {', '.join(known_architectures())}. "
            "Another one can be added with st_clp.moe.register_architecture, which says where its projections are."
        )
    found = next(((path, blocks) for path in architecture.layers if (blocks := _get(encoder, path)) is not None), None)
    if found is None:
        raise ValueError(f"A {model_type} encoder should have its layers at {' or '.join(architecture.layers)}.")
    path, blocks = found
    return [_in_layer(architecture, index, block, f"{path}.{index}") for index, block in enumerate(blocks)]


def _in_layer(architecture: Architecture, index: int, block: nn.Module, path: str) -> FeedForward:
    for paths in architecture.feed_forwards:
        projections = [_projection(block, path, inner) for inner in (*paths.intermediate, paths.output)]
        if all(projection is not None for projection in projections):
            *intermediate, output = [projection for projection in projections if projection is not None]
            return FeedForward(index, tuple(intermediate), output)
    wanted = " or ".join(", ".join((*paths.intermediate, paths.output)) for paths in architecture.feed_forwards)
    raise ValueError(f"Layer {index} ({path}) has no projections at {wanted}.")


def _projection(block: nn.Module, block_path: str, inner: str) -> Projection | None:
    parent_path, _, name = inner.rpartition(".")
    parent = _get(block, parent_path) if parent_path else block
    if parent is None or not hasattr(parent, name):
        return None
    return Projection(f"{block_path}.{inner}", parent, name)


def _get(module: nn.Module, path: str) -> Any:
    current: Any = module
    for name in path.split("."):
        current = current[int(name)] if name.isdigit() else getattr(current, name, None)
        if current is None:
            return None
    return current


ROUTER_SCALE = 0.02
"""The standard deviation with which a router's weights are drawn."""


def build_experts(encoder: nn.Module, settings: MoESettings, seed: int | None = None) -> None:
    """Replace the projections that ``settings`` names, in place; each expert is a copy of the dense weights.

    Everything is checked before anything is changed. On the meta device nothing is copied.

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
        module.gate.balance.calibrated = False
        module.gate.balance.prepare(dense.in_features, dense.weight.device)
    projection.replace(module)


def _copy(source: nn.Module, target: nn.Module) -> None:
    with torch.no_grad():
        for name, parameter in target.named_parameters():
            dense = source.get_parameter(name)
            if not dense.is_meta:
                parameter.copy_(dense)
            parameter.requires_grad_(dense.requires_grad)


def merge_experts(encoder: nn.Module, how: str | int) -> None:
    """Replace every mixture in ``encoder`` by a dense layer: one expert, or the mean of the layer's experts."""
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
