"""Make a run's model and loss from its settings."""

from __future__ import annotations

import pickle
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from sentence_transformers import SentenceTransformer
from torch import nn
from transformers import set_seed
from transformers.modeling_layers import GradientCheckpointingLayer

from st_clp.losses import CachedCLPLoss, CLPLoss
from st_clp.moe import is_moe, load, train_only, upcycle
from st_clp.settings import RunSettings, SettingsError

if TYPE_CHECKING:
    from sentence_transformers import CrossEncoder

    from st_clp.moe import TrainableParameters

HALF = frozenset({torch.float16, torch.bfloat16})


def model_name(model: str) -> str:
    """A model's display name: its folder's name, with the parent's if that alone says nothing; or its Hub name."""
    if not model or not Path(model).is_dir():
        return model
    path = Path(model).resolve()
    says_nothing = path.name in ("model", "final", "best", "output") or path.name.startswith("checkpoint-")
    return f"{path.parent.name}/{path.name}" if says_nothing and path.parent.name else path.name


def load_base_model(name: str, *, max_seq_length: int | None = None) -> SentenceTransformer:
    """Load the model to fine-tune from a folder or the Hugging Face Hub.

    Raises:
        SettingsError: There is no such folder or model, or it cannot be loaded.
    """
    path = Path(name).expanduser()
    try:
        if (path / "modules.json").is_file():
            model = load(str(path))
        else:
            model = SentenceTransformer(str(path) if path.is_dir() else name)
        _require_tokenizers(model)
    except Exception as error:  # of whatever reads the files: transformers, safetensors, pickle
        raise SettingsError(f"the model {name!r} cannot be loaded: {_why_not_loaded(path, error)}") from error
    if max_seq_length is not None:
        model.max_seq_length = max_seq_length
    return model


def _require_tokenizers(model: SentenceTransformer) -> None:
    """Refuse a folder without tokenizer files: transformers would make an empty tokenizer.

    Raises:
        ValueError: None of the tokenizer's files is there.
    """
    for module in model.modules():
        tokenizer = getattr(module, "tokenizer", None)
        names = {"tokenizer.json", *getattr(tokenizer, "vocab_files_names", {}).values()}
        folder = Path(getattr(tokenizer, "name_or_path", ""))
        if len(names) > 1 and folder.is_dir() and not any((folder / name).is_file() for name in names):
            raise ValueError(f"there is no tokenizer in {folder}: none of {', '.join(sorted(names))}; put it there")


def _why_not_loaded(path: Path, error: Exception) -> str:
    reason = " ".join(str(error).split()) or type(error).__name__
    if not path.exists():
        return (
            f"there is no folder {path}, and the Hugging Face Hub did not give a model of that name ({reason}). "
            "Check the spelling, the network and, for a private model, `hf auth login`"
        )
    if path.is_dir() and not any((path / file).is_file() for file in ("modules.json", "config.json")):
        return "there is neither modules.json nor config.json in the folder, so it is no model's; name another one"
    if isinstance(error, pickle.UnpicklingError):
        return (
            "its weights are a pickle that is damaged or holds more than tensors, and could run code when it is "
            "opened; have them as model.safetensors"
        )
    known = isinstance(error, (OSError, ValueError, ImportError))
    return reason if known else f"{reason}; if its files are damaged or incomplete, download or save it again"


def load_cross_encoder(name: str | None) -> CrossEncoder | None:
    """Load a cross-encoder from a folder or the Hugging Face Hub; None if none is named.

    Raises:
        SettingsError: It cannot be found or loaded.
    """
    if name is None:
        return None
    from sentence_transformers import CrossEncoder

    try:
        return CrossEncoder(name)
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise SettingsError(f"the cross-encoder {name!r} cannot be loaded: {' '.join(str(error).split())}") from error


