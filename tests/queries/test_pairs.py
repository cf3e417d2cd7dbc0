"""``st-clp pairs``: from documents alone to a collection that can be trained on."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from sentence_transformers import SentenceTransformer
from typer.testing import CliRunner

from st_clp import Collection
from st_clp.cli import app
from st_clp.data import CollectionError, MemoryCorpus, open_corpus
from st_clp.queries import make_chain
from st_clp.run import stages
from st_clp.run.pairs import write_pairs
from st_clp.settings import RunSettings

from .conftest import Endpoint
from .test_endpoint import make_documents
from .test_store import write_documents


@pytest.fixture
def documents(tmp_path: Path) -> Path:
    """A folder with ``corpus.jsonl`` alone: 60 documents, and one that is too short to ask about."""
    folder = tmp_path / "documents"
    folder.mkdir()
    lines = [json.dumps({"_id": d.doc_id, "text": f"{d.text} of the old city"}) for d in make_documents(60)]
    (folder / "corpus.jsonl").write_text("\n".join([*lines, json.dumps({"_id": "short", "text": "a lake"})]) + "\n")
    return folder


def invoke(endpoint: Endpoint, *arguments: object) -> tuple[int, str]:
    command = ["pairs", "--writer", "openai:tiny", "--query-base-url", endpoint.base_url, *map(str, arguments)]
    result = CliRunner().invoke(app, command)
    return result.exit_code, " ".join(result.output.split())


def test_documents_alone_become_a_collection_and_a_model(
    endpoint: Endpoint, tiny_model_path: Path, documents: Path, tmp_path: Path
) -> None:
    written = tmp_path / "written"
    code, text = invoke(endpoint, "--collection", documents, "--output", written, "--number", 40, "--unchecked")
    assert code == 0, text
    assert "40 documents drawn: 36 queries to train on, 4 to evaluate on" in text
    assert len(endpoint.requests) == 40
    train, dev = (Collection.load(str(written), split=split) for split in ("train", "dev"))
    assert (len(train.queries), len(dev.queries)) == (36, 4)
    assert {document.doc_id: document.text for document in train.documents()} == {
        document.doc_id: document.text for document in open_corpus(str(documents))
    }
    for query_id, grades in {**train.judgments, **dev.judgments}.items():
        (doc_id,) = grades
        assert query_id == f"written-{doc_id}-0"
        assert {**train.queries, **dev.queries}[query_id].endswith(f" {doc_id[1:]}")  # the server names the document
    # Nothing is paid for twice, and the folder is not replaced unasked.
    code, text = invoke(endpoint, "--collection", documents, "--output", written, "--number", 40, "--unchecked")
    assert code == 1
    assert "name another --output, or replace it by --overwrite" in text
    arguments = ["--collection", documents, "--output", written, "--number", 40, "--unchecked", "--overwrite"]
    assert invoke(endpoint, *arguments)[0] == 0
    assert len(endpoint.requests) == 40
    by_hand = written / "qrels" / "test.tsv"
    by_hand.write_text("query-id\tcorpus-id\tscore\n")
    code, text = invoke(endpoint, *arguments)
    assert code == 1
    assert "holds what pairs has not written, such as qrels/test.tsv: --overwrite would remove it" in text
    assert by_hand.is_file()
    by_hand.unlink()
    report = stages.run(
        RunSettings(
            model=str(tiny_model_path),
            collection=[str(written)],
            output=str(tmp_path / "model"),
            num_negatives=2,
            epochs=1,
            experts=0,
        )
    )
    assert report["training"]["rows"]
    assert set(report["scores"]["after"]) == {f"{written}/dev"}


def test_a_query_that_does_not_find_its_document_is_left_out_and_counted(
    endpoint: Endpoint, tiny_model_path: Path, documents: Path, tmp_path: Path
) -> None:
    written = tmp_path / "written"
    arguments = ["--collection", documents, "--output", written, "--model", tiny_model_path, "--query-round-trip-k", 5]
    code, text = invoke(endpoint, *arguments)
    assert code == 0, text
    train, dev = (Collection.load(str(written), split=split) for split in ("train", "dev"))
    kept = len(train.queries) + len(dev.queries)
    assert 0 < kept < 60
    assert f"{60 - kept} queries that do not find their document among the best 5" in text
    model = SentenceTransformer(str(tiny_model_path), device="cpu")
    texts = {document.doc_id: document.text for document in train.documents()}
    embeddings = model.encode(list(texts.values()))
    for collection in (train, dev):
        for query_id, query in collection.queries.items():
            scores = model.similarity(model.encode(query), embeddings)[0].argsort(descending=True)[:5]
            assert next(iter(collection.judgments[query_id])) in {list(texts)[place] for place in scores}
    assert not list(tmp_path.glob("*.embeddings"))


def test_training_queries_that_there_are_stay_and_their_documents_get_no_other(
    endpoint: Endpoint, tmp_path: Path
) -> None:
    collection = write_documents(tmp_path / "collection", 30)  # one query, which d0 answers
    code, text = invoke(endpoint, "--collection", collection, "--output", tmp_path / "out", "--unchecked")
    assert code == 0, text
    assert "1 training queries were there before, and are kept" in text
    train = Collection.load(str(tmp_path / "out"), split="train")
    assert train.judgments["q"] == {"d0": 1}
    assert not any(query_id.startswith("written-d0-") for query_id in train.queries)
    assert endpoint.billed["0"] == 0


def test_queries_for_several_documents_and_failures_are_counted(
    endpoint: Endpoint, documents: Path, tmp_path: Path
) -> None:
    same = json.dumps({"query": "which river?"})
    content = {"choices": [{"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": same}}]}
    answer = json.dumps({"id": "x", "object": "chat.completion", "created": 0, "model": "tiny", **content})
    endpoint.fault = lambda document, before: answer if document in ("1", "2") else "400" if document == "3" else None
    code, text = invoke(endpoint, "--collection", documents, "--output", tmp_path / "out", "--unchecked")
    assert code == 0, text
    assert "2 queries that were written for several documents" in text
    assert "1 openai: refused (400)" in text
    assert "60 documents drawn: 52 queries to train on, 5 to evaluate on" in text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--unchecked"], "no collection"),
        (["--collection", "{}", "--unchecked"], "no output"),
        (["--collection", "{}", "--output", "out"], "no model: give --model"),
        (["--collection", "{}", "--collection", "b", "--output", "out", "--unchecked"], "one collection at a time"),
        (["--collection", "{}", "--output", "out", "--unchecked", "--number", "0"], "number must be at least 1"),
        (["--collection", "{}", "--output", "out", "--unchecked", "--writer", "judgments"], "judgments write nothing"),
        (["--collection", "{}", "--output", "out", "--unchecked", "--writer", ""], "no writer"),
        (["--collection", "nowhere", "--output", "out", "--unchecked"], "nowhere"),
    ],
)
def test_what_cannot_be_meant_is_refused_before_anything_is_asked_for(
    endpoint: Endpoint, documents: Path, arguments: list[str], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(documents.parent)
    code, text = invoke(endpoint, *(str(documents) if part == "{}" else part for part in arguments))
    assert code == 1
    assert message in text
    assert not endpoint.requests
    assert not (documents.parent / "out").exists()


def test_nothing_to_write_for_and_nothing_left_are_errors_that_leave_no_folder(tmp_path: Path) -> None:
    with make_chain("title") as chain:
        with pytest.raises(CollectionError, match="no document has 20 characters"):
            write_pairs(MemoryCorpus("short", {"d": "a lake"}), chain, tmp_path / "out", number=3)
        same = {f"d{number}": "The lake of the old city. " + "It is large. " * 3 for number in range(3)}
        with pytest.raises(CollectionError, match=r"(?s)none of the queries.*3  queries that were written for several"):
            write_pairs(MemoryCorpus("same", same), chain, tmp_path / "out", number=3)
    assert not list(tmp_path.iterdir())


def test_documents_alone_without_a_model_that_writes(documents: Path, tmp_path: Path) -> None:
    written = tmp_path / "written"
    arguments = ["pairs", "--writer", "sentence", "--collection", documents, "--output", written, "--unchecked"]
    result = CliRunner().invoke(app, [*map(str, arguments), "--queries-per-document", "2"])
    assert result.exit_code == 0, result.output
    train, dev = (Collection.load(str(written), split=split) for split in ("train", "dev"))
    texts = {document.doc_id: document.text for document in train.documents()}
    assert len(train.queries) > 40
    for collection in (train, dev):
        for query_id, query in collection.queries.items():
            (doc_id,) = collection.judgments[query_id]
            assert set(query.split()) <= set(texts[doc_id].replace(".", "").split())
            assert len(query.split()) < len(texts[doc_id].split())
    assert not list(tmp_path.glob("*.sqlite"))
