"""Texts to embeddings by the model's own pipeline, prompts and Router routes included, in bounded memory."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sequence

import numpy as np
from sentence_transformers import SentenceTransformer

CHUNK_SIZE = 1024  # texts sorted by length together; what is held in memory at once


def encode_queries(
    model: SentenceTransformer, texts: Sequence[str], *, batch_size: int = 32, show_progress_bar: bool = False
) -> np.ndarray:
    """Encode queries with ``model.encode_query``.

    Returns:
        float32 embeddings, (number of texts, dim), in the order of the texts.
    """
    if not texts:
        return np.zeros((0, embedding_dimension(model)), dtype=np.float32)
    return np.asarray(
        model.encode_query(list(texts), batch_size=batch_size, show_progress_bar=show_progress_bar), dtype=np.float32
    )


def encode_documents(
    model: SentenceTransformer, texts: Iterable[str], *, batch_size: int = 32, chunk_size: int = CHUNK_SIZE
) -> Iterator[np.ndarray]:
    """Encode a stream of documents with ``model.encode_document``, a chunk at a time.

    Args:
        model: Any SentenceTransformer.
        texts: The documents' texts; read as they are needed.
        batch_size: Texts in one forward pass.
        chunk_size: Texts that are read, sorted by length and encoded together.

    Yields:
        float32 embeddings, (at most ``chunk_size``, dim), in the order of the texts.
    """
    iterator = iter(texts)
    while chunk := list(itertools.islice(iterator, chunk_size)):
        yield np.asarray(model.encode_document(chunk, batch_size=batch_size, show_progress_bar=False), dtype=np.float32)


def embedding_dimension(model: SentenceTransformer) -> int:
    """The width of the model's embeddings, after ``truncate_dim``."""
    dimension = model.get_embedding_dimension()
    return int(dimension) if dimension else int(np.asarray(model.encode_document(["a"])).shape[1])
