"""The embedding store: whole or not there, of this model and these texts, and nothing encoded a second time."""

from __future__ import annotations

import errno
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sentence_transformers import SentenceTransformer

from st_clp import Collection
from st_clp.encoding import EmbeddingStore, building, shards

TEXTS = ["a big river", "the old lake of the north", "fire", "who was king?", "one two three four five six", "bird"]
FILES = ["embeddings.bin", "ids.jsonl", "keys.bin", "shards.jsonl", "manifest.json"]


def make_collection(number: int = 6, *, name: str = "c") -> Collection:
    return from_texts([f"{TEXTS[i % len(TEXTS)]} {i}" for i in range(number)], name=name)


def from_texts(texts: list[str], *, name: str = "c") -> Collection:
    documents = {f"d{i}": text for i, text in enumerate(texts)}
    return Collection.from_dict(documents, {"q": "which river"}, {"q": {"d0": 1}}, name=name)


class Builds:
    """Builds a store and says which texts the model was given."""

    def __init__(self, model: SentenceTransformer, path: Path | None, monkeypatch: pytest.MonkeyPatch) -> None:
        self._model, self._path = model, path
        self._encoded: list[str] = []
        self.store = EmbeddingStore([], np.zeros((0, 1)))
        original = model.preprocess

        def preprocess(texts: list[str], **options: object) -> dict:
            self._encoded += texts
            return original(texts, **options)

        monkeypatch.setattr(model, "preprocess", preprocess)

    def __call__(self, collection: Collection, **options: object) -> list[str]:
        self._encoded = []
        self.store = EmbeddingStore.build(self._model, collection, self._path, show_progress_bar=False, **options)
        return sorted(self._encoded)


