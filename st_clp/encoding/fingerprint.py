"""A fingerprint of everything that an embedding depends on beside the text."""

from __future__ import annotations

import hashlib
import json
from typing import Any

import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.base.modules import Module
from transformers import PreTrainedModel

# Of a transformer's configuration: where it came from and who wrote it.
NO_MATTER = ("_name_or_path", "transformers_version", "architectures", "gradient_checkpointing", "dtype", "torch_dtype")


def model_fingerprint(model: SentenceTransformer) -> str:
    """32 hexadecimal digits that change when the model's embeddings may change.

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
    """What a module does beside its weights: heads, activations, pooling."""
    if isinstance(module, PreTrainedModel):
        config = module.config.to_dict()
        return {name: value for name, value in config.items() if name not in NO_MATTER}
    return module.get_config_dict() if isinstance(module, Module) else {}


def _tokenizer_settings(tokenizer: Any) -> Any:
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return str(tokenizer)
    settings = json.loads(backend.to_str())
    # Every call sets these two to what it needs; they say nothing about the tokenizer.
    return {key: value for key, value in settings.items() if key not in ("truncation", "padding")}
