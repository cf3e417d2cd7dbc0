"""The embedding store: whole or not there, of this model and these texts, and nothing encoded a second time."""

from __future__ import annotations

import errno
import hashlib
import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ir_datasets
import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from ir_datasets.formats import JsonlDocs
from ir_datasets.util.download import LocalDownload
from sentence_transformers import SentenceTransformer

from st_clp import Collection
from st_clp.data import CollectionError, Corpus, MemoryCorpus
from st_clp.data.sources.irds import IrdsCorpus
from st_clp.encoding import EmbeddingStore, building, shards
from st_clp.encoding.inspection import verify
from tests.fresh import run_fresh

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
        options = {"dtype": "model", "show_progress_bar": False, **options}
        self.store = EmbeddingStore.build(self._model, collection, self._path, **options)
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
    corpus = MemoryCorpus("of any kind", dict.fromkeys(ids, "fire"))
    assert EmbeddingStore.build(tiny_model, corpus, tmp_path / "s", show_progress_bar=False).ids == ids


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
    fresh = EmbeddingStore.build(builds._model, from_texts(after), dtype="model", show_progress_bar=False)
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


def test_shards_of_another_model_are_damage_however_right_their_own_checksums(
    builds: Builds, make_tiny_model: Callable[..., SentenceTransformer], tmp_path: Path, caplog: Any
) -> None:
    collection = make_collection(12)
    builds(collection)
    own = builds.store.rows(range(12))
    other = EmbeddingStore.build(make_tiny_model(seed=1), collection, tmp_path / "other", show_progress_bar=False)
    assert np.abs(other.rows(range(12)) - own).max() > 0.1
    for name in FILES:
        if name != "manifest.json":
            shutil.copy(tmp_path / "other" / name, tmp_path / "store" / name)
    assert len(builds(collection)) == 12
    assert "damaged" in caplog.text
    np.testing.assert_array_equal(builds.store.rows(range(12)), own)


@pytest.mark.parametrize("state", ["whole", "unfinished", "stopped while it was brought into today's format"])
def test_a_store_of_version_0_1_0_is_taken_over_with_all_that_it_holds(
    builds: Builds, tmp_path: Path, state: str
) -> None:
    collection, store = make_collection(12), tmp_path / "store"
    builds(collection)
    today = {name: (store / name).read_bytes() for name in FILES}
    as_version_0_1_0_wrote_it(store, sealed=1 if state.startswith("stopped") else 0)
    if state == "unfinished":
        manifest = json.loads((store / "manifest.json").read_text())
        del manifest["documents"]
        (store / "manifest.json").write_text(json.dumps(manifest))
        lines = (store / "shards.jsonl").read_text().splitlines(keepends=True)
        (store / "shards.jsonl").write_text("".join(lines[:2]))
        store.rename(tmp_path / "store.partial")
    assert len(builds(collection)) == (4 if state == "unfinished" else 0)
    assert {name: (store / name).read_bytes() for name in FILES} == today


def as_version_0_1_0_wrote_it(store: Path, sealed: int = 0) -> None:
    """Bring a store into format 2; ``sealed`` of its shards stay as they are."""
    manifest = json.loads((store / "manifest.json").read_text())
    lines = []
    shards_there = list(shards.ShardFiles(store, manifest).read())
    for number, (shard, ids, keys, embeddings, right) in enumerate(shards_there):
        assert right
        digest = hashlib.blake2b(digest_size=16)
        for part in (b"".join(json.dumps(i).encode() + b"\n" for i in ids), keys.tobytes(), embeddings.tobytes()):
            digest.update(len(part).to_bytes(8, "little") + part)
        kind, checksum = ("sealed", shard.checksum) if number < sealed else ("checksum", digest.hexdigest())
        lines.append(json.dumps({"rows": shard.rows, "id_bytes": shard.id_bytes, kind: checksum}) + "\n")
    (store / "shards.jsonl").write_text("".join(lines))
    (store / "manifest.json").write_text(json.dumps({**manifest, "format": 2}, indent=1, ensure_ascii=False))


def test_a_store_whose_manifest_is_broken_is_made_anew(builds: Builds, tmp_path: Path, caplog: Any) -> None:
    collection = make_collection(12)
    builds(collection)
    today = {name: (tmp_path / "store" / name).read_bytes() for name in FILES}
    for broken in ('{"format": 3, "dim": -1}', '{"format": 3', "[]", '{"format": 3, "a": ' + "[" * 100_000):
        (tmp_path / "store" / "manifest.json").write_text(broken)
        caplog.clear()
        builds(collection)
        assert "it is encoded anew" in caplog.text
        assert {name: (tmp_path / "store" / name).read_bytes() for name in FILES} == today


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
    fresh = EmbeddingStore.build(builds._model, collection, tmp_path / "fresh", dtype="model", show_progress_bar=False)
    assert builds.store.ids == fresh.ids
    for file in FILES:
        assert (tmp_path / "store" / file).read_bytes() == (tmp_path / "fresh" / file).read_bytes()


