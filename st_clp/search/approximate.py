"""Approximate search by a FAISS index, with its recall measured against exact search."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Any

import numpy as np
from sentence_transformers import SentenceTransformer
from tqdm.auto import tqdm

from st_clp.encoding import EmbeddingStore
from st_clp.search.exact import require_fitting, search_rows
from st_clp.search.top_k import import_faiss, is_inner_product, prepare

logger = logging.getLogger(__name__)

TRAINING_VECTORS_PER_CENTROID = 64  # FAISS itself warns below 39 and makes no use of more than 256


@dataclass(frozen=True)
class ApproximateResult:
    """The result of an approximate search.

    Attributes:
        scores: (number of queries, k), best first; -inf where the index found fewer than k.
        rows: The documents' places in the store, of the same shape; -1 in those places.
        recall: The share of the exact top k that it found, over ``recall_queries`` of the queries.
        recall_queries: The number of queries that the recall was measured on.
    """

    scores: np.ndarray
    rows: np.ndarray
    recall: float
    recall_queries: int


class ApproximateIndex:
    """A FAISS index over a store's embeddings.

    Its memory depends on the kind: ``IVF4096,PQ64`` takes 64 bytes a document, ``IVF4096,Flat`` and ``HNSW32`` hold all
    embeddings as float32. Exact search over a store is the better choice up to some hundred thousand documents.

    Args:
        model: Says which similarity function is used; cosine or dot product.
        store: The documents' embeddings.
        factory: What FAISS's ``index_factory`` understands: ``"IVF4096,PQ64"``, ``"HNSW32"``, ``"SQfp16"`` …
        nprobe: How many lists an IVF index scans for a query (for HNSW, ``efSearch``). None: one in 16 lists, and at
            least 16; for HNSW FAISS's default.
        training_documents: How many documents, drawn at random, the index learns its lists and codes from. None:
            64 for each list, and at least 16,384.
        seed: Of that draw.
        show_progress_bar: Show progress while the documents are added.

    Raises:
        ValueError: The similarity is neither cosine nor dot product, FAISS does not know the factory, or the
            store holds too few documents for it.
    """

    def __init__(
        self,
        model: SentenceTransformer,
        store: EmbeddingStore,
        factory: str,
        *,
        nprobe: int | None = None,
        training_documents: int | None = None,
        seed: int = 0,
        show_progress_bar: bool = True,
    ) -> None:
        require_index(model, factory, store.dim)
        if nprobe is not None and nprobe < 1:
            raise ValueError(f"nprobe must be at least 1, got {nprobe}")
        self._faiss = import_faiss()
        self._model = model
        self._store = store
        self._factory = factory
        self._index = _make(factory, store.dim)
        self._train(training_documents, seed)
        with tqdm(
            total=len(store), desc=f"Indexing ({factory})", unit=" documents", disable=not show_progress_bar
        ) as progress:
            for embeddings in store.blocks():
                self._index.add(prepare(model, embeddings, "documents"))
                progress.update(len(embeddings))
        self._look_through(nprobe)

    def search(self, query_embeddings: np.ndarray, k: int, *, recall_queries: int = 100) -> ApproximateResult:
        """Search the k best documents of every query, and measure the recall against exact search.

        Args:
            query_embeddings: (number of queries, dim), float32.
            k: How many documents; fewer where the store holds fewer.
            recall_queries: Measure the recall on so many queries, spread evenly.

        Raises:
            ValueError: k is below 1, the widths differ, or an embedding is not finite.
        """
        require_fitting(query_embeddings, self._store, k)
        k = min(k, len(self._store))
        scores, rows = self._index.search(prepare(self._model, query_embeddings, "queries"), k)
        scores = np.where(rows < 0, -np.inf, scores)
        sample = np.unique(
            np.linspace(0, len(query_embeddings) - 1, min(max(1, recall_queries), len(query_embeddings)), dtype=int)
        )
        _, exact = search_rows(self._model, query_embeddings[sample], self._store, k)
        hits = [len(np.intersect1d(found, true)) for found, true in zip(rows[sample], exact, strict=True)]
        recall = float(np.sum(hits)) / exact.size if exact.size else 1.0
        return ApproximateResult(scores, rows, recall, len(sample))

    def _train(self, documents: int | None, seed: int) -> None:
        if self._index.is_trained:
            return
        lists = self._lists()
        if lists > len(self._store):
            raise ValueError(
                f"{self._factory} has {lists} lists, and the store holds {len(self._store)} documents; "
                f"take about {max(1, int(4 * len(self._store) ** 0.5))} lists, or search exactly (index=None)"
            )
        wanted = documents or max(16_384, TRAINING_VECTORS_PER_CENTROID * lists)
        chosen = np.random.default_rng(seed).permutation(len(self._store))[:wanted]
        try:
            self._index.train(prepare(self._model, self._store.rows(np.sort(chosen)), "documents"))
        except RuntimeError as error:
            raise ValueError(
                f"{self._factory} cannot learn from {len(chosen)} documents: {str(error).splitlines()[-1]}"
            ) from error

    def _lists(self) -> int:
        try:
            return int(self._faiss.extract_index_ivf(self._index).nlist)
        except RuntimeError:
            return 1

    def _look_through(self, nprobe: int | None) -> None:
        # Not every kind of index has both parameters; FAISS reports that by an error.
        lists = self._lists()
        values = {"nprobe": nprobe or min(lists, max(16, lists // 16))}
        if nprobe is not None:
            values["efSearch"] = nprobe
        for name, value in values.items():
            try:
                self._faiss.ParameterSpace().set_index_parameter(self._index, name, value)
            except RuntimeError:
                logger.debug("%s has no %s", self._factory, name)


def require_index(model: SentenceTransformer, factory: str, dim: int | None = None) -> None:
    """Check that an index can be made for this model's embeddings.

    Args:
        model: Says which similarity function is used.
        factory: As in :class:`ApproximateIndex`.
        dim: The width of the embeddings. None: what the model says, if it does.

    Raises:
        ValueError: The similarity is neither cosine nor dot product, or FAISS does not know the factory.
    """
    if not is_inner_product(model):
        raise ValueError(
            f"a FAISS index ranks by cosine or dot product, and this model by {model.similarity_fn_name}; "
            "search exactly (index=None)"
        )
    width = dim or model.get_embedding_dimension()
    if width:
        _make(factory, width)


def _make(factory: str, dim: int) -> Any:
    faiss = import_faiss()
    try:
        return faiss.index_factory(dim, factory, faiss.METRIC_INNER_PRODUCT)
    except RuntimeError as error:
        raise ValueError(
            f"FAISS cannot make an index {factory!r} for {dim} dimensions: {str(error).splitlines()[-1]}"
        ) from error