@pytest.fixture
def builds(tiny_model: SentenceTransformer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Builds:
    monkeypatch.setattr(building, "window_size", lambda model: 4)
    return Builds(tiny_model, tmp_path / "store", monkeypatch)


@pytest.mark.parametrize("in_memory", [False, True])
@pytest.mark.parametrize("dtype", ["model", "bfloat16"])
def test_store_holds_ids_and_embeddings_in_corpus_order(
    tiny_model: SentenceTransformer, tmp_path: Path, in_memory: bool, dtype: str
) -> None:
    collection = make_collection(10)
    path = None if in_memory else tmp_path / "store"
    store = EmbeddingStore.build(tiny_model, collection, path, dtype=dtype, show_progress_bar=False)
    expected = tiny_model.encode_document([document.text for document in collection.documents()])
    tolerance = 1e-5 if dtype == "model" else 0.03
    assert store.ids == [f"d{i}" for i in range(10)]
    assert (len(store), store.dim) == (10, 32)
    parts = list(store.shards(rows=4))
    assert [ids for ids, _ in parts] == [["d0", "d1", "d2", "d3"], ["d4", "d5", "d6", "d7"], ["d8", "d9"]]
    np.testing.assert_allclose(np.concatenate([rows for _, rows in parts]), expected, atol=tolerance)
    np.testing.assert_allclose(store.rows([7, 2]), expected[[7, 2]], atol=tolerance)
    assert store.rows([0]).dtype == np.float32
    if path:
        np.testing.assert_array_equal(EmbeddingStore.open(path).rows(range(10)), store.rows(range(10)))
        assert (path / "embeddings.bin").stat().st_size == 10 * 32 * (4 if dtype == "model" else 2)


def test_ids_of_any_kind_survive(tiny_model: SentenceTransformer, tmp_path: Path) -> None:
    ids = ["a b", "line\nbreak", "한국", '"quoted"', " "]
    collection = Collection.from_dict(dict.fromkeys(ids, "fire"), {"q": "x"}, {"q": {"a b": 1}})
    assert EmbeddingStore.build(tiny_model, collection, tmp_path / "s", show_progress_bar=False).ids == ids


def test_store_is_reused_only_for_the_same_model_task_and_precision(
    builds: Builds, tiny_model: SentenceTransformer
) -> None:
    collection = make_collection(6)
    assert len(builds(collection)) == 6
    assert builds(collection) == []
    assert len(builds(collection, task="query")) == 6
    assert len(builds(collection, dtype="bfloat16")) == 6
    assert len(builds(collection)) == 6
    tiny_model.prompts = {"document": "the book of "}
    assert len(builds(collection)) == 6
    with torch.no_grad():
        next(tiny_model.parameters())[0, 0] += 1
    assert len(builds(collection)) == 6
    assert builds(collection) == []


@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    before=st.lists(st.sampled_from(TEXTS), min_size=1, max_size=14),
    after=st.lists(st.sampled_from(TEXTS), min_size=1, max_size=14),
)
def test_only_texts_that_are_new_are_encoded(builds: Builds, before: list[str], after: list[str]) -> None:
    builds(from_texts(before))
    encoded = builds(from_texts(after))
    assert set(encoded) == set(after) - set(before)
    fresh = EmbeddingStore.build(builds._model, from_texts(after), show_progress_bar=False)
    assert builds.store.ids == fresh.ids
    np.testing.assert_allclose(builds.store.rows(range(len(after))), fresh.rows(range(len(after))), atol=1e-5)


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("damage", ["flipped byte", "cut off", "removed"])
def test_damage_is_found_and_only_the_damaged_shard_is_made_again(
    builds: Builds, tmp_path: Path, name: str, damage: str
) -> None:
    collection = make_collection(12)
    builds(collection)
    whole = {file: (tmp_path / "store" / file).read_bytes() for file in FILES}
    path = tmp_path / "store" / name
    content = bytearray(whole[name])
    if damage == "removed":
        path.unlink()
    else:
        content[len(content) // 2] ^= 1
        path.write_bytes(content if damage == "flipped byte" else content[: len(content) // 2])
    encoded = builds(collection)
    if damage == "flipped byte" and name in ("embeddings.bin", "keys.bin"):
        assert len(encoded) == 4  # one shard of three
    assert {file: (tmp_path / "store" / file).read_bytes() for file in FILES} == whole
    assert builds(collection) == []


def test_a_stopped_build_goes_on_with_the_unfinished_shard(
    builds: Builds, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    collection = make_collection(14)
    original, calls = shards.ShardFiles.add, []

    def add(self: shards.ShardFiles, ids: list[str], keys: list[bytes], embeddings: np.ndarray) -> None:
        if len(calls) == 2:
            # The disk is full after a part of the third shard.
            with open(self.folder / "ids.jsonl", "ab") as file:
                file.write(b'"d8"\n"d')
            raise OSError(errno.ENOSPC, "No space left on device")
        calls.append(ids)
        original(self, ids, keys, embeddings)

    monkeypatch.setattr(shards.ShardFiles, "add", add)
    with pytest.raises(OSError, match="No space left"):
        builds(collection)
    with pytest.raises(FileNotFoundError, match="no finished embedding store"):
        EmbeddingStore.open(tmp_path / "store")
    monkeypatch.setattr(shards.ShardFiles, "add", original)
    assert len(builds(collection)) == 14 - 8
    fresh = EmbeddingStore.build(builds._model, collection, tmp_path / "fresh", show_progress_bar=False)
    assert builds.store.ids == fresh.ids
    for file in FILES:
        assert (tmp_path / "store" / file).read_bytes() == (tmp_path / "fresh" / file).read_bytes()


def test_a_begun_store_of_other_texts_is_not_gone_on_with(
    builds: Builds, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    builds(make_collection(9))
    (tmp_path / "store").rename(tmp_path / "store.partial")
    assert len(builds(make_collection(9, name="other"))) == 9


def test_killed_at_twenty_moments_it_is_byte_for_byte_the_undisturbed_store(
    tiny_model_path: Path, tmp_path: Path
) -> None:
    script = Path(__file__).with_name("killed.py")
    ran = subprocess.run(
        [sys.executable, str(script), str(tiny_model_path), str(tmp_path), "20"],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert ran.returncode == 0, ran.stderr
    assert int(ran.stdout.split()[-1]) >= 4  # some of them were killed with work half done
    for number in range(4):
        for name in FILES:
            assert (tmp_path / f"killed {number}" / name).read_bytes() == (tmp_path / "undisturbed" / name).read_bytes()


def test_embeddings_that_are_not_finite_are_named(
    make_tiny_model: Callable[..., SentenceTransformer], tmp_path: Path
) -> None:
    model = make_tiny_model(normalize=False)
    word = model.tokenizer.convert_tokens_to_ids("fire")
    with torch.no_grad():
        model[0].auto_model.embeddings.word_embeddings.weight[word] = float("nan")
    with pytest.raises(ValueError, match="c: the embedding of document 'd2' is not finite"):
        EmbeddingStore.build(model, make_collection(6), tmp_path / "store", show_progress_bar=False)


def test_embeddings_too_large_for_float16_are_refused(
    make_tiny_model: Callable[..., SentenceTransformer], tmp_path: Path
) -> None:
    model = make_tiny_model(normalize=False)
    with torch.no_grad():
        model[0].auto_model.encoder.layer[-1].output.LayerNorm.weight.mul_(1e6)
    build = EmbeddingStore.build
    with pytest.raises(ValueError, match=r"'d0' is too large for float16; encode with dtype=\"model\""):
        build(model, make_collection(6), tmp_path / "store", dtype="bfloat16", show_progress_bar=False)
    assert len(build(model, make_collection(6), tmp_path / "store", show_progress_bar=False)) == 6


def test_the_manifest_says_what_the_store_is_of(builds: Builds, tmp_path: Path) -> None:
    builds(make_collection(5), dtype="bfloat16")
    manifest = json.loads((tmp_path / "store" / "manifest.json").read_text())
    assert (manifest["corpus"], manifest["documents"], manifest["dim"]) == ("c", 5, 32)
    assert (manifest["task"], manifest["computed_in"], manifest["dtype"]) == ("document", "bfloat16", "float16")
