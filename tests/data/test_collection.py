"""Collections from every kind of source: what is read, what is counted, what is refused."""

from __future__ import annotations

import errno
import gzip
import json
import logging
import os
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from st_clp import Collection
from st_clp.data import CollectionError, corpus
from st_clp.data.sources.irds import IrdsCorpus

CORPUS = [
    {"_id": "d1", "title": "River", "text": "a big river"},
    {"_id": "d2", "title": "Lake", "text": "an old lake"},
    {"_id": "d3", "title": "", "text": "a red city"},
]
QUERIES = [{"_id": "q1", "text": "which river?"}, {"_id": "q2", "text": "which lake?"}, {"_id": "q3", "text": "unused"}]
JUDGMENTS = [("q1", "d1", 1), ("q1", "d2", 0), ("q2", "d2", 2)]


def write_jsonl(path: Path, rows: list[Any], *, gz: bool = False) -> None:
    text = "\n".join(row if isinstance(row, str) else json.dumps(row, ensure_ascii=False) for row in rows) + "\n"
    if gz:
        path.with_name(path.name + ".gz").write_bytes(gzip.compress(text.encode()))
    else:
        path.write_text(text, encoding="utf-8")


def write_beir(
    folder: Path,
    *,
    documents: list[Any] = CORPUS,
    queries: list[Any] = QUERIES,
    judgments: list[tuple[str, str, Any]] = JUDGMENTS,
    splits: tuple[str, ...] = ("train",),
    gz: bool = False,
    header: bool = True,
) -> str:
    (folder / "qrels").mkdir(parents=True, exist_ok=True)
    write_jsonl(folder / "corpus.jsonl", documents, gz=gz)
    write_jsonl(folder / "queries.jsonl", queries, gz=gz)
    lines = (["query-id\tcorpus-id\tscore"] if header else []) + ["\t".join(map(str, row)) for row in judgments]
    for split in splits:
        text = "\n".join(lines) + "\n"
        if gz:
            (folder / "qrels" / f"{split}.tsv.gz").write_bytes(gzip.compress(text.encode()))
        else:
            (folder / "qrels" / f"{split}.tsv").write_text(text, encoding="utf-8")
    return str(folder)


@pytest.mark.parametrize("gz", [False, True])
@pytest.mark.parametrize("header", [False, True])
@pytest.mark.parametrize("small", [False, True])
def test_beir_folder_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, gz: bool, header: bool, small: bool
) -> None:
    if not small:  # documents are then streamed from the file each time, and never held
        monkeypatch.setattr(corpus, "SMALL_CORPUS_BYTES", 0)
    collection = Collection.load(write_beir(tmp_path / "c", gz=gz, header=header))
    assert [(document.doc_id, document.text) for document in collection.documents()] == [
        ("d1", "River a big river"),
        ("d2", "Lake an old lake"),
        ("d3", "a red city"),
    ]
    assert collection.num_documents == 3
    assert collection.queries == {"q1": "which river?", "q2": "which lake?"}
    assert collection.judgments == {"q1": {"d1": 1, "d2": 0}, "q2": {"d2": 2}}
    assert collection.positives() == {"q1": ["d1"], "q2": ["d2"]}
    assert {d.doc_id for d in collection.get_documents(["d3", "d1", "nope"]).values()} == {"d1", "d3"}
    assert collection.split == "train"


def test_text_fields_choose_what_a_document_is(tmp_path: Path) -> None:
    collection = Collection.load(write_beir(tmp_path / "c"), text_fields=["text"])
    assert next(collection.documents()).text == "a big river"


def test_splits_of_a_beir_folder(tmp_path: Path) -> None:
    folder = write_beir(tmp_path / "c", splits=("train", "dev"))
    assert Collection.splits(folder) == ["dev", "train"]
    assert Collection.load(folder, split="dev").name.endswith("/dev")
    with pytest.raises(CollectionError, match="name the split to read; it has dev, train"):
        Collection.load(folder)
    with pytest.raises(CollectionError, match="no split 'test'; it has dev, train"):
        Collection.load(folder, split="test")


