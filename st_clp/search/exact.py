"""Exact top-k over a stream of shards, by the model's own similarity function.

The memory is that of one shard and of the best k so far, whatever the size of the corpus. Cosine and dot product go
through FAISS's brute-force search, the fastest of its kind on a CPU; other functions through the model's own.
"""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any

import numpy as np
import torch
from sentence_transformers import SentenceTransformer
from tqdm.auto import tqdm

from st_clp.encoding import EmbeddingStore

QUERY_BLOCK = 256
TIED_BLOCK = 64  # queries with equal scores, whose scores to all of a shard are held at once


def search(
    model: SentenceTransformer, query_embeddings: np.ndarray, store: EmbeddingStore, k: int
) -> tuple[np.ndarray, list[list[str]]]:
    """The k best documents of every query.

    Args:
        model: Says which similarity function is used (``model.similarity_fn_name``, cosine by default).
        query_embeddings: (number of queries, dim), float32.
        store: The documents' embeddings, of the same model.
        k: How many documents; fewer come back where the corpus is smaller.

    Returns:
        Scores, (number of queries, min(k, documents)), best first, and the document ids in the same order. Of
        documents with the same score, the one that comes first in the corpus is first.

    Raises:
        ValueError: k is below 1, the widths differ, or an embedding is not finite.
    """
    scores, rows = search_rows(model, query_embeddings, store, k)
    return scores, [[store.ids[row] for row in found] for found in rows]


def search_rows(
    model: SentenceTransformer,
    query_embeddings: np.ndarray,
    store: EmbeddingStore,
    k: int,
    *,
    show_progress_bar: bool = False,
) -> tuple[np.ndarray, np.ndarray]:
    """As :func:`search`, but in place of ids the documents' places in the store, int64, of the scores' shape."""
    require_fitting(query_embeddings, store, k)
    queries = prepare(model, query_embeddings, "queries")
    best_scores = np.zeros((len(queries), 0), dtype=np.float32)
    best_rows = np.zeros((len(queries), 0), dtype=np.int64)
    begin = 0
    with tqdm(total=len(store), desc="Searching", unit=" documents", disable=not show_progress_bar) as progress:
        for embeddings in store.blocks():
            scores, rows = _top_k(model, queries, prepare(model, embeddings, "documents"), min(k, len(embeddings)))
            best_scores, best_rows = _merge(best_scores, best_rows, scores, rows + begin, k)
            begin += len(embeddings)
            progress.update(len(embeddings))
    return best_scores, best_rows


def require_fitting(query_embeddings: np.ndarray, store: EmbeddingStore, k: int) -> None:
    """Refuse a search that cannot be meant.

    Raises:
        ValueError: k is below 1, or the widths differ.
    """
    if k < 1:
        raise ValueError(f"k must be at least 1, got {k}")
    if query_embeddings.ndim != 2 or query_embeddings.shape[1] != store.dim:
        raise ValueError(
            f"query embeddings of shape {query_embeddings.shape} do not fit documents of {store.dim} dimensions"
        )


def pair_scores(model: SentenceTransformer, queries: np.ndarray, documents: np.ndarray) -> np.ndarray:
    """The similarity of each query to the document in the same row, by the model's own function.

    Args:
        model: Says which similarity function is used.
        queries: (rows, dim).
        documents: (rows, dim).

    Returns:
        (rows,), on the same scale as the scores of :func:`search`.
    """
    prepared = prepare(model, queries, "queries"), prepare(model, documents, "documents")
    if is_inner_product(model):
        return np.einsum("nd,nd->n", *prepared)
    return model.similarity_pairwise(*(torch.from_numpy(array) for array in prepared)).numpy()


def is_inner_product(model: SentenceTransformer) -> bool:
    """Whether the model's similarity is the inner product of what :func:`prepare` returns."""
    return str(model.similarity_fn_name) in ("cosine", "dot")


def prepare(model: SentenceTransformer, embeddings: np.ndarray, what: str) -> np.ndarray:
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


def _top_k(
    model: SentenceTransformer, queries: np.ndarray, documents: np.ndarray, k: int
) -> tuple[np.ndarray, np.ndarray]:
    """The k best documents of every query; where more are as good as the last of them, the first of these."""
    scores, rows = _some_top_k(model, queries, documents, min(k + 1, len(documents)))
    if k < len(documents):
        # Of equal scores a search returns any, and one look further shows where that matters.
        tied = np.flatnonzero(scores[:, k - 1] == scores[:, k])
        scores, rows = np.ascontiguousarray(scores[:, :k]), np.ascontiguousarray(rows[:, :k])
        for begin in range(0, len(tied), TIED_BLOCK):
            block = tied[begin : begin + TIED_BLOCK]
            every = _all_scores(model, queries[block], documents)
            best = np.argsort(-every, axis=1, kind="stable")[:, :k]
            scores[block], rows[block] = np.take_along_axis(every, best, axis=1), best
    return scores, rows


def _some_top_k(
    model: SentenceTransformer, queries: np.ndarray, documents: np.ndarray, k: int
) -> tuple[np.ndarray, np.ndarray]:
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


def _all_scores(model: SentenceTransformer, queries: np.ndarray, documents: np.ndarray) -> np.ndarray:
    """(queries, documents)."""
    if is_inner_product(model):
        return queries @ documents.T
    return model.similarity(torch.from_numpy(queries), torch.from_numpy(documents)).cpu().numpy()


def import_faiss() -> Any:
    """The module ``faiss``.

    Raises:
        ModuleNotFoundError: It is not installed; the message says how to.
    """
    try:
        import faiss
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError("searching needs FAISS: pip install faiss-cpu") from error
    return faiss


def _merge(
    scores: np.ndarray, rows: np.ndarray, new_scores: np.ndarray, new_rows: np.ndarray, k: int
) -> tuple[np.ndarray, np.ndarray]:
    """The best k of two candidate lists for each query, equal scores by corpus order."""
    scores, rows = np.concatenate([scores, new_scores], axis=1), np.concatenate([rows, new_rows], axis=1)
    # Both lists are in order, which a stable sort makes use of; it keeps the earlier list's rows first.
    order = np.argsort(-scores, axis=1, kind="stable")
    scores, rows = np.take_along_axis(scores, order, axis=1), np.take_along_axis(rows, order, axis=1)
    # Within a list equal scores may come in any order.
    tied = np.flatnonzero((np.diff(scores, axis=1) == 0).any(axis=1))
    again = np.lexsort((rows[tied], -scores[tied]), axis=1)
    scores[tied], rows[tied] = (np.take_along_axis(part[tied], again, axis=1) for part in (scores, rows))
    return scores[:, :k], rows[:, :k]
