"""Stores at an address: a server that speaks S3, and a folder by its address."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sentence_transformers import SentenceTransformer
from typer.testing import CliRunner

from st_clp.cli import app
from st_clp.data import Collection, MemoryCorpus
from st_clp.encoding import EmbeddingStore, building, parts
from st_clp.encoding.addresses import Place, is_address
from st_clp.encoding.remote_store import RemoteRows
from st_clp.encoding.shards import StoreError
from st_clp.mining import MiningOptions, mine
from st_clp.mining.estimate import estimate
from st_clp.search import search
from tests.fresh import run_fresh
from tests.toy import write_beir

WORDS = "river lake mountain city king queen book song red blue green water fire stone gold".split()
NUMBER = 1300  # documents: three windows


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


def texts(number: int = NUMBER, seed: int = 0) -> dict[str, str]:
    generator = random.Random(seed)
    return {f"d{n}": " ".join(generator.choices(WORDS, k=generator.randrange(1, 12))) for n in range(number)}


@pytest.fixture(params=["s3", "file"])
def address(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    if request.param == "file":
        return f"file://{tmp_path}/store"
    return f"{request.getfixturevalue('bucket')}/embeddings/store"


def same(found: EmbeddingStore, expected: EmbeddingStore) -> None:
    assert list(found.ids) == list(expected.ids)
    assert found.dim == expected.dim
    assert np.array_equal(np.concatenate(list(found.blocks(300))), np.concatenate(list(expected.blocks(300))))


def test_a_store_at_an_address_holds_what_one_in_a_folder_does(
    tiny_model: SentenceTransformer, address: str, tmp_path: Path
) -> None:
    corpus = MemoryCorpus("words", texts())
    expected = EmbeddingStore.build(tiny_model, corpus, tmp_path / "folder", show_progress_bar=False)
    built = EmbeddingStore.build(tiny_model, corpus, address, show_progress_bar=False)
    assert built.path == address
    same(built, expected)
    opened = EmbeddingStore.open(address)
    assert np.array_equal(opened.rows([1299, 0, 511, 512, 0]), expected.rows([1299, 0, 511, 512, 0]))
    assert opened.positions(["d700", "nobody"]) == {"d700": 700}
    queries = expected.rows(range(0, 1300, 100))
    scores, ids = search(tiny_model, queries, opened, 5)
    assert np.array_equal(scores, search(tiny_model, queries, expected, 5)[0])
    assert ids == search(tiny_model, queries, expected, 5)[1]


def count_encoded(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many documents each part took that was encoded from now on."""
    counted: list[int] = []
    call = parts.PartEncoder.__call__

    def count(self: parts.PartEncoder, begin: int, number: int, folder: str) -> int:
        written = call(self, begin, number, folder)
        if not is_address(folder):
            counted.append(written)
        return written

    monkeypatch.setattr(parts.PartEncoder, "__call__", count)
    return counted


