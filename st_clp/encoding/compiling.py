"""Compiling a transformer for encoding, where that is asked for.

A run that was killed and gone on with must end in the very bytes of an undisturbed one, so nothing here may depend on
what was encoded before in the same process: what is compiled goes by a batch that is always the same, and one kernel
serves all shapes. Shapes for which PyTorch would compile another (one text, or one token) are left to the model as it
is.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from typing import Any

import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Transformer
from torch import Tensor

logger = logging.getLogger(__name__)

EXAMPLE = "one text that is as long as any other " * 100
EXAMPLES = 8


def compile_transformers(model: SentenceTransformer, run: Callable[[SentenceTransformer, list[str]], object]) -> bool:
    """Compile the transformers of a model of one's own, on the spot; whether that could be done.

    Args:
        model: Its transformers are given another ``forward``; as they are again when compiling fails.
        run: Encodes a batch of texts with a model.
    """
    logger.info("compiling the model; this takes up to a minute")
    transformers = [module.model for module in model.modules() if isinstance(module, Transformer)]
    for transformer in transformers:
        transformer.forward = by_shape(transformer.forward)
    try:
        run(model, [EXAMPLE] * EXAMPLES)
    except Exception as error:
        # A compiler that is missing, an operation that it does not know: what it raises has no common class.
        for transformer in transformers:
            del transformer.forward
        reason = str(error).strip().splitlines() or [type(error).__name__]
        logger.warning("this model cannot be compiled here, so it encodes without (%s)", reason[0])
        return False
    return True


def by_shape(plain: Callable[..., Any]) -> Callable[..., Any]:
    """The compiled forward for batches of several texts and tokens, the plain one for others."""

    def whole(**inputs: Any) -> Any:
        return plain(**inputs)

    # PyTorch counts the versions of a piece of code, gives up after a few and says nothing. Code of its own for each
    # model keeps a process that encodes with one model after the other below that count.
    whole.__code__ = whole.__code__.replace()
    compiled = torch.compile(whole, dynamic=True, fullgraph=True)

    @functools.wraps(plain)
    def forward(**inputs: Any) -> Any:
        shapes = [size for value in inputs.values() if isinstance(value, Tensor) for size in value.shape[:2]]
        return plain(**inputs) if 1 in shapes else compiled(**inputs)

    return forward
