"""Where each encoder family keeps the projections of its feed-forward layers: one small entry a family."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn


@dataclass(frozen=True)
class FeedForwardPaths:
    """Where one layer's projections are, as attribute paths inside the layer.

    Args:
        intermediate: The up projection; for a gated feed-forward also the gate projection, in the order in which
            the layer calls them. A projection that computes both at once (ModernBERT's ``Wi``) is one entry.
        output: The down projection.
    """

    intermediate: tuple[str, ...]
    output: str


@dataclass(frozen=True)
class Architecture:
    """Where an encoder's layers are, and the feed-forward layouts that its layers may have."""

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
    """Say where the projections of another encoder family are.

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