def test_what_is_there_is_not_encoded_again_and_another_store_takes_its_place(
    tiny_model: SentenceTransformer, address: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    corpus = MemoryCorpus("words", texts())
    counted = count_encoded(monkeypatch)
    EmbeddingStore.build(tiny_model, corpus, address, show_progress_bar=False)
    assert counted == [512, 512, 276]
    EmbeddingStore.build(tiny_model, corpus, address, show_progress_bar=False)
    assert counted == [512, 512, 276]
    before = set(Place(address).sizes())
    # A part that is gone, cut off or half written is made again, and no other.
    second = sorted(name for name in before if name.endswith("embeddings.bin"))[1]
    Place(address).write(second, b"cut")
    expected = EmbeddingStore.build(tiny_model, corpus, tmp_path / "folder", show_progress_bar=False)
    same(EmbeddingStore.build(tiny_model, corpus, address, show_progress_bar=False), expected)
    assert counted == [512, 512, 276, 512]
    Place(address).remove(second.partition("/")[0])
    same(EmbeddingStore.build(tiny_model, corpus, address, show_progress_bar=False), expected)
    assert counted == [512, 512, 276, 512, 512]
    changed = MemoryCorpus("words", {**texts(), "d3": "another river"})
    expected = EmbeddingStore.build(tiny_model, changed, tmp_path / "folder", show_progress_bar=False)
    same(EmbeddingStore.build(tiny_model, changed, address, show_progress_bar=False), expected)
    after = set(Place(address).sizes())
    assert len(after) == len(before)
    assert after & before == {"manifest.json"}


def test_a_store_that_is_not_finished_is_none_and_is_gone_on_with(
    tiny_model: SentenceTransformer, address: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    corpus = MemoryCorpus("words", texts())
    put, puts = Place.put, [0]

    def full(self: Place, folder: Path, name: str) -> None:
        puts[0] += 1
        if puts[0] == 3:
            raise OSError("no space left")
        put(self, folder, name)

    with monkeypatch.context() as patch:
        patch.setattr(Place, "put", full)
        with pytest.raises(OSError, match="no space left"):
            EmbeddingStore.build(tiny_model, corpus, address, show_progress_bar=False)
    with pytest.raises(FileNotFoundError, match="holds no finished embedding store"):
        EmbeddingStore.open(address)
    counted = count_encoded(monkeypatch)
    EmbeddingStore.build(tiny_model, corpus, address, show_progress_bar=False)
    assert counted == [276]


@pytest.mark.parametrize("gone", [None, 0, 256])
def test_parts_of_another_size_are_used_too(
    tiny_model: SentenceTransformer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, gone: int | None
) -> None:
    """Another kind of device has begun the store: its windows, and so its parts, are others."""
    corpus, address = MemoryCorpus("words", texts()), f"file://{tmp_path}/store"
    with monkeypatch.context() as patch:
        patch.setattr(building, "window_size", lambda model: 256)
        EmbeddingStore.build(tiny_model, corpus, address, show_progress_bar=False)
    Place(address).remove("manifest.json")
    for name in {name.partition("/")[0] for name in Place(address).sizes()}:
        if int(name[-12:]) in (gone, 768):
            Place(address).remove(name)
    counted = count_encoded(monkeypatch)
    built = EmbeddingStore.build(tiny_model, corpus, address, show_progress_bar=False)
    assert counted == [256] * (1 if gone is None else 2)
    assert list(built.ids) == list(texts())
    expected = EmbeddingStore.build(tiny_model, corpus, tmp_path / "folder", show_progress_bar=False)
    assert np.allclose(np.concatenate(list(built.blocks())), np.concatenate(list(expected.blocks())), atol=1e-5)


def test_mining_from_an_address_is_mining_from_a_folder(
    tiny_model: SentenceTransformer, address: str, tmp_path: Path
) -> None:
    generator = random.Random(1)
    queries = {f"q{n}": " ".join(generator.choices(WORDS, k=3)) for n in range(20)}
    collection = Collection.from_dict(texts(), queries, {q: {f"d{n}": 1} for n, q in enumerate(queries)}, name="words")
    options = MiningOptions(num_negatives=2, range_max=20)
    assert estimate(tiny_model, collection, options, store_dir=address, show_progress_bar=False).documents.already == 0
    found, expected = (
        mine(tiny_model, collection, options, store_dir=place, show_progress_bar=False)
        for place in (address, tmp_path / "folder")
    )
    assert found.rows == expected.rows
    left = estimate(tiny_model, collection, options, store_dir=address, show_progress_bar=False)
    assert (left.documents.already, left.queries.already) == (NUMBER, 20)


def test_what_is_wrong_with_an_address_is_said(tiny_model: SentenceTransformer, bucket: str, tmp_path: Path) -> None:
    corpus = MemoryCorpus("words", texts(20))

    def refused(place: str, kind: type[Exception], message: str) -> None:
        with pytest.raises(kind, match=message):
            EmbeddingStore.build(tiny_model, corpus, place, show_progress_bar=False)

    refused("nothing://bucket/store", ValueError, "nothing://bucket/store is no address that fsspec .* knows")
    refused("s3://no-such-bucket-here/store", OSError, "no-such-bucket-here/store cannot be read or written: .*credent")
    Place(f"{bucket}/mine").write("notes.txt", b"precious")
    refused(f"{bucket}/mine", ValueError, r"holds files that are no part of an embedding store \('notes.txt'\)")
    with pytest.raises(FileNotFoundError, match="holds no finished embedding store"):
        EmbeddingStore.open(f"{bucket}/nothing")
    Place(f"{bucket}/broken").write("manifest.json", b"{")
    with pytest.raises(StoreError, match=r"broken/manifest\.json"):
        EmbeddingStore.open(f"{bucket}/broken")
    code = (
        "import sys; sys.modules['s3fs'] = None\n"
        "from st_clp.encoding.addresses import Place\n"
        "try: Place('s3://bucket/store')\n"
        "except ModuleNotFoundError as error: print(error)\n"
    )
    done = run_fresh(code)
    assert "s3://bucket/store cannot be used: pip install 'st-clp[s3]'" in done.stdout, done.stderr
    listed = CliRunner().invoke(app, ["store", "ls", f"{bucket}/mine"])
    assert listed.exit_code != 0
    assert "is an address: look at it, and remove it, with the provider's own tools" in " ".join(listed.output.split())


def test_the_commands_take_an_address(tiny_model_path: Path, bucket: str, tmp_path: Path) -> None:
    collection = Collection.from_dict(texts(60), {"q1": "red river"}, {"q1": {"d3": 1}})
    source = write_beir(collection, tmp_path / "collection", ("train", "dev"))
    common = ["--model", str(tiny_model_path), "--collection", str(source)]

    def run(*arguments: str) -> str:
        result = CliRunner().invoke(app, list(arguments))
        assert result.exit_code == 0, result.output
        return " ".join(result.output.split())

    assert "60 documents" in run("store", "build", *common, "--output", f"{bucket}/stores")
    made = set(Place(f"{bucket}/stores").sizes())
    mined = run("mine", *common, "--output", str(tmp_path / "mined"), "--store", f"{bucket}/stores", "--range-max", "9")
    assert f"the embeddings are kept in {bucket}/stores/" in mined
    assert {name for name in Place(f"{bucket}/stores").sizes() if ".queries" not in name} == made
    run("evaluate", *common, "--output", str(tmp_path / "evaluated"), "--store", f"{bucket}/evaluated")
    assert any(name.endswith("/manifest.json") for name in Place(f"{bucket}/evaluated").sizes())
    assert not (tmp_path / "evaluated" / "embeddings").exists()


@settings(deadline=None, max_examples=60)
@given(st.lists(st.integers(1, 50), min_size=1, max_size=6), st.data())
def test_rows_are_read_by_ranges_as_an_array_has_them(sizes: list[int], data: Any) -> None:
    rows = np.random.default_rng(0).normal(size=(sum(sizes), 3)).astype(np.float32)
    files, begin = {}, 0
    for number, size in enumerate(sizes):
        files[f"part-{number}/embeddings.bin"] = rows[begin : begin + size].tobytes()
        begin += size

    class Memory:
        def read_ranges(self, ranges: list[tuple[str, int, int]]) -> list[bytes]:
            return [files[name][first:last] for name, first, last in ranges]

    found = RemoteRows(Memory(), [(f"part-{n}", size) for n, size in enumerate(sizes)], 3, "float32")  # type: ignore[arg-type]
    assert found.shape == rows.shape
    first = data.draw(st.integers(0, len(rows)))
    last = data.draw(st.integers(first, len(rows)))
    assert np.array_equal(found[first:last], rows[first:last])
    places = np.array(data.draw(st.lists(st.integers(0, len(rows) - 1), max_size=20)), np.int64)
    assert np.array_equal(found[places], rows[places])


@pytest.mark.parametrize(
    ("path", "expected"),
    [("s3://bucket/x", True), ("file:///x", True), ("gs://b", True), ("/x", False), ("c:/x", False), ("x", False)],
)
def test_an_address_is_known_by_its_beginning(path: str, expected: bool) -> None:
    assert is_address(path) is expected
    assert is_address(Path(path)) is False
