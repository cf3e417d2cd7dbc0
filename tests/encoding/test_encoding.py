"""Encoding in a stream, the fingerprint, and the embedding store."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sentence_transformers import SentenceTransformer

from st_clp import Collection
from st_clp.encoding import EmbeddingStore, encode_documents, encode_queries, model_fingerprint

TEXTS = ["a big river", "the old lake of the north", "fire", "who was king?", "one two three four five six", "bird"]


def make_collection(number: int = 6, *, name: str = "c") -> Collection:
    documents = {f"d{i}": f"{TEXTS[i % len(TEXTS)]} {i}" for i in range(number)}
    return Collection.from_dict(documents, {"q": "which river"}, {"q": {"d0": 1}}, name=name)


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(order=st.permutations(range(12)), chunk_size=st.integers(1, 13), batch_size=st.integers(1, 5))
def test_a_stream_gives_the_models_own_embeddings_in_order(
    tiny_model: SentenceTransformer, order: list[int], chunk_size: int, batch_size: int
) -> None:
    texts = [" ".join(TEXTS[: 1 + i % 6]) + f" {i}" for i in order]
    chunks = list(encode_documents(tiny_model, iter(texts), batch_size=batch_size, chunk_size=chunk_size))
    assert max(map(len, chunks)) <= chunk_size
    np.testing.assert_allclose(np.concatenate(chunks), tiny_model.encode_document(texts), atol=1e-5)


def test_prompts_are_used(tiny_model: SentenceTransformer) -> None:
    tiny_model.prompts = {"query": "who was ", "document": "the book of "}
    np.testing.assert_allclose(
        encode_queries(tiny_model, ["king"]), tiny_model.encode(["who was king"], show_progress_bar=False), atol=1e-6
    )
    np.testing.assert_allclose(
        next(encode_documents(tiny_model, ["king"])), tiny_model.encode(["the book of king"]), atol=1e-6
    )


def test_no_queries_give_an_empty_array(tiny_model: SentenceTransformer) -> None:
    assert encode_queries(tiny_model, []).shape == (0, 32)


def test_fingerprint_changes_with_everything_an_embedding_depends_on(
    tiny_model: SentenceTransformer, make_tiny_model: Callable[..., SentenceTransformer]
) -> None:
    first = model_fingerprint(tiny_model)
    tiny_model.encode(TEXTS)  # using the tokenizer must not change it
    assert model_fingerprint(tiny_model) == first
    seen = {first, model_fingerprint(make_tiny_model(seed=1))}
    tiny_model.max_seq_length = 32
    seen.add(model_fingerprint(tiny_model))
    tiny_model.prompts = {"query": "x"}
    seen.add(model_fingerprint(tiny_model))
    tiny_model.truncate_dim = 16
    seen.add(model_fingerprint(tiny_model))
    with torch.no_grad():
        next(tiny_model.parameters())[0, 0] += 1
    seen.add(model_fingerprint(tiny_model))
    tiny_model.bfloat16()
    seen.add(model_fingerprint(tiny_model))
    assert len(seen) == 7


@pytest.mark.parametrize("in_memory", [False, True])
def test_store_holds_ids_and_embeddings_in_corpus_order(
    tiny_model: SentenceTransformer, tmp_path: Path, in_memory: bool
) -> None:
    collection = make_collection(10)
    path = None if in_memory else tmp_path / "store"
    store = EmbeddingStore.build(tiny_model, collection, path, batch_size=3, show_progress_bar=False)
    expected = tiny_model.encode_document([document.text for document in collection.documents()])
    assert store.ids == [f"d{i}" for i in range(10)]
    assert (len(store), store.dim) == (10, 32)
    shards = list(store.shards(rows=4))
    assert [ids for ids, _ in shards] == [["d0", "d1", "d2", "d3"], ["d4", "d5", "d6", "d7"], ["d8", "d9"]]
    np.testing.assert_allclose(np.concatenate([embeddings for _, embeddings in shards]), expected, atol=1e-5)
    np.testing.assert_allclose(store.rows([7, 2]), expected[[7, 2]], atol=1e-5)
    if path:
        np.testing.assert_array_equal(EmbeddingStore.open(path).rows(range(10)), store.rows(range(10)))


class CountingCollection:
    """Builds stores and counts the texts that the model was given."""

    def __init__(self, model: SentenceTransformer, monkeypatch: pytest.MonkeyPatch) -> None:
        self.encoded = 0
        original = model.encode_document

        def encode_document(texts: list[str], **options: object) -> np.ndarray:
            self.encoded += len(texts)
            return original(texts, **options)

        monkeypatch.setattr(model, "encode_document", encode_document)


def test_store_is_reused_only_for_the_same_model_and_corpus(
    tiny_model: SentenceTransformer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    counter = CountingCollection(tiny_model, monkeypatch)
    path = tmp_path / "store"

    def build(collection: Collection) -> int:
        before = counter.encoded
        EmbeddingStore.build(tiny_model, collection, path, show_progress_bar=False)
        return counter.encoded - before

    assert build(make_collection(6)) == 6
    assert build(make_collection(6)) == 0
    assert build(make_collection(6, name="other")) == 6
    assert build(make_collection(7, name="other")) == 7
    with torch.no_grad():
        next(tiny_model.parameters())[0, 0] += 1
    assert build(make_collection(7, name="other")) == 7
    assert build(make_collection(7, name="other")) == 0


def test_a_damaged_or_unfinished_store_is_made_again(
    tiny_model: SentenceTransformer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    counter = CountingCollection(tiny_model, monkeypatch)
    collection, path = make_collection(6), tmp_path / "store"
    EmbeddingStore.build(tiny_model, collection, path, show_progress_bar=False)

    def rebuilt() -> bool:
        before = counter.encoded
        store = EmbeddingStore.build(tiny_model, collection, path, show_progress_bar=False)
        assert len(store) == 6
        return counter.encoded > before

    whole = (path / "embeddings.npy").read_bytes()
    (path / "embeddings.npy").write_bytes(whole[:-8])
    assert rebuilt()
    (path / "ids.json").write_text(json.dumps(["d0"]))
    assert rebuilt()
    (path / "manifest.json").unlink()
    assert rebuilt()
    assert not rebuilt()


def test_killed_while_encoding_leaves_no_store(
    tiny_model: SentenceTransformer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*args: object, **options: object) -> np.ndarray:
        raise KeyboardInterrupt

    monkeypatch.setattr(tiny_model, "encode_document", interrupted)
    with pytest.raises(KeyboardInterrupt):
        EmbeddingStore.build(tiny_model, make_collection(6), tmp_path / "store", show_progress_bar=False)
    with pytest.raises(FileNotFoundError, match="no finished embedding store"):
        EmbeddingStore.open(tmp_path / "store")
    monkeypatch.undo()
    assert len(EmbeddingStore.build(tiny_model, make_collection(6), tmp_path / "store", show_progress_bar=False)) == 6
