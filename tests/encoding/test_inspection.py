"""Stores on a disk: found, checked, removed; and ids that are read from the file."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from sentence_transformers import SentenceTransformer
from typer.testing import CliRunner

from st_clp import Collection
from st_clp.cli import app
from st_clp.encoding import EmbeddingStore, building, shards
from st_clp.encoding.shards import FileIds, StoreError


@pytest.fixture
def folder(tiny_model: SentenceTransformer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(building, "window_size", lambda model: 4)
    for name in ("first", "second"):
        collection = Collection.from_dict(
            {f"d{i}": f"a {name} text {i}" for i in range(10)}, {"q": "x"}, {"q": {"d0": 1}}, name=name
        )
        EmbeddingStore.build(tiny_model, collection, tmp_path / "stores" / name, dtype="model", show_progress_bar=False)
    return tmp_path / "stores"


def invoke(*arguments: str) -> tuple[int, str]:
    result = CliRunner().invoke(app, ["store", *arguments])
    return result.exit_code, " ".join(result.output.split())


def test_stores_are_listed_with_what_they_are_of(folder: Path) -> None:
    code, output = invoke("ls", str(folder))
    assert code == 0
    assert f"{folder}/first 10 documents of first, 32 × float32, model" in output
    assert "2 stores" in output
    assert "unfinished" not in output
    (folder / "second").rename(folder / "second.partial")
    manifest = json.loads((folder / "second.partial" / "manifest.json").read_text())
    del manifest["documents"]
    (folder / "second.partial" / "manifest.json").write_text(json.dumps(manifest))
    assert "unfinished" in invoke("ls", str(folder))[1]
    assert invoke("verify", str(folder))[0] == 0
    code, output = invoke("ls", str(folder / "first" / "nothing"))
    assert code == 1
    assert "there is no folder" in output


@pytest.mark.parametrize("name", ["embeddings.bin", "ids.jsonl", "keys.bin"])
def test_a_flipped_byte_anywhere_is_found_and_named(folder: Path, name: str) -> None:
    assert invoke("verify", str(folder))[0] == 0
    file = folder / "first" / name
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    code, output = invoke("verify", str(folder))
    assert code == 1
    assert "first: 10 documents, damaged" in output
    assert "rows 4 to 7 do not match their checksum" in output
    assert "second: 10 documents, whole" in output


def test_lost_shards_are_found(folder: Path) -> None:
    file = folder / "first" / "shards.jsonl"
    file.write_text("".join(file.read_text().splitlines(keepends=True)[:2]))
    code, output = invoke("verify", str(folder / "first"))
    assert code == 1
    assert "2 documents are missing" in output


def test_stores_are_removed_only_when_that_is_meant(folder: Path, tmp_path: Path) -> None:
    result = CliRunner().invoke(app, ["store", "rm", str(folder)], input="n\n")
    assert result.exit_code == 1
    assert (folder / "first").is_dir()
    (folder / "notes.txt").write_text("mine")
    (folder / "first" / "notes.txt").write_text("mine too")
    assert invoke("rm", str(folder), "--yes")[0] == 0
    # What is no part of a store stays, beside it and within.
    left = {str(path.relative_to(folder)) for path in folder.rglob("*.txt")}
    assert left == {"notes.txt", "first/notes.txt"}
    assert not list(folder.rglob("*.bin"))
    code, output = invoke("rm", str(folder), "--yes")
    assert code == 1
    assert "holds no embedding store" in output


@given(
    ids=st.lists(st.text(max_size=8), max_size=20),
    cut=st.integers(0, 20),
    begin=st.integers(-22, 22),
    end=st.integers(-22, 22),
)
def test_ids_in_a_file_are_a_sequence(
    tmp_path_factory: pytest.TempPathFactory, ids: list[str], cut: int, begin: int, end: int
) -> None:
    path = tmp_path_factory.mktemp("ids") / "ids.jsonl"
    path.write_text("".join(json.dumps(identifier) + "\n" for identifier in ids))
    number = min(cut, len(ids))
    found, expected = FileIds(path, number), ids[:number]
    assert list(found) == expected
    assert len(found) == number
    assert found[begin:end] == expected[begin:end]
    assert found[begin:end:3] == expected[begin:end:3]
    if -number <= begin < number:
        assert found[begin] == expected[begin]
    else:
        with pytest.raises(IndexError):
            found[begin]


def test_a_store_with_many_ids_reads_them_from_the_file(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    held = EmbeddingStore.open(folder / "first")
    monkeypatch.setattr(shards, "HELD_IDS", 5)
    read = EmbeddingStore.open(folder / "first")
    assert isinstance(read.ids, FileIds)
    assert list(read.ids) == held.ids
    assert read.positions({"d3", "d9", "x"}) == {"d3": 3, "d9": 9}
    assert [ids for ids, _ in read.shards(4)] == [ids for ids, _ in held.shards(4)]


def change_manifest(store: Path, **fields: object) -> None:
    file = store / "manifest.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **fields}))


@pytest.mark.parametrize(
    ("documents", "message"), [(9000, "8,990 documents are missing"), (9, "1 documents more than")]
)
def test_a_manifest_of_more_or_fewer_documents_is_not_whole(folder: Path, documents: int, message: str) -> None:
    change_manifest(folder / "first", documents=documents)
    code, output = invoke("verify", str(folder / "first"))
    assert code == 1
    assert message in output
    with pytest.raises(StoreError, match=rf"names {documents:,} documents, and there are 10 ids and 10 embeddings"):
        EmbeddingStore.open(folder / "first")


@pytest.mark.parametrize(
    "fields",
    [
        {"dim": -1},
        {"dim": 10**12},
        {"dim": "32"},
        {"dtype": "pickle"},
        {"dtype": None},
        {"documents": -5},
        {"documents": True},
        {"model": 7},
        {"corpus": ["a"]},
        {"task": "[" * 100},
    ],
)
def test_a_manifest_that_says_what_cannot_be_is_refused_by_name(
    folder: Path, fields: dict[str, object], tiny_model: SentenceTransformer
) -> None:
    change_manifest(folder / "first", **fields)
    if "task" in fields:
        (folder / "first" / "manifest.json").write_text('{"format": 3, "task": ' + "[" * 100_000)
    with pytest.raises(StoreError, match=r"manifest\.json.*st-clp store rm"):
        EmbeddingStore.open(folder / "first")
    assert "first damaged: its manifest cannot be read" in invoke("ls", str(folder))[1]
    code, output = invoke("verify", str(folder))
    assert code == 1
    assert "first: 0 documents, damaged" in output
    assert "second: 10 documents, whole" in output
    assert invoke("rm", "--yes", str(folder / "first"))[0] == 0
    assert not (folder / "first").exists()


@pytest.mark.parametrize(
    "line",
    [
        {"rows": -5},
        {"rows": 10**12},
        {"rows": 2**70, "id_bytes": 2**70},
        {"rows": "4"},
        {"id_bytes": -1},
        {"id_bytes": 10**12},
        {"sealed": 5},
        "[" * 100_000,
        "\\xff",
    ],
)
def test_a_record_that_says_what_cannot_be_is_damage(
    folder: Path, line: dict[str, object] | str, tiny_model: SentenceTransformer
) -> None:
    file = folder / "first" / "shards.jsonl"
    lines = file.read_text().splitlines()
    lines[1] = line if isinstance(line, str) else json.dumps({**json.loads(lines[1]), **line})
    file.write_text("\n".join(lines) + "\n")
    code, output = invoke("verify", str(folder / "first"))
    assert code == 1
    assert "damaged" in output
    if line != {"id_bytes": 10**12}:  # opening looks at numbers of rows, not at checksums
        with pytest.raises(StoreError, match="st-clp store rm"):
            EmbeddingStore.open(folder / "first")