def stop_after(monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    """Let the disk be full after so many shards."""
    original, calls = shards.ShardFiles.add, []

    def add(self: shards.ShardFiles, *arguments: object) -> None:
        if len(calls) == number:
            raise OSError(errno.ENOSPC, "No space left on device")
        calls.append(arguments)
        original(self, *arguments)

    monkeypatch.setattr(shards.ShardFiles, "add", add)


def test_what_was_begun_is_of_use_to_the_store_of_a_collection_that_changed(
    builds: Builds, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    texts = [f"{TEXTS[i % 6]} {i}" for i in range(14)]
    with monkeypatch.context() as patch:
        stop_after(patch, 2)
        with pytest.raises(OSError, match="No space left"):
            builds(from_texts(texts))
    changed = ["fire", *texts[1:], "bird"]
    # Stopped a second time, and the first beginning is still of use.
    with monkeypatch.context() as patch:
        stop_after(patch, 1)
        with pytest.raises(OSError, match="No space left"):
            builds(from_texts(changed))
    assert set(builds(from_texts(changed))) == set(changed) - set(texts[:8]) - {"fire"}
    fresh = EmbeddingStore.build(builds._model, from_texts(changed), dtype="model", show_progress_bar=False)
    assert builds.store.ids == fresh.ids
    np.testing.assert_allclose(builds.store.rows(range(15)), fresh.rows(range(15)), atol=1e-5)
    assert sorted(path.name for path in tmp_path.iterdir() if path.name.startswith("store")) in (
        ["store"],
        ["store", "store.lock"],
    )


def test_what_was_begun_by_another_model_is_of_no_use(
    builds: Builds, tiny_model: SentenceTransformer, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        stop_after(patch, 2)
        with pytest.raises(OSError, match="No space left"):
            builds(make_collection(14))
    with torch.no_grad():
        next(tiny_model.parameters()).add_(1)
    assert len(builds(make_collection(14))) == 14


def test_files_that_are_no_store_are_never_touched(builds: Builds, tmp_path: Path) -> None:
    (tmp_path / "store").mkdir()
    (tmp_path / "store" / "thesis.txt").write_text("years of work")
    with pytest.raises(ValueError, match=r"store holds files that are no part of an embedding store \('thesis.txt'\)"):
        builds(make_collection(3))
    assert (tmp_path / "store" / "thesis.txt").read_text() == "years of work"
    (tmp_path / "file").write_text("x")
    with pytest.raises(NotADirectoryError, match="file"):
        EmbeddingStore.build(builds._model, make_collection(3), tmp_path / "file", show_progress_bar=False)
    assert (tmp_path / "file").read_text() == "x"


def test_a_whole_store_is_opened_without_writing_anything(builds: Builds, tmp_path: Path) -> None:
    builds(make_collection(9))

    def state() -> list[tuple[str, int, int]]:
        return sorted((str(p), p.stat().st_mtime_ns, p.stat().st_size) for p in tmp_path.rglob("*"))

    before = state()
    assert builds(make_collection(9)) == []
    assert verify(tmp_path / "store").whole
    assert state() == before


def test_a_store_between_two_names_is_found_again(
    builds: Builds, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed between the renames that put a store in the place of an older one."""
    builds(make_collection(12))
    original = Path.rename

    def rename(self: Path, target: Path) -> Path:
        if self.name == "store.partial":
            raise KeyboardInterrupt
        return original(self, target)

    texts = [document.text for document in make_collection(12).documents()]
    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", rename)
        with pytest.raises(KeyboardInterrupt):
            builds(from_texts([*texts, "fire"]))
    assert not (tmp_path / "store").exists()
    assert set(builds(from_texts([*texts, "fire"]))) <= {"fire"}
    assert len(builds.store) == 13


def test_killed_at_twenty_moments_the_result_is_byte_for_byte_the_undisturbed_one(
    tiny_model_path: Path, tmp_path: Path
) -> None:
    """Stores and mined rows; and two processes on one folder, which without the lock would append to the same files."""
    script = Path(__file__).with_name("killed.py")
    ran = subprocess.run(
        [sys.executable, str(script), str(tiny_model_path), str(tmp_path), "20"],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert ran.returncode == 0, ran.stderr
    found = json.loads(ran.stdout.splitlines()[-1])
    assert found["half_done"] >= 10, found
    assert found["encoded_together"] == [0, 2500 + 300]  # one did the work, the other waited for it

    def content(folder: Path) -> dict[str, bytes]:
        places = ["rows.jsonl", *(f"{store}/{name}" for store in ("store", "store.queries") for name in FILES)]
        return {place: (folder / place).read_bytes() for place in places}

    expected = content(tmp_path / "undisturbed")
    assert len(expected["rows.jsonl"].splitlines()) == 300
    for name in [*(f"killed {number}" for number in range(20)), "together"]:
        assert content(tmp_path / name) == expected, name
        left = [path.name for path in (tmp_path / name).iterdir() if path.is_dir()]
        assert sorted(left) == ["store", "store.queries"]


def test_embeddings_that_are_not_finite_are_named(
    make_tiny_model: Callable[..., SentenceTransformer], tmp_path: Path
) -> None:
    model = make_tiny_model(normalize=False)
    word = model.tokenizer.convert_tokens_to_ids("fire")
    with torch.no_grad():
        model[0].auto_model.embeddings.word_embeddings.weight[word] = float("nan")
    with pytest.raises(ValueError, match="c: the embedding of document 'd2' is not finite"):
        EmbeddingStore.build(model, make_collection(6), tmp_path / "store", show_progress_bar=False)


def test_files_of_ir_datasets_that_were_replaced_are_another_corpus(builds: Builds, tmp_path: Path) -> None:
    file = tmp_path / "docs-0.jsonl"

    def collection(texts: list[str]) -> Corpus:
        file.write_text("".join(json.dumps({"doc_id": f"d{i}", "text": t}) + "\n" for i, t in enumerate(texts)))
        # Its own document store would go on serving the old documents.
        shutil.rmtree(f"{file}.pklz4", ignore_errors=True)
        docs = JsonlDocs(LocalDownload(file), namespace="home", count_hint=len(texts))
        return IrdsCorpus(ir_datasets.Dataset(docs), None)

    assert len(builds(collection(["a river", "a lake", "fire"]))) == 3
    assert builds(collection(["a river", "a lake", "water"])) == ["water"]


FULL = """
import resource, signal, sys
from sentence_transformers import SentenceTransformer
from st_clp import Collection, mine_hard_negatives
model = SentenceTransformer(sys.argv[1], device="cpu")
texts = {f"d{i}": f"the river of {i}" for i in range(1500)}
collection = Collection.from_dict(texts, {"q": "which river"}, {"q": {"d0": 1}})
# No file may grow beyond this: the kernel refuses the write in the middle of a shard, as on a full disk.
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (150_000, resource.RLIM_INFINITY))
try:
    mine_hard_negatives(model, collection, store_dir=sys.argv[2], dtype="model", show_progress_bar=False)
except OSError as error:
    print(error)
"""


def test_a_disk_that_fills_up_is_named_and_costs_no_finished_shard(
    builds: Builds, tiny_model_path: Path, tmp_path: Path
) -> None:
    ran = run_fresh(FULL, tiny_model_path, tmp_path / "store")
    assert str(tmp_path / "store") in ran.stdout, ran.stderr
    partial = tmp_path / "store.partial"
    assert (partial / "embeddings.bin").stat().st_size > 2 * 512 * 32 * 4  # half a shard was written
    assert verify(partial).documents == 2 * 512
    assert verify(partial).whole
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(building, "window_size", lambda model: 512)
        texts = [f"the river of {i}" for i in range(1500)]
        assert len(builds(Collection.from_dict({f"d{i}": t for i, t in enumerate(texts)}, {}, {}))) == 1500 - 1024


class Broken(MemoryCorpus):
    """A corpus of one's own, which nobody checked."""

    def fingerprint(self) -> str:
        return "broken"


@pytest.mark.parametrize(
    ("text", "message"),
    [(None, "has no text but NoneType"), (7, "has no text but int"), ("a\ud800", "is no valid text: it has half")],
)
def test_documents_that_are_no_text_are_named_and_what_is_finished_is_kept(
    builds: Builds, tmp_path: Path, text: object, message: str
) -> None:
    texts = {f"d{i}": f"{TEXTS[i % 6]} {i}" for i in range(9)}
    with pytest.raises(CollectionError, match=f"c: document 'd6' {message}"):
        builds(Broken("c", {**texts, "d6": text}))
    assert verify(tmp_path / "store.partial").whole
    assert len(builds(Broken("c", texts))) == 5


def test_embeddings_too_large_for_float16_are_refused(
    make_tiny_model: Callable[..., SentenceTransformer], tmp_path: Path
) -> None:
    model = make_tiny_model(normalize=False)
    with torch.no_grad():
        model[0].auto_model.encoder.layer[-1].output.LayerNorm.weight.mul_(1e6)
    build = EmbeddingStore.build
    with pytest.raises(ValueError, match=r"'d0' is too large for float16; encode with dtype=\"model\""):
        build(model, make_collection(6), tmp_path / "store", dtype="bfloat16", show_progress_bar=False)
    assert len(build(model, make_collection(6), tmp_path / "store", dtype="model", show_progress_bar=False)) == 6


def test_the_manifest_says_what_the_store_is_of(builds: Builds, tmp_path: Path) -> None:
    builds(make_collection(5), dtype="bfloat16")
    manifest = json.loads((tmp_path / "store" / "manifest.json").read_text())
    assert (manifest["corpus"], manifest["documents"], manifest["dim"]) == ("c", 5, 32)
    assert (manifest["task"], manifest["computed_in"], manifest["dtype"]) == ("document", "bfloat16", "float16")
