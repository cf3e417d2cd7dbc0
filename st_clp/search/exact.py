"""Exact top-k over a stream of shards, by the model's own similarity function.

Memory is that of one shard and of the best k so far, independent of the corpus's size. On a Ray cluster each worker
searches some of the shards, with the same result.
"""

from __future__ import annotations

import numpy as np
import torch
from sentence_transformers import SentenceTransformer
from tqdm.auto import tqdm

from st_clp.encoding import EmbeddingStore
from st_clp.encoding.store import SHARD_ROWS
from st_clp.options import ClusterOptions
from st_clp.search.top_k import is_inner_product, merge, prepare, top_k


def search(
    model: SentenceTransformer,
    query_embeddings: np.ndarray,
    store: EmbeddingStore,
    k: int,
    *,
    cluster: ClusterOptions | None = None,
) -> tuple[np.ndarray, list[list[str]]]:
    """Find the k best documents of every query.

    Args:
        model: Says which similarity function is used (``model.similarity_fn_name``, cosine by default).
        query_embeddings: (number of queries, dim), float32.
        store: The documents' embeddings, of the same model.
        k: How many documents; fewer come back where the corpus is smaller.
        cluster: Search on the Ray cluster that these name, if they name one and the store lies in a folder.

    Returns:
        Scores, (number of queries, min(k, documents)), best first, and the document ids in the same order. Of
        documents with the same score, the one that comes first in the corpus is first.

    Raises:
        ValueError: k is below 1, the widths differ, or an embedding is not finite.
    """
    scores, rows = search_rows(model, query_embeddings, store, k, cluster=cluster)
    return scores, [[store.ids[row] for row in found] for found in rows]


def search_rows(
    model: SentenceTransformer,
    query_embeddings: np.ndarray,
    store: EmbeddingStore,
    k: int,
    *,
    show_progress_bar: bool = False,
    cluster: ClusterOptions | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """As :func:`search`, but with row numbers in the store (int64, the shape of the scores) in place of ids."""
    require_fitting(query_embeddings, store, k)
    queries = prepare(model, query_embeddings, "queries")
    with tqdm(total=len(store), desc="Searching", unit=" documents", disable=not show_progress_bar) as progress:
        # One shard is searched sooner than it is sent for.
        if cluster is not None and cluster.ray is not None and store.path is not None and len(store) > SHARD_ROWS:
            from st_clp.search.ray_search import search_on_cluster

            return search_on_cluster(model, queries, store, k, cluster, progress)
        best_scores = np.zeros((len(queries), 0), dtype=np.float32)
        best_rows = np.zeros((len(queries), 0), dtype=np.int64)
        begin = 0
        for embeddings in store.blocks():
            scores, rows = top_k(model, queries, prepare(model, embeddings, "documents"), min(k, len(embeddings)))
            best_scores, best_rows = merge(best_scores, best_rows, scores, rows + begin, k)
            begin += len(embeddings)
            progress.update(len(embeddings))
    return best_scores, best_rows


def require_fitting(query_embeddings: np.ndarray, store: EmbeddingStore, k: int) -> None:
    """Check the arguments of a search.

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