def test_judgments_without_query_or_document_are_counted_and_said(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    judgments = [*JUDGMENTS, ("q9", "d1", 1), ("q1", "d9", 1), ("q3", "d8", 1)]
    with caplog.at_level(logging.WARNING):
        collection = Collection.load(write_beir(tmp_path / "c", judgments=judgments))
    assert collection.left_out == {"judgments of a query that is not there": 1}
    assert "left out 1 judgments of a query that is not there" in caplog.text
    # trec_eval counts judgments of documents that nobody can find, so they stay; training leaves them out.
    assert collection.absent_documents == {"d8", "d9"}
    assert "2 judgments are of documents that the corpus does not have; they count in evaluation" in caplog.text
    assert set(collection.queries) == {"q1", "q2", "q3"}
    trained_on = collection.without_missing_documents(["d1", "d2", "d3"])
    assert set(trained_on.queries) == {"q1", "q2"}
    assert trained_on.left_out["judgments of a document that is not there"] == 2


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"documents": [*CORPUS, "{broken"]}, r"corpus\.jsonl, line 4: not valid JSON"),
        ({"documents": [*CORPUS, '["a"]']}, r"corpus\.jsonl, line 4: a JSON object is expected, not list"),
        (
            {"documents": [{"title": "x", "text": "y"}]},
            r"corpus\.jsonl, line 1: no '_id'; the line has 'title', 'text'",
        ),
        ({"documents": [{"_id": "x", "body": "y"}]}, r"corpus\.jsonl, line 1: none of the fields title, text"),
        ({"documents": [{"_id": "x", "text": ["y"]}]}, r"corpus\.jsonl, line 1: 'text' must be text, not list"),
        (
            {"documents": [*CORPUS, {"_id": "d1", "text": "other"}]},
            r"corpus\.jsonl, line 4: the document id 'd1' was there",
        ),
        ({"documents": []}, r"corpus\.jsonl has no documents"),
        ({"queries": [*QUERIES, {"_id": "q1", "text": "other"}]}, r"queries\.jsonl, line 4: the query id 'q1' was"),
        ({"judgments": [("q1", "d1", "high")]}, r"train\.tsv, line 2: expected query-id, corpus-id and a whole-number"),
        (
            {"judgments": [("q7", "d1", 1)]},
            r"train\.tsv: no judgment joins a query .*1 judgments of a query that is not",
        ),
        ({"judgments": []}, r"train\.tsv: no judgment joins .*the file is empty"),
        ({"splits": ()}, r"there are no judgments; put them in .*train\.tsv"),
    ],
)
def test_a_broken_beir_folder_is_refused_by_place(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(CollectionError, match=message):
        Collection.load(write_beir(tmp_path / "c", **changes))


def test_damaged_gzip_and_bad_encoding_name_the_file(tmp_path: Path) -> None:
    folder = Path(write_beir(tmp_path / "c", gz=True))
    whole = (folder / "corpus.jsonl.gz").read_bytes()
    (folder / "corpus.jsonl.gz").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(CollectionError, match=r"corpus\.jsonl\.gz.*damaged or cut-off"):
        Collection.load(str(folder))
    other = Path(write_beir(tmp_path / "d"))
    (other / "queries.jsonl").write_bytes('{"_id": "q1", "text": "é"}'.encode("latin-1"))
    with pytest.raises(CollectionError, match=r"queries\.jsonl.*not UTF-8"):
        Collection.load(str(other))


def test_the_same_document_twice_counts_once(tmp_path: Path) -> None:
    collection = Collection.load(write_beir(tmp_path / "c", documents=[*CORPUS, CORPUS[0]]))
    assert collection.num_documents == 3
    assert collection.left_out == {"documents that came twice": 1}


def test_training_rows_are_read(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    rows = [
        {"query": "q one", "pos": ["a river"], "neg": ["a lake", "a city"], "neg_q": ["which lake?", None]},
        {"query": "q two", "pos": ["a lake"], "neg": ["a river"], "neg_q": [["which river?", "what river?"]]},
        {"query": "q one", "pos": ["a mountain"]},
    ]
    write_jsonl(path, rows)
    collection = Collection.load(str(path))
    texts = {document.text: document.doc_id for document in collection.documents()}
    assert set(texts) == {"a river", "a lake", "a city", "a mountain"}
    queries = {text: query_id for query_id, text in collection.queries.items()}
    assert collection.judgments[queries["q one"]] == {
        texts["a river"]: 1,
        texts["a lake"]: 0,
        texts["a city"]: 0,
        texts["a mountain"]: 1,
    }
    assert collection.known_queries == {
        texts["a lake"]: ["which lake?"],
        texts["a river"]: ["which river?", "what river?"],
    }
    assert collection.judged_negatives
    assert Collection.splits(str(path)) == ["train"]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ('{"query": "x", "pos": ["y"]', "line 1: not valid JSON"),
        ({"pos": ["y"]}, "line 1: no 'query'"),
        ({"query": "x"}, "line 1: 'pos' must be a list of texts"),
        ({"query": "x", "pos": []}, "line 1: 'pos' has no text"),
        ({"query": "x", "pos": ["y"], "neg": [1]}, "line 1: 'neg' must be a list of texts"),
        (
            {"query": "x", "pos": ["y"], "neg": ["z"], "neg_q": []},
            "line 1: 'neg_q' must give one entry for each of the 1",
        ),
        ({"query": "x", "pos": ["y"], "neg": ["z"], "neg_q": [3]}, "line 1: each entry of 'neg_q' must be"),
    ],
)
def test_a_broken_training_row_is_refused_by_place(tmp_path: Path, row: Any, message: str) -> None:
    path = tmp_path / "rows.jsonl"
    write_jsonl(path, [row])
    with pytest.raises(CollectionError, match=message):
        Collection.load(str(path))


