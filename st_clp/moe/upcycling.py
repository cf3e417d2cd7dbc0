"""Whole models: convert to a mixture, choose what trains, convert back, and load saved ones."""

from __future__ import annotations

import copy
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sentence_transformers import SentenceTransformer
from sentence_transformers.base.modules import Router as ModelRouter
from sentence_transformers.base.modules import Transformer
from torch import nn
from transformers import PreTrainedModel

from st_clp.files import read_json
from st_clp.moe.configuration import MoESettings
from st_clp.moe.convert import expert_layers, find_feed_forwards
from st_clp.moe.routing import Router
from st_clp.moe.saving import forget_card
from st_clp.moe.transformer import MoETransformer, is_moe

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
    """Train one part of ``model`` and freeze the rest.

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
    chosen = {id(parameter) for module in _chosen_modules(model, what) for parameter in module.parameters()}
    for parameter in model.parameters():
        parameter.requires_grad_(id(parameter) in chosen)
    return TrainableParameters(
        what,
        sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad),
        sum(parameter.numel() for parameter in model.parameters()),
    )


def _chosen_modules(model: nn.Module, what: str) -> list[nn.Module]:
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


OWN_CLASSES: dict[str, type[nn.Module]] = {
    "st_clp.MoETransformer": MoETransformer,
    "st_clp.moe.MoETransformer": MoETransformer,  # as versions up to 0.2.0 wrote it
}
"""The module classes of st_clp that a saved model may name."""


def load(path: str | Path, device: str | None = None, **kwargs: Any) -> SentenceTransformer:
    """Open a saved model, trusting the classes of sentence-transformers and st_clp and no others.

    ``SentenceTransformer(path, trust_remote_code=True)`` opens it too, but that would also run any Python file that
    came with the folder; this never does.

    Args:
        path: The folder of a saved model.
        device: Where to put it; None chooses as SentenceTransformer does.
        **kwargs: Passed on to ``SentenceTransformer``; ``trust_remote_code`` is refused.

    Raises:
        ValueError: If the model names a class of another origin; the message names it.
        FileNotFoundError: If there is no saved model at ``path``.
    """
    folder = Path(path)
    if kwargs.pop("trust_remote_code", False):
        raise ValueError(
            "st_clp.load trusts st_clp's own classes only. To run a model's own code, having read it, use "
            "SentenceTransformer(path, trust_remote_code=True)."
        )
    if not (folder / "modules.json").is_file():
        raise FileNotFoundError(f"{folder} holds no saved model: there is no modules.json in it.")
    foreign = [reference for reference in _class_references(folder) if not _trusted(reference)]
    if foreign:
        raise ValueError(
            f"{folder} names the module class {', '.join(sorted(set(foreign)))}, which belongs neither to "
            "sentence-transformers nor to st_clp, so it was not loaded. If you know and trust it, open the model with "
            "SentenceTransformer(path, trust_remote_code=True)."
        )
    return SentenceTransformer._load_with_module_classes(str(folder), OWN_CLASSES, device=device, **kwargs)


def _trusted(reference: str) -> bool:
    return reference in OWN_CLASSES or reference.startswith("sentence_transformers.")


def _class_references(folder: Path) -> list[str]:
    """Return every module class that the folder names, those inside Router modules included."""
    file = folder / "modules.json"
    modules = _read(file)
    if not isinstance(modules, list) or not all(isinstance(module, dict) and "type" in module for module in modules):
        raise ValueError(f"{file} is not what a model has there: a list of modules, each with its type; save it again")
    references = [str(module["type"]) for module in modules]
    for config in folder.rglob("router_config.json"):
        types = read_json(config).get("types", {})
        references += [str(reference) for reference in types.values()] if isinstance(types, dict) else []
    return references


def _read(file: Path) -> Any:
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{file} is not valid JSON: {error}") from None


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
