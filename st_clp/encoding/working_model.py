"""A model prepared for encoding: in the precision that is fastest on the hardware, with its prompts and routes."""

from __future__ import annotations

import copy
import hashlib
import json
import logging
import platform
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, Literal

import numpy as np
import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.base.modules import Module
from sentence_transformers.sentence_transformer.modules import Router, Transformer
from sentence_transformers.util import batch_to_device, truncate_embeddings
from transformers import PreTrainedModel

from st_clp.encoding.attention import known_padding, use_known_padding
from st_clp.encoding.batches import Features
from st_clp.encoding.packing import pack_linear_layers, use_batched_products
from st_clp.encoding.token_lists import TokenLists
from st_clp.options import ComputeDtype

logger = logging.getLogger(__name__)

Task = Literal["query", "document"]

# The names that sentence-transformers looks for when it encodes queries or documents.
PROMPT_NAMES: dict[str, tuple[str, ...]] = {"query": ("query",), "document": ("document", "passage", "corpus")}


class WorkingModel:
    """A model for one task: tokenises and embeds; a model that is not a plain text encoder encodes by its own method.

    Args:
        model: The model. It is put into evaluation mode, as its own ``encode`` does, and not changed otherwise.
        task: Whether its texts are queries or documents.
        dtype: The precision to compute in.

    Attributes:
        by_tokens: Whether the model can be run by tokens; otherwise use :meth:`encode_whole`.
    """

    def __init__(self, model: SentenceTransformer, task: Task, dtype: ComputeDtype) -> None:
        model.eval()
        self._model = model
        self._task = task
        self._prompt = _prompt(model, task)
        self.device = model.device
        self.by_tokens = _is_text_encoder(model)
        if not self.by_tokens:
            logger.warning("this model is not a plain text encoder: it encodes by its own encode method, more slowly")
        narrow = self.by_tokens and resolve_dtype(model, dtype) == "bfloat16"
        self._runs = _in_bfloat16(model) if narrow else model

    @property
    def bytes_per_token(self) -> int:
        """Bytes a token of the widest input or output of a linear layer."""
        layers = [module for module in self._runs.modules() if isinstance(module, torch.nn.Linear)]
        widest = (max(m.in_features, m.out_features) * m.weight.element_size() for m in layers)
        return max(widest, default=1)

    def preprocess(self, texts: list[str]) -> Features:
        """Tokenise texts."""
        return self._model.preprocess(texts, prompt=self._prompt, task=self._task)

    def token_lists(self, texts: list[str]) -> TokenLists | None:
        """A tokeniser into lists that agrees with :meth:`preprocess` on these texts; or None."""
        return TokenLists.of(self._model, self.preprocess, self._task, self._prompt, texts)

    def forward(self, features: Features, *, padded: bool = True) -> Embedded:
        """The embeddings of one batch, float32, (texts, dim); a GPU may still be computing them.

        Args:
            features: Those of the batch.
            padded: Whether any text is shorter than the longest.
        """
        with known_padding(padded):
            output = self._runs(self._on_device(features), task=self._task)
        embeddings = output["sentence_embedding"]
        if self._model.truncate_dim is not None:
            embeddings = truncate_embeddings(embeddings, self._model.truncate_dim)
        return Embedded(embeddings.float())

    def _on_device(self, features: Features) -> Features:
        features = dict(features)
        if self.device.type == "cuda":
            # Copies to and from pinned memory do not wait for what the GPU was given before.
            features = {
                name: value.pin_memory().to(self.device, non_blocking=True)
                if isinstance(value, torch.Tensor)
                else value
                for name, value in features.items()
            }
        return batch_to_device(features, self.device)

    def free_memory(self) -> None:
        """Empty the device allocator's cache, after a batch that was too large."""
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def encode_whole(self, texts: list[str], batch_size: int) -> np.ndarray:
        """The embeddings of texts by the model's own method."""
        method = self._model.encode_query if self._task == "query" else self._model.encode_document
        return np.asarray(method(texts, batch_size=batch_size, show_progress_bar=False), dtype=np.float32)


class Embedded:
    """The embeddings of a batch that are being copied from the device.

    Args:
        embeddings: float32, (texts, dim), on any device.
    """

    def __init__(self, embeddings: torch.Tensor) -> None:
        self._done: torch.cuda.Event | None = None
        if embeddings.device.type == "cuda":
            self._here = torch.empty(embeddings.shape, dtype=embeddings.dtype, pin_memory=True)
            self._here.copy_(embeddings, non_blocking=True)
            self._done = torch.cuda.Event()
            self._done.record(torch.cuda.current_stream(embeddings.device))
        else:
            self._here = embeddings.cpu()

    def wait(self) -> np.ndarray:
        """Wait for the embeddings and return them."""
        if self._done is not None:
            self._done.synchronize()
        return self._here.numpy()


def resolve_dtype(model: SentenceTransformer, dtype: ComputeDtype) -> Literal["model", "bfloat16"]:
    """Resolve ``dtype`` for this model on its device."""
    if dtype == "auto":
        floats = next((p.dtype for p in model.parameters() if p.is_floating_point()), None)
        return "bfloat16" if floats == torch.float32 and hardware_has_bf16(model.device) else "model"
    return dtype


def computed_precision(model: SentenceTransformer, dtype: ComputeDtype) -> str:
    """The precision of the model's transformer with this ``dtype``, by PyTorch's name, such as ``"float32"``."""
    if _is_text_encoder(model) and resolve_dtype(model, dtype) == "bfloat16":
        return "bfloat16"
    floats = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)
    return str(floats).removeprefix("torch.")