def test_an_empty_file_of_training_rows_is_refused(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text("")
    with pytest.raises(CollectionError, match=r"rows\.jsonl is empty"):
        Collection.load(str(tmp_path / "rows.jsonl"))


def test_unknown_names_get_advice(tmp_path: Path) -> None:
    with pytest.raises(CollectionError, match=r"unknown collection 'miracl/kk'.*Did you mean miracl/ko"):
        Collection.load("miracl/kk")
    with pytest.raises(CollectionError, match=r"no file or folder .*missing\.jsonl.*is there"):
        Collection.load(str(tmp_path / "missing.jsonl"))
    with pytest.raises(CollectionError, match=r"is a folder, but has no corpus\.jsonl"):
        Collection.load(str(tmp_path))
    with pytest.raises(CollectionError, match="name one of its splits: dev, train"):
        Collection.load("miracl/ko")
    with pytest.raises(CollectionError, match="there is no split 'nope'; it has dev, train"):
        Collection.load("miracl/ko", split="nope")


def test_embedded_collection_is_loaded_by_name() -> None:
    assert Collection.splits("embedded/ko") == ["dev", "train"]
    collection = Collection.load("embedded/ko/dev")
    assert (collection.language, collection.split, collection.corpus_name) == ("ko", "dev", "embedded/ko")
    assert collection.queries == Collection.load("embedded/ko", split="dev").queries
    assert collection.corpus_name == Collection.load("embedded/ko/train").corpus_name
    known = {document.doc_id for document in collection.documents()}
    assert all(set(grades) <= known for grades in collection.judgments.values())


def test_from_dict_refuses_an_empty_corpus_and_counts_what_is_missing() -> None:
    with pytest.raises(CollectionError, match="the corpus is empty"):
        Collection.from_dict({}, {}, {})
    collection = Collection.from_dict({"d": "text"}, {"q": "query", "b": " "}, {"q": {"d": 1, "x": 1}, "b": {"d": 1}})
    assert collection.judgments == {"q": {"d": 1, "x": 1}}
    assert collection.absent_documents == {"x"}
    assert collection.left_out == {"judgments of a query without text": 1}


@pytest.mark.parametrize("grade", ["1", 0.5, float("nan"), None, 99_999_999_999, -(2**40), 10_001])
def test_from_dict_refuses_grades_that_cannot_be_scored(grade: Any) -> None:
    with pytest.raises(CollectionError, match=r"collection: .*query 'q', document 'd'.* grade"):
        Collection.from_dict({"d": "text"}, {"q": "query"}, {"q": {"d": grade}})


def test_from_dict_takes_numpys_whole_numbers() -> None:
    collection = Collection.from_dict({"d": "text"}, {"q": "query"}, {"q": {"d": np.int64(2)}})
    assert collection.judgments == {"q": {"d": 2}}
    assert type(collection.judgments["q"]["d"]) is int


BAD_IDS = ["a b", "a\tb", " a", "a\u3000b", "a\u2028b", "", "a\x00b", "a\x1bb", "a\x85b", "d\ud800"]


@pytest.mark.parametrize("identifier", BAD_IDS)
def test_ids_that_a_run_cannot_carry_are_refused_by_every_reader(tmp_path: Path, identifier: str) -> None:
    with pytest.raises(CollectionError, match=r"collection: the document id .* cannot carry"):
        Collection.from_dict({identifier: "text", "d": "text"}, {"q": "query"}, {"q": {"d": 1}})
    with pytest.raises(CollectionError, match=r"collection: the query id .* cannot carry"):
        Collection.from_dict({"d": "text"}, {identifier: "query"}, {identifier: {"d": 1}})
    row = json.dumps({"_id": identifier, "text": "another"})
    with pytest.raises(CollectionError, match=r"corpus\.jsonl, line 4: the document id .* cannot carry"):
        Collection.load(write_beir(tmp_path / "documents", documents=[*CORPUS, row]))
    with pytest.raises(CollectionError, match=r"queries\.jsonl, line 4: the query id .* cannot carry"):
        Collection.load(write_beir(tmp_path / "queries", queries=[*QUERIES, row]))


def test_half_a_character_in_a_text_is_refused_by_place(tmp_path: Path) -> None:
    row = '{"_id": "x", "text": "a\\ud800b"}'
    for changes, message in [
        ({"documents": [*CORPUS, row]}, r"corpus\.jsonl, line 4: 'text' .* half a character .* at place 1"),
        ({"queries": [*QUERIES, row]}, r"queries\.jsonl, line 4: 'text' .* half a character"),
    ]:
        with pytest.raises(CollectionError, match=message):
            Collection.load(write_beir(tmp_path / "c", **changes))
    rows = tmp_path / "rows.jsonl"
    for field in ("pos", "neg"):
        write_jsonl(rows, [{"query": "q", "pos": ["p"]}, json.dumps({"query": "q", "pos": ["p"], field: ["\ud800"]})])
        with pytest.raises(CollectionError, match=rf"rows\.jsonl, line 2: '{field}' is no valid text"):
            Collection.load(str(rows))
    with pytest.raises(CollectionError, match="the document 'd' is no valid text: it has half a character"):
        Collection.from_dict({"d": "\udfff"}, {"q": "query"}, {"q": {"d": 1}})


@pytest.mark.parametrize(
    ("grade", "message"),
    [
        ("--1", "a whole-number score"),
        ("²", "a whole-number score"),
        ("١", "a whole-number score"),
        ("1.5", "a whole-number score"),
        ("1.0.0", "a whole-number score"),
        ("9" * 5000, "a whole-number score"),
        ("99999999999", r"the grade 99999999999 is beyond 10,000"),
        ("10001", r"the grade 10001 is beyond 10,000"),
    ],
)
def test_grades_that_are_none_or_beyond_trec_eval_are_refused_by_place(
    tmp_path: Path, grade: str, message: str
) -> None:
    with pytest.raises(CollectionError, match=rf"train\.tsv, line 3: .*{message}"):
        Collection.load(write_beir(tmp_path / "c", judgments=[("q1", "d1", 1), ("q2", "d2", grade)]))


@pytest.mark.parametrize("first", ["q1\td1\tx", "q1\td9\thigh", "q9\td1\tA", "q9\td9\t1.5"])
def test_a_first_judgment_with_a_letter_for_its_grade_is_no_header(tmp_path: Path, first: str) -> None:
    folder = write_beir(tmp_path / "c")
    (tmp_path / "c" / "qrels" / "train.tsv").write_text(f"{first}\nq2\td2\t1\n")
    with pytest.raises(CollectionError, match=r"train\.tsv, line 1: expected query-id"):
        Collection.load(folder)


@pytest.mark.parametrize(
    "lines",
    ["q1\td1\t1.0\nq2\td2\t2.\n", "q1 0 d1 1\nq2 0 d2 2\n", "q1\tQ0\td1\t1\nq2\tQ0\td2\t2\n", "q1  d1  1\nq2  d2  2\n"],
)
def test_judgments_are_read_as_trec_and_spreadsheets_write_them(tmp_path: Path, lines: str) -> None:
    folder = write_beir(tmp_path / "c")
    (tmp_path / "c" / "qrels" / "train.tsv").write_text(lines)
    assert Collection.load(folder).judgments == {"q1": {"d1": 1}, "q2": {"d2": 2}}


@pytest.mark.parametrize("header", ["query-id\tcorpus-id\tscore", "qid\tdocid\trel", "질의\t문서\t점수"])
def test_any_header_is_passed_over(tmp_path: Path, header: str) -> None:
    folder = write_beir(tmp_path / "c")
    (tmp_path / "c" / "qrels" / "train.tsv").write_text(f"{header}\nq2\td2\t1\n", encoding="utf-8")
    assert Collection.load(folder).judgments == {"q2": {"d2": 1}}


def test_a_judgment_that_comes_again_with_another_grade_is_counted_and_the_last_one_counts(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    judgments = [("q1", "d1", 1), ("q1", "d1", 0), ("q2", "d2", 1), ("q2", "d2", 1)]
    with caplog.at_level(logging.WARNING):
        collection = Collection.load(write_beir(tmp_path / "c", judgments=judgments))
    assert collection.judgments == {"q1": {"d1": 0}, "q2": {"d2": 1}}
    assert collection.left_out == {"judgments that came again with another grade (the last one counts)": 1}
    assert "1 judgments that came again with another grade" in caplog.text


@pytest.mark.parametrize(
    "line", ["[" * 100_000, '{"_id": "x", "text": ' + "[" * 100_000, '{"_id": ' + "9" * 5000 + ', "text": "x"}']
)
def test_a_line_that_json_cannot_hold_is_refused_by_place(tmp_path: Path, line: str) -> None:
    for name in ("documents", "queries"):
        rows = [*(CORPUS if name == "documents" else QUERIES), line]
        with pytest.raises(CollectionError, match=r"\.jsonl, line 4: "):
            Collection.load(write_beir(tmp_path / name, **{name: rows}))


@pytest.mark.skipif(sys.platform != "linux", reason="file names are UTF-8 elsewhere")
def test_a_folder_whose_name_is_no_utf_8_is_read_under_a_name_that_can_be_written(tmp_path: Path) -> None:
    folder = os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9")
    collection = Collection.load(write_beir(Path(folder)))
    assert collection.name == f"{tmp_path}/caf\\xe9/train"
    assert collection.num_documents == 3


def test_a_collection_without_positives_cannot_train() -> None:
    collection = Collection.from_dict({"d": "text"}, {"q": "query"}, {"q": {"d": 0}})
    with pytest.raises(CollectionError, match="no query has a relevant document"):
        collection.require_positives()


@given(number=st.integers(2, 60), share=st.floats(0.01, 0.9), seed=st.integers(0, 5))
def test_holding_out_splits_the_queries(number: int, share: float, seed: int) -> None:
    collection = Collection.from_dict(
        {"d": "text"}, {f"q{i}": f"query {i}" for i in range(number)}, {f"q{i}": {"d": 1} for i in range(number)}
    )
    rest, held_out = collection.hold_out(share, seed)
    assert set(rest.queries) | set(held_out.queries) == set(collection.queries)
    assert not set(rest.queries) & set(held_out.queries)
    assert len(held_out.queries) == max(1, round(number * share))
    assert set(held_out.judgments) == set(held_out.queries)
    assert held_out.queries == collection.hold_out(share, seed)[1].queries


@given(number=st.integers(1, 30), wanted=st.integers(1, 40), seed=st.integers(0, 3))
def test_a_sample_keeps_the_order_and_no_more_than_was_asked_for(number: int, wanted: int, seed: int) -> None:
    collection = Collection.from_dict(
        {"d": "text"}, {f"q{i}": f"query {i}" for i in range(number)}, {f"q{i}": {"d": 1} for i in range(number)}
    )
    sample = collection.sample(wanted, seed)
    assert len(sample.queries) == len(sample.judgments) == min(number, wanted)
    assert list(sample.queries) == [query_id for query_id in collection.queries if query_id in sample.queries]
    assert sample.queries == collection.sample(wanted, seed).queries


class Unreachable:
    """A dataset of ir_datasets whose documents cannot be had."""

    def __init__(self, error: OSError) -> None:
        self._error = error

    def docs_namespace(self) -> str:
        return "far/away"

    def docs_iter(self) -> Any:
        yield from ()
        raise self._error

    def docs_store(self) -> Any:
        raise self._error


def test_documents_that_ir_datasets_cannot_download_are_said_with_a_remedy() -> None:
    pytest.importorskip("ir_datasets")
    there = IrdsCorpus(Unreachable(ConnectionError("no route")), None)
    for read in (lambda: list(there), lambda: there.get(["d1"])):
        with pytest.raises(CollectionError, match=r"far/away: .* its documents \(no route\). Check the network"):
            read()
    full = IrdsCorpus(Unreachable(OSError(errno.ENOSPC, "No space left on device")), None)
    with pytest.raises(OSError, match="No space left on device"):
        list(full)