def prepare_model(model: SentenceTransformer, settings: RunSettings) -> TrainableParameters:
    """Prepare the model for training: add experts if the settings ask for them, and freeze what does not train.

    Weights in half precision become float32: they would round most updates away (:func:`stored_precision`).

    Raises:
        SettingsError: The model has no such part.
    """
    model.float()
    set_seed(settings.seed)  # the routers start at random
    if settings.dropout is not None:
        set_dropout(model, settings.dropout)
    if settings.experts and not is_moe(model):
        upcycle(
            model,
            num_experts=settings.experts,
            num_experts_per_tok=settings.experts_per_token,
            projection=settings.projection,
        )
    # A base may be a mixture already.
    what = "moe" if settings.train == "auto" and is_moe(model) else settings.what_trains
    try:
        return train_only(model, what)
    except ValueError as error:
        raise SettingsError(f"train={what}: {error} Or train the whole model: --train all") from error


@dataclass(frozen=True)
class StoredPrecision:
    """The precision of the weights of each of a model's modules, such as the encoder."""

    modules: tuple[torch.dtype | None, ...]

    def is_half(self) -> bool:
        """Whether any of them has less than float32."""
        return bool(HALF.intersection(self.modules))

    def __str__(self) -> str:
        return " and ".join(dict.fromkeys(str(kind).removeprefix("torch.") for kind in self.modules if kind in HALF))

    def restore(self, model: SentenceTransformer) -> None:
        """Round the weights to it, in place. Buffers, such as those of rotary embeddings, stay as they are."""
        for module, kind in zip(model, self.modules, strict=True):
            for parameter in module.parameters():
                if kind in HALF and parameter.is_floating_point():
                    parameter.data = parameter.data.to(kind)


def stored_precision(model: SentenceTransformer) -> StoredPrecision:
    """The precision of a model before :func:`prepare_model`."""
    first = (next(module.parameters(), None) for module in model)
    return StoredPrecision(tuple(None if parameter is None else parameter.dtype for parameter in first))


def set_dropout(model: nn.Module, share: float) -> None:
    """Set the dropout of all layers, for training; a saved model has what its configuration says.

    Raises:
        SettingsError: The model has no layers with dropout.
    """
    layers = [module for module in model.modules() if isinstance(module, nn.Dropout)]
    # Some encoders have no layer for that of attention, but a number.
    attentions: list[Any] = [
        module for module in model.modules() if isinstance(getattr(module, "attention_dropout", None), float)
    ]
    if share and not layers and not attentions:
        raise SettingsError("dropout: this model has no layers with dropout; leave it out")
    for layer in layers:
        layer.p = share
    for attention in attentions:
        attention.attention_dropout = share


@contextmanager
def compiled_layers(model: SentenceTransformer, backend: str = "inductor") -> Iterator[None]:
    """Compile the layers of the model's encoders within the context, once for texts of all lengths.

    Raises:
        SettingsError: The encoder's layers cannot be found.
    """
    layers = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
    if not layers:
        raise SettingsError(
            "compile_layers: the encoder of this model has no layers that transformers would name; leave it out"
        )
    for layer in layers:
        layer.compile(dynamic=True, backend=backend)
    try:
        yield
    finally:
        for layer in layers:
            layer._compiled_call_impl = None  # what PyTorch runs in place of the layer; it has no way to take it back


def make_loss(model: SentenceTransformer, settings: RunSettings) -> nn.Module:
    """CLPLoss with the settings; CachedCLPLoss if a mini-batch size is given."""
    options: dict[str, Any] = {
        "scale": settings.scale,
        "penalty_weight": settings.penalty_weight,
        "penalty": settings.penalty,
        "queries_per_negative": settings.queries_in_rows,
        "in_batch_negatives": settings.in_batch_negatives,
        "encode_once": settings.of_documents,
        # A trial runs in one process.
        "gather_across_devices": settings.train_workers is not None and torch.distributed.is_initialized(),
    }
    if settings.mini_batch_size is not None:
        return CachedCLPLoss(model, mini_batch_size=settings.mini_batch_size, **options)
    return CLPLoss(model, **options)


def column_kinds(columns: list[str], query: str | None, document: str | None) -> dict[str, str]:
    """Map each column to ``query`` or ``document``, by what it holds; columns without a value are left out."""
    kinds = {name: query if name == "anchor" or name.startswith("negative_query") else document for name in columns}
    return {name: kind for name, kind in kinds.items() if kind}
