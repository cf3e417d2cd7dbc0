"""The best k of a block of documents for every query, and the merging of such lists.

Cosine and dot product go through FAISS's brute-force search, the fastest of its kind on a CPU; other functions through
the model's own.
"""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any, Protocol

import numpy as np
import torch

from st_clp.extras import import_package

QUERY_BLOCK = 256
TIED_BLOCK = 64  # queries with equal scores, whose scores to all of a shard are held at once


class Similar(Protocol):
    """The attributes of a SentenceTransformer that a search uses."""

    @property
    def similarity_fn_name(self) -> Any: ...
    @property
    def device(self) -> torch.device: ...
    @property
    def similarity(self) -> Any: ...
    @property
    def similarity_pairwise(self) -> Any: ...


def is_inner_product(model: Similar) -> bool:
    """Whether the model's similarity is the inner product of what :func:`prepare` returns."""
    return str(model.similarity_fn_name) in ("cosine", "dot")


def prepare(model: Similar, embeddings: np.ndarray, what: str) -> np.ndarray:
    """float32, contiguous, of unit length where the similarity is cosine."""
    embeddings = np.ascontiguousarray(embeddings, dtype=np.float32)
    # A length is finite where all of a row is, and one pass gives both.
    lengths = np.sqrt(np.einsum("nd,nd->n", embeddings, embeddings))
    if not np.isfinite(lengths).all() and not np.isfinite(embeddings).all():
        row = int(np.flatnonzero(~np.isfinite(embeddings).all(axis=1))[0])
        raise ValueError(f"the embedding of {what} row {row} is not finite (NaN or infinite): the model is broken")
    if str(model.similarity_fn_name) == "cosine":
        embeddings = embeddings * (1 / np.maximum(lengths, 1e-12))[:, None]
    return embeddings


def top_k(model: Similar, queries: np.ndarray, documents: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """The k best documents of every query; of equal scores the documents that come first."""
    scores, rows = _some_top_k(model, queries, documents, min(k + 1, len(documents)))
    if k < len(documents):
        # Of equal scores FAISS returns any; asking for one more shows where that matters.
        tied = np.flatnonzero(scores[:, k - 1] == scores[:, k])
        scores, rows = np.ascontiguousarray(scores[:, :k]), np.ascontiguousarray(rows[:, :k])
        for begin in range(0, len(tied), TIED_BLOCK):
            block = tied[begin : begin + TIED_BLOCK]
            every = _all_scores(model, queries[block], documents)
            best = np.argsort(-every, axis=1, kind="stable")[:, :k]
            scores[block], rows[block] = np.take_along_axis(every, best, axis=1), best
    return scores, rows


def _some_top_k(model: Similar, queries: np.ndarray, documents: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    if is_inner_product(model) and model.device.type == "cpu" and find_spec("faiss") is not None:
        faiss = import_faiss()
        return faiss.knn(queries, documents, k, metric=faiss.METRIC_INNER_PRODUCT)
    # Where the model is, which is the faster place. The whole score matrix would not fit; a block of queries against
    # one shard does.
    there = torch.from_numpy(documents).to(model.device)
    asked = (block.to(model.device) for block in torch.from_numpy(queries).split(QUERY_BLOCK))
    scores = (block @ there.T if is_inner_product(model) else model.similarity(block, there) for block in asked)
    blocks = [torch.topk(block, k, dim=1) for block in scores]
    return tuple(torch.cat(part).cpu().numpy() for part in zip(*blocks, strict=True))  # type: ignore[return-value]


def _all_scores(model: Similar, queries: np.ndarray, documents: np.ndarray) -> np.ndarray:
    """(queries, documents)."""
    if is_inner_product(model):
        return queries @ documents.T
    return model.similarity(torch.from_numpy(queries), torch.from_numpy(documents)).cpu().numpy()


def import_faiss() -> Any:
    """The module ``faiss``.

    Raises:
        ModuleNotFoundError: It is not installed; the message says how to.
    """
    return import_package("faiss", "searching", "faiss-cpu")


def merge(
    scores: np.ndarray, rows: np.ndarray, new_scores: np.ndarray, new_rows: np.ndarray, k: int
) -> tuple[np.ndarray, np.ndarray]:
    """The best k of two candidate lists for each query, best first as each list is, equal scores by corpus order."""
    if scores.shape[1] < k or not new_scores.shape[1]:
        return _merge(scores, rows, new_scores, new_rows, k)
    # After n lists, one more adds something for about k in n queries.
    some = np.flatnonzero(new_scores[:, 0] >= scores[:, -1])
    scores, rows = scores.copy(), rows.copy()
    scores[some], rows[some] = _merge(scores[some], rows[some], new_scores[some], new_rows[some], k)
    return scores, rows


def _merge(
    scores: np.ndarray, rows: np.ndarray, new_scores: np.ndarray, new_rows: np.ndarray, k: int
) -> tuple[np.ndarray, np.ndarray]:
    scores, rows = np.concatenate([scores, new_scores], axis=1), np.concatenate([rows, new_rows], axis=1)
    # Both lists are in order, which a stable sort makes use of; it keeps the earlier list's rows first.
    order = np.argsort(-scores, axis=1, kind="stable")
    scores, rows = np.take_along_axis(scores, order, axis=1), np.take_along_axis(rows, order, axis=1)
    # Within a list equal scores may come in any order.
    tied = np.flatnonzero((np.diff(scores, axis=1) == 0).any(axis=1))
    again = np.lexsort((rows[tied], -scores[tied]), axis=1)
    scores[tied], rows[tied] = (np.take_along_axis(part[tied], again, axis=1) for part in (scores, rows))
    return scores[:, :k], rows[:, :k]
