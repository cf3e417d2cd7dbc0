"""Exact search: equal to a full sort by the model's own similarity, for every similarity function and shard size."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sentence_transformers import SentenceTransformer

from st_clp.encoding import EmbeddingStore
from st_clp.search import pair_scores, search, top_k
from st_clp.search.top_k import merge


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    function=st.sampled_from(["cosine", "dot", "euclidean", "manhattan"]),
    documents=st.integers(1, 40),
    queries=st.integers(1, 6),
    k=st.integers(1, 50),
    rows=st.integers(1, 45),
    seed=st.integers(0, 1000),
)
def test_search_equals_a_full_sort(
    tiny_model: SentenceTransformer, function: str, documents: int, queries: int, k: int, rows: int, seed: int
) -> None:
    tiny_model.similarity_fn_name = function
    generator = np.random.default_rng(seed)
    matrix = generator.normal(size=(documents, 8)).astype(np.float32)
    asked = generator.normal(size=(queries, 8)).astype(np.float32)
    store = EmbeddingStore([f"d{i}" for i in range(documents)], matrix)
    whole = store.blocks
    store.blocks = lambda: whole(rows)  # type: ignore[method-assign]
    scores, ids = search(tiny_model, asked, store, k)
    expected = tiny_model.similarity(torch.from_numpy(asked), torch.from_numpy(matrix)).numpy()
    kept = min(k, documents)
    assert scores.shape == (queries, kept)
    order = np.argsort(-expected, axis=1, kind="stable")[:, :kept]
    np.testing.assert_allclose(scores, np.take_along_axis(expected, order, axis=1), atol=1e-4)
    for row in range(queries):
        found = [int(doc_id[1:]) for doc_id in ids[row]]
        assert len(set(found)) == kept
        np.testing.assert_allclose(expected[row, found], scores[row], atol=1e-4)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    function=st.sampled_from(["dot", "manhattan"]),
    documents=st.integers(1, 300),
    kinds=st.integers(1, 30),
    queries=st.integers(1, 30),
    k=st.integers(1, 150),
    rows=st.integers(1, 310),
    seed=st.integers(0, 1000),
)
def test_with_copies_and_ties_it_is_the_stable_sort_to_the_last_place(
    tiny_model: SentenceTransformer,
    function: str,
    documents: int,
    kinds: int,
    queries: int,
    k: int,
    rows: int,
    seed: int,
) -> None:
    """Small whole numbers, whose products and sums are exact: equal scores are equal whoever computes them."""
    tiny_model.similarity_fn_name = function
    generator = np.random.default_rng(seed)
    different = generator.integers(-3, 4, size=(kinds, 6)).astype(np.float32)
    matrix = different[generator.integers(0, kinds, documents)]
    asked = generator.integers(-3, 4, size=(queries, 6)).astype(np.float32)
    store = EmbeddingStore([f"d{i}" for i in range(documents)], matrix)
    whole = store.blocks
    store.blocks = lambda: whole(rows)  # type: ignore[method-assign]
    scores, ids = search(tiny_model, asked, store, k)
    expected = tiny_model.similarity(torch.from_numpy(asked), torch.from_numpy(matrix)).numpy()
    order = np.argsort(-expected, axis=1, kind="stable")[:, :k]
    assert ids == [[f"d{i}" for i in row] for row in order]
    np.testing.assert_array_equal(scores, np.take_along_axis(expected, order, axis=1))


@pytest.mark.parametrize("function", ["cosine", "dot", "euclidean", "manhattan"])
def test_pair_scores_are_on_the_scale_of_search(tiny_model: SentenceTransformer, function: str) -> None:
    tiny_model.similarity_fn_name = function
    generator = np.random.default_rng(0)
    queries, documents = generator.normal(size=(2, 5, 8)).astype(np.float32)
    expected = np.diag(tiny_model.similarity(torch.from_numpy(queries), torch.from_numpy(documents)).numpy())
    np.testing.assert_allclose(pair_scores(tiny_model, queries, documents), expected, atol=1e-5)


def test_equal_scores_keep_corpus_order_across_shards(tiny_model: SentenceTransformer) -> None:
    store = EmbeddingStore([f"d{i}" for i in range(6)], np.ones((6, 4), dtype=np.float32))
    whole = store.blocks
    store.blocks = lambda: whole(2)  # type: ignore[method-assign]
    _, ids = search(tiny_model, np.ones((1, 4), dtype=np.float32), store, 6)
    assert ids[0] == [f"d{i}" for i in range(6)]


def test_misuse_is_refused(tiny_model: SentenceTransformer) -> None:
    store = EmbeddingStore(["a", "b"], np.ones((2, 4), dtype=np.float32))
    query = np.ones((1, 4), dtype=np.float32)
    with pytest.raises(ValueError, match="k must be at least 1, got 0"):
        search(tiny_model, query, store, 0)
    with pytest.raises(ValueError, match=r"shape \(1, 3\) do not fit documents of 4 dimensions"):
        search(tiny_model, query[:, :3], store, 1)
    with pytest.raises(ValueError, match="queries row 0 is not finite"):
        search(tiny_model, query * np.nan, store, 1)
    with pytest.raises(ValueError, match="documents row 1 is not finite"):
        search(tiny_model, query, EmbeddingStore(["a", "b"], np.array([[1, 1, 1, 1], [np.inf, 0, 0, 0]])), 1)


def test_blocks_of_queries_are_joined_in_order(
    tiny_model: SentenceTransformer, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny_model.similarity_fn_name = "euclidean"
    monkeypatch.setattr(top_k, "QUERY_BLOCK", 3)
    matrix = np.random.default_rng(0).normal(size=(20, 8)).astype(np.float32)
    _, ids = search(tiny_model, matrix, EmbeddingStore([f"d{i}" for i in range(20)], matrix), 1)
    assert [found[0] for found in ids] == [f"d{i}" for i in range(20)]


@given(
    st.lists(st.lists(st.integers(0, 4), min_size=1, max_size=6), min_size=1, max_size=6),
    st.integers(1, 5),
    st.randoms(),
)
def test_lists_merged_in_any_order_give_the_best_of_all(
    shards: list[list[int]], k: int, generator: random.Random
) -> None:
    """Of equal scores, of which there are many, those first that come first in the corpus."""
    scores = np.array([score for shard in shards for score in shard], np.float32)
    expected = np.lexsort((np.arange(len(scores)), -scores))[:k]
    lists, begin = [], 0
    for shard in shards:
        own = np.arange(begin, begin + len(shard))
        own = own[np.lexsort((own, -scores[own]))][:k]
        lists.append((scores[own][None], own[None]))
        begin += len(shard)
    generator.shuffle(lists)
    best = np.zeros((1, 0), np.float32), np.zeros((1, 0), np.int64)
    for found in lists:
        best = merge(*best, *found, k)
    assert best[1][0].tolist() == expected.tolist()
    assert best[0][0].tolist() == scores[expected].tolist()
