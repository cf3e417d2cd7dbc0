"""Approximate search: what it finds, how well, and what it cannot do."""

from __future__ import annotations

import numpy as np
import pytest
from sentence_transformers import SentenceTransformer

from st_clp.encoding import EmbeddingStore
from st_clp.search import ApproximateIndex, search_rows

DIM = 16


def clustered(number: int, seed: int) -> np.ndarray:
    centres = np.random.default_rng(0).normal(size=(20, DIM))
    generator = np.random.default_rng(seed)
    return (centres[generator.integers(0, 20, number)] + 0.3 * generator.normal(size=(number, DIM))).astype(np.float32)


def make_store(number: int = 3000) -> EmbeddingStore:
    store = EmbeddingStore([f"d{i}" for i in range(number)], clustered(number, 1))
    whole = store.blocks
    store.blocks = lambda: whole(700)  # type: ignore[method-assign]  # several shards
    return store


@pytest.mark.parametrize(
    ("factory", "function"),
    [
        ("IVF32,Flat", "cosine"),
        ("IVF32,Flat", "dot"),
        ("HNSW16", "dot"),
        ("IVF32,PQ16x4", "cosine"),
        ("Flat", "cosine"),
    ],
)
def test_recall_is_the_share_of_the_true_best(tiny_model: SentenceTransformer, factory: str, function: str) -> None:
    tiny_model.similarity_fn_name = function
    store, queries = make_store(), clustered(40, 2)
    found = ApproximateIndex(tiny_model, store, factory, show_progress_bar=False).search(queries, 10, recall_queries=40)
    _, exact = search_rows(tiny_model, queries, store, 10)
    hits = sum(len(set(a) & set(b)) for a, b in zip(found.rows.tolist(), exact.tolist(), strict=True))
    assert found.recall == pytest.approx(hits / exact.size)
    assert found.recall_queries == 40
    assert found.recall == 1.0 if factory == "Flat" else found.recall > 0.4
    assert (np.diff(found.scores, axis=1) <= 1e-6).all()


def test_looking_through_more_lists_finds_more(tiny_model: SentenceTransformer) -> None:
    store, queries = make_store(), clustered(40, 2)

    def recall(nprobe: int) -> float:
        index = ApproximateIndex(tiny_model, store, "IVF64,Flat", nprobe=nprobe, show_progress_bar=False)
        return index.search(queries, 50).recall

    assert recall(1) < recall(8) <= recall(64) == 1.0


def test_places_for_which_nothing_is_found_are_marked(tiny_model: SentenceTransformer) -> None:
    index = ApproximateIndex(tiny_model, make_store(), "IVF64,Flat", nprobe=1, show_progress_bar=False)
    found = index.search(clustered(5, 2), 1000)
    assert (found.rows == -1).any()
    assert np.isneginf(found.scores[found.rows == -1]).all()
    assert np.isfinite(found.scores[found.rows >= 0]).all()
    assert found.recall < 0.5


def test_k_beyond_the_store_and_misuse(tiny_model: SentenceTransformer) -> None:
    store, queries = make_store(50), clustered(3, 2)
    assert ApproximateIndex(tiny_model, store, "Flat", show_progress_bar=False).search(queries, 80).rows.shape == (
        3,
        50,
    )
    with pytest.raises(ValueError, match="FAISS cannot make an index 'IVF,Flut' for 16 dimensions"):
        ApproximateIndex(tiny_model, store, "IVF,Flut", show_progress_bar=False)
    with pytest.raises(ValueError, match="has 64 lists, and the store holds 50 documents; take about 28 lists"):
        ApproximateIndex(tiny_model, store, "IVF64,Flat", show_progress_bar=False)
    with pytest.raises(ValueError, match="nprobe must be at least 1, got 0"):
        ApproximateIndex(tiny_model, store, "IVF8,Flat", nprobe=0, show_progress_bar=False)
    with pytest.raises(ValueError, match="cannot learn from 50 documents"):
        ApproximateIndex(tiny_model, store, "PQ8", show_progress_bar=False)
    tiny_model.similarity_fn_name = "euclidean"
    with pytest.raises(ValueError, match="ranks by cosine or dot product, and this model by euclidean"):
        ApproximateIndex(tiny_model, store, "Flat", show_progress_bar=False)
