"""Search a store on a Ray cluster: each worker searches some shards, and their best k are merged.

Each worker holds one shard, the queries, and its best k. The process that asked holds the queries, the best k so far,
and those of the workers that have just finished; which come first does not matter, as equal scores are ordered by row.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.util import SimilarityFunction
from tqdm.auto import tqdm

from st_clp.distributed import Workers
from st_clp.encoding import EmbeddingStore
from st_clp.encoding.store import SHARD_ROWS
from st_clp.options import ClusterOptions
from st_clp.search.top_k import merge, prepare, top_k

QUERIES_TOGETHER = 16_384  # whose best documents a worker holds
PIECES_A_WORKER = 4  # so that a slow one holds up the others little

Best = tuple[np.ndarray, np.ndarray]


def search_on_cluster(
    model: SentenceTransformer,
    queries: np.ndarray,
    store: EmbeddingStore,
    k: int,
    cluster: ClusterOptions,
    progress: tqdm,
) -> Best:
    """(scores, rows) as :func:`st_clp.search.search_rows` has them.

    Args:
        model: Says which similarity function is used.
        queries: Prepared, (queries, dim).
        store: In a folder that all machines of the cluster share.
        k: How many documents.
        cluster: The cluster.
        progress: A bar over the store's documents.
    """
    assert store.path is not None
    found = []
    for begin in range(0, len(queries), QUERIES_TOGETHER):
        block = queries[begin : begin + QUERIES_TOGETHER]
        place = store.path if isinstance(store.path, str) else str(store.path.absolute())
        what = (str(model.similarity_fn_name), block, place, k, cluster.cpus_per_worker)
        best = _none(len(block))
        progress.reset()
        with Workers(cluster, ShardSearcher, *what) as workers:
            for (first, last), more in workers.run(_pieces(len(store), cluster)):
                best = merge(*best, more[0], more[1], k)
                progress.update(last - first)
        found.append(best)
    return np.concatenate([best[0] for best in found]), np.concatenate([best[1] for best in found])


def _none(queries: int) -> Best:
    return np.zeros((queries, 0), np.float32), np.zeros((queries, 0), np.int64)


def _pieces(documents: int, cluster: ClusterOptions) -> Iterator[tuple[int, int]]:
    """(first row, last row and one) of runs of whole shards."""
    shards = -(-documents // SHARD_ROWS)
    wanted = PIECES_A_WORKER * (cluster.workers or 16)
    rows = max(1, shards // wanted) * SHARD_ROWS
    for begin in range(0, documents, rows):
        yield begin, min(begin + rows, documents)


class ShardSearcher:
    """Searches shards in a worker.

    Args:
        similarity: The name of the similarity function.
        queries: Prepared, (queries, dim).
        folder: The store's.
        k: How many documents.
        threads: Of a processor.
    """

    def __init__(self, similarity: str, queries: np.ndarray, folder: str, k: int, threads: int) -> None:
        self._like = _Similarity(similarity)
        if self._like.device.type == "cpu":
            torch.set_num_threads(threads)
        # Ray's arrays are read-only views of its memory.
        self._queries, self._k = queries, k
        self._store = EmbeddingStore.open(folder)

    def __call__(self, begin: int, end: int) -> Best:
        """The best of the rows from ``begin`` to ``end``."""
        best = _none(len(self._queries))
        for embeddings in self._store.blocks(SHARD_ROWS, begin, end):
            documents = prepare(self._like, embeddings, "documents")
            scores, rows = top_k(self._like, self._queries, documents, min(self._k, len(embeddings)))
            best = merge(*best, scores, rows + begin, self._k)
            begin += len(embeddings)
        return best


class _Similarity:
    """The part of a model that a search needs, without the model."""

    def __init__(self, name: str) -> None:
        self.similarity_fn_name = name
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.similarity = SimilarityFunction.to_similarity_fn(name)
        self.similarity_pairwise = SimilarityFunction.to_similarity_pairwise_fn(name)
