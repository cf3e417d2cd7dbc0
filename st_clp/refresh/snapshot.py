"""Snapshots of a model at one step: a copy in this process, or its trained weights on disk."""

from __future__ import annotations

import copy
import random
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from sentence_transformers import SentenceTransformer
from sentence_transformers.base.modules import Transformer
from torch import nn

from st_clp.files import whole_file


def detached_copy(model: SentenceTransformer) -> SentenceTransformer:
    """A copy to mine with, in evaluation mode, without side effects on the trained model.

    Training mode, a mixture's counts and the Trainer's mixed precision wrapper around ``forward`` are not affected.
    Frozen weights are shared, not copied.
    """
    return _copy(model, {id(p): p for p in model.parameters() if not p.requires_grad}).eval()


def skeleton(model: SentenceTransformer) -> SentenceTransformer:
    """A copy without weights that can be sent to another process; :func:`fill` gives it weights."""
    empty = {id(p): nn.Parameter(p.detach().to("meta"), requires_grad=False) for p in model.parameters()}
    copied = _copy(model, empty).eval()
    for module in copied.modules():
        for name, buffer in module.named_buffers(recurse=False):
            setattr(module, name, buffer.cpu())
    return copied


def _copy(model: SentenceTransformer, shared: dict[int, Any]) -> SentenceTransformer:
    # The card holds the data that are trained on; tokenizers are only read.
    card = type(model.model_card_data)()
    kept = [module.processor for module in model.modules() if isinstance(module, Transformer)]
    memo = {**shared, id(model.model_card_data): card, **{id(item): item for item in kept}}
    copied = copy.deepcopy(model, memo=memo)
    for module in copied.modules():
        # The Trainer's mixed precision sits on the instance, over the class's own method.
        for name in ("forward", "_original_forward"):
            module.__dict__.pop(name, None)
    return copied


def write_frozen(model: SentenceTransformer, path: Path) -> None:
    """Write the frozen weights."""
    trained = _trained_names(model)
    _write(path, {name: tensor for name, tensor in model.state_dict().items() if name not in trained})


def write_trained(model: SentenceTransformer, path: Path) -> None:
    """Write the trained weights, and the buffers, which change too."""
    trained = _trained_names(model)
    _write(path, {name: tensor for name, tensor in model.state_dict().items() if name in trained})


def fill(model: SentenceTransformer, *paths: Path) -> None:
    """Give a :func:`skeleton` the weights in these files.

    Raises:
        ValueError: A weight is missing.
    """
    for path in paths:
        model.load_state_dict(load_file(path), strict=False, assign=True)
    missing = [name for name, parameter in model.named_parameters() if parameter.is_meta]
    if missing:
        raise ValueError(f"the snapshot lacks {len(missing)} of the model's weights, {missing[0]} among them")


@contextmanager
def random_state_kept() -> Iterator[None]:
    """Restore the random state afterwards, so that random draws within the context do not affect training."""
    python, numpy = random.getstate(), np.random.get_state()
    devices = [torch.cuda.current_device()] if torch.cuda.is_available() and torch.cuda.is_initialized() else []
    with torch.random.fork_rng(devices=devices):
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(numpy)


def _trained_names(model: SentenceTransformer) -> set[str]:
    frozen = {name for name, parameter in model.named_parameters(remove_duplicate=False) if not parameter.requires_grad}
    return set(model.state_dict()) - frozen


def _write(path: Path, tensors: dict[str, torch.Tensor]) -> None:
    # Tied weights share their memory, which safetensors refuses; each name gets a copy.
    copies = {name: tensor.detach().cpu().clone().contiguous() for name, tensor in tensors.items()}
    with whole_file(path, "wb") as file:
        save_file(copies, file.name)