def hardware_has_bf16(device: torch.device) -> bool:
    """Whether the device multiplies bfloat16 matrices in hardware."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return device.type == "cpu" and bool(_capabilities().get("avx512_bf16") or _capabilities().get("amx_bf16"))


def kernels(device: str | torch.device) -> str:
    """A description of what encodes on a device with ``dtype="auto"``, for a report."""
    where = torch.device(device)
    if not hardware_has_bf16(where):
        return "float32 by PyTorch"
    if where.type == "cpu":
        own = "" if _capabilities().get("amx_bf16") else ", attention by batched products"
        return f"bfloat16 with packed weights{own}"
    return "bfloat16 by PyTorch"


def _capabilities() -> Mapping[str, Any]:
    """What the processor has, by PyTorch's names."""
    known = platform.machine().lower() in ("x86_64", "amd64") and hasattr(torch.cpu, "get_capabilities")
    return torch.cpu.get_capabilities() if known else {}


def _prompt(model: SentenceTransformer, task: Task) -> str | None:
    for name in PROMPT_NAMES[task]:
        if name in model.prompts:
            return model.prompts[name]
    return model.prompts.get(model.default_prompt_name) if model.default_prompt_name is not None else None


def _is_text_encoder(model: SentenceTransformer) -> bool:
    """Whether this is a plain text encoder (tokens with an attention mask, in PyTorch) with the usual ``encode``."""
    own = ("encode", "encode_query", "encode_document")
    if any(getattr(type(model), name) is not getattr(SentenceTransformer, name) for name in own):
        return False
    first = model[0]
    inputs = [next(iter(r.children())) for r in first.sub_modules.values()] if isinstance(first, Router) else [first]
    if not all(isinstance(module, Transformer) and module.backend == "torch" for module in inputs):
        return False
    return not any(module.can_flatten_inputs for module in inputs)


def _in_bfloat16(model: SentenceTransformer) -> SentenceTransformer:
    """A copy whose transformers compute in bfloat16 and return float32."""
    working = copy_modules(model)
    for module in working.modules():
        if isinstance(module, Transformer):
            module.bfloat16()
            # Not by a hook: hooks are numbered anew in each process, so a hook of a model sent from another process may
            # have the number that a new one would get.
            module.forward = partial(_in_float32, module.forward)
            if model.device.type != "cpu":
                use_known_padding(module.model)
            if model.device.type == "cpu" and not _capabilities().get("amx_bf16"):
                use_batched_products(module.model)
            if model.device.type == "cpu" and hardware_has_bf16(model.device):
                pack_linear_layers(module.model)
    return working.eval()


def copy_modules(model: SentenceTransformer) -> SentenceTransformer:
    """A copy that may be changed."""
    # Neither tokenizers, which are only read, nor the model card, which holds the trainer and its data, should be
    # copied.
    shared: list[Any] = [model.model_card_data]
    shared += [module.processor for module in model.modules() if isinstance(module, Transformer)]
    return copy.deepcopy(model, memo={id(item): item for item in shared})


def _in_float32(forward: Callable[..., Features], *arguments: Any, **named: Any) -> Features:
    """Call a transformer's ``forward`` and convert its results to float32."""
    return {
        name: value.float() if isinstance(value, torch.Tensor) and value.dtype == torch.bfloat16 else value
        for name, value in forward(*arguments, **named).items()
    }


# Configuration keys that do not affect embeddings: origin and versions.
NO_MATTER = ("_name_or_path", "transformers_version", "architectures", "gradient_checkpointing", "dtype", "torch_dtype")


def model_fingerprint(model: SentenceTransformer) -> str:
    """A hash (32 hexadecimal digits) that changes when the model's embeddings may change.

    Covers the weights (values, dtype and names), the architecture of the pipeline, the tokenizer, prompts,
    maximum length and ``truncate_dim``. The model's name does not count: a fine-tuned model is another one.
    """
    digest = hashlib.blake2b(digest_size=16)
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name}:{tensor.dtype}:{tuple(tensor.shape)}".encode())
        digest.update(memoryview(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy()))
    digest.update(json.dumps(_settings(model), sort_keys=True, default=str).encode())
    return digest.hexdigest()


def _settings(model: SentenceTransformer) -> dict[str, Any]:
    return {
        "modules": str(model),
        "settings": [_module_settings(module) for module in model.modules()],
        "max_seq_length": model.max_seq_length,
        "truncate_dim": model.truncate_dim,
        "prompts": model.prompts,
        "default_prompt_name": model.default_prompt_name,
        # The routes of a Router have a tokenizer each.
        "tokenizers": [_tokenizer_settings(m.tokenizer) for m in model.modules() if _has_tokenizer(m)],
    }


def _has_tokenizer(module: torch.nn.Module) -> bool:
    return isinstance(module, Module) and getattr(module, "tokenizer", None) is not None


def _module_settings(module: torch.nn.Module) -> dict[str, Any]:
    """A module's settings besides its weights: heads, activations, pooling."""
    if isinstance(module, PreTrainedModel):
        config = module.config.to_dict()
        return {name: value for name, value in config.items() if name not in NO_MATTER}
    return module.get_config_dict() if isinstance(module, Module) else {}


def _tokenizer_settings(tokenizer: Any) -> Any:
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return str(tokenizer)
    settings = json.loads(backend.to_str())
    # These two are set anew by every call, so they do not describe the tokenizer.
    return {key: value for key, value in settings.items() if key not in ("truncation", "padding")}
