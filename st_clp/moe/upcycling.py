"""A whole model: dense -> mixture, and mixture -> dense."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

from sentence_transformers import SentenceTransformer
from sentence_transformers.base.modules import Router as ModelRouter
from sentence_transformers.base.modules import Transformer
from torch import nn

from st_clp.moe.card import forget_card
from st_clp.moe.configuration import MoESettings
from st_clp.moe.convert import expert_layers
from st_clp.moe.transformer import MoETransformer, is_moe


def upcycle(
    model: SentenceTransformer,
    num_experts: int = MoESettings.num_experts,
    num_experts_per_tok: int = MoESettings.num_experts_per_tok,
    projection: str = MoESettings.projection,
    layers: str | Sequence[int] = "all",
    **settings: Any,
) -> SentenceTransformer:
    """Turn a model into a mixture of experts, in place, and return it; its embeddings stay the same.

    Args:
        model: The model; its first module must be a Transformer, or a Router with Transformers in its routes.
        num_experts: Experts a layer.
        num_experts_per_tok: Experts that work on each token.
        projection: ``"intermediate"``, ``"output"`` or ``"feed_forward"``.
        layers: ``"all"``, ``"every_other"`` or a list of indices.
        **settings: Further ones of :meth:`MoETransformer.from_dense`.

    Raises:
        ValueError: If the model cannot be converted; it is left as it was.

    Example::

        model = upcycle(SentenceTransformer("BAAI/bge-m3"), num_experts=2)
        print(train_only(model, "moe"))
    """
    if is_moe(model):
        raise ValueError("The model is a mixture of experts already: a model is converted once.")
    places = transformer_places(model)
    converted: dict[int, MoETransformer] = {}
    for _, _, transformer in places:
        if id(transformer) not in converted:
            converted[id(transformer)] = MoETransformer.from_dense(
                transformer,
                num_experts,
                num_experts_per_tok,
                projection,
                layers,
                copy_encoder=len({id(place[2]) for place in places}) > 1,
                **settings,
            )
    for parent, name, transformer in places:
        setattr(parent, name, converted[id(transformer)])
    forget_card(model)  # the dense model's
    return model


def transformer_places(model: SentenceTransformer) -> list[tuple[nn.Module, str, Transformer]]:
    """Return where the model's Transformer modules are: the module that holds each, and its name there.

    Raises:
        ValueError: If the first module is neither a Transformer nor a Router that holds one.
    """
    if not isinstance(model, SentenceTransformer):
        raise ValueError(f"A SentenceTransformer is needed, got a {type(model).__name__}.")
    first_name = next(iter(model._modules), None)
    first = None if first_name is None else model._modules[first_name]
    if isinstance(first, Transformer) and first_name is not None:
        return [(model, first_name, first)]
    places: list[tuple[nn.Module, str, Transformer]] = []
    if isinstance(first, ModelRouter):
        for route in first.sub_modules.values():
            places += [(route, name, inner) for name, inner in route._modules.items() if isinstance(inner, Transformer)]
    if not places:
        raise ValueError(
            f"The model's first module is a {type(first).__name__}, and there is no Transformer in it: only a "
            "transformer encoder has feed-forward layers that can become a mixture of experts."
        )
    return places


def to_dense(model: SentenceTransformer, how: str | int = "average") -> SentenceTransformer:
    """Return a dense model made of a mixture, for places that cannot run one; ``model`` stays as it is.

    It is exact only where a layer's experts are equal; otherwise measure what is lost, and train it on if need be.

    Args:
        model: A model with a mixture of experts.
        how: ``"average"``, the mean of a layer's experts; or an expert's index, that one's weights in every layer.

    Raises:
        ValueError: If the model has no mixture of experts, or ``how`` names no expert.
    """
    if not is_moe(model):
        raise ValueError("The model has no mixture of experts, so there is nothing to make dense.")
    fewest = min(len(layer.experts) for layer in expert_layers(model))
    if how != "average" and (isinstance(how, bool) or not isinstance(how, int) or not 0 <= how < fewest):
        raise ValueError(f'how must be "average" or the index of an expert, 0 to {fewest - 1}; got {how!r}.')
    dense = copy.deepcopy(model)
    for parent, name, transformer in transformer_places(dense):
        if isinstance(transformer, MoETransformer):
            setattr(parent, name, transformer.to_dense(how))
    forget_card(dense)  # the mixture's
    return dense
