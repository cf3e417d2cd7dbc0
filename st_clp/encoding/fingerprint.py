"""A fingerprint of everything that an embedding depends on beside the text."""

from __future__ import annotations

import hashlib
import json
from typing import Any

import torch
from sentence_transformers import SentenceTransformer


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
        "max_seq_length": model.max_seq_length,
        "truncate_dim": model.truncate_dim,
        "prompts": model.prompts,
        "default_prompt_name": model.default_prompt_name,
        "tokenizer": _tokenizer_settings(model.tokenizer),
    }


def _tokenizer_settings(tokenizer: Any) -> Any:
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return str(tokenizer)
    settings = json.loads(backend.to_str())
    # Every call sets these two to what it needs; they say nothing about the tokenizer.
    return {key: value for key, value in settings.items() if key not in ("truncation", "padding")}
