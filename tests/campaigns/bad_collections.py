"""Bad collections, training rows and run files."""

from __future__ import annotations

import gzip
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from cases import DEEP, Case, Place, as_nobody, documents

HALF = '"\\ud83d"'  # half a surrogate pair, as JSON may have it


def _corpus(name: str, line: str | bytes, message: str, *, mine: bool = False) -> Case:
    def build(place: Place) -> list[str]:
        folder = place.beir(corpus=documents(d1=line))
        return place.mine(folder) if mine else place.evaluate(folder)

    return Case(name, build, rf"corpus\.jsonl, (line 2|after line \d)\b.*{message}")


def _queries(name: str, line: str, message: str) -> Case:
    first = json.dumps({"_id": "q0", "text": "where is it"})
    return Case(
        name, lambda place: place.evaluate(place.beir(queries=[first, line])), rf"queries\.jsonl, line 2\b.*{message}"
    )


def _grade(name: str, line: str, message: str = "", *, header: bool = True) -> Case:
    lines = ["q0\td0\t1", line] if header else [line, "q1\td1\t1"]
    return Case(
        name,
        lambda place: place.evaluate(place.beir(qrels=lines, header=header)),
        rf"\w+\.tsv, line {3 if header else 1}\b.*{message}",
    )


def _judged(name: str, qrels: list[str], message: str, *, code: int = 0) -> Case:
    return Case(name, lambda place: place.evaluate(place.beir(qrels=qrels)), message, code=code)


def _rows(name: str, line: str, message: str) -> Case:
    good = json.dumps({"query": "where is it", "pos": ["the red river"], "neg": ["a lake"]})
    return Case(
        name,
        lambda place: place.mine(place.write("rows.jsonl", f"{good}\n{line}\n")),
        rf"rows\.jsonl, line 2\b.*{message}",
    )


def _run_file(name: str, content: str | bytes, message: str) -> Case:
    def build(place: Place) -> list[str]:
        file = place.write("run.trec", content)
        return ["evaluate", "--from-run", str(file), "--collection", str(place.beir()), "--output", str(place.out)]

    return Case(name, build, message)


def _from_dict(grade: Any, message: str) -> Case:
    def work() -> None:
        from st_clp import Collection
        from st_clp.data import CollectionError

        try:
            Collection.from_dict({"d": "a river"}, {"q": "where"}, {"q": {"d": grade}})
        except CollectionError as error:
            raise SystemExit(f"CollectionError: {error}") from None

    return Case(f"Collection.from_dict with a grade of {grade!r}", lambda place: work, f"CollectionError: .*{message}")


def _spoilt(name: str, spoil: Callable[[Path], Any], message: str, **options: Any) -> Case:
    """A good collection with something done to its files."""

    def build(place: Place) -> list[str]:
        folder = place.beir()
        return place.evaluate(spoil(folder) or folder, "--split", "dev")

    return Case(name, build, message, **options)


def _cut_gzip(folder: Path) -> None:
    (folder / "corpus.jsonl.gz").write_bytes(gzip.compress((folder / "corpus.jsonl").read_bytes())[:-12])
    (folder / "corpus.jsonl").unlink()


def _windows(folder: Path) -> None:
    for file in (path for path in folder.rglob("*") if path.is_file()):
        file.write_bytes(b"\xef\xbb\xbf" + file.read_bytes().replace(b"\n", b"\r\n"))


def _named_in_bytes(folder: Path) -> str:
    target = os.fsencode(folder.parent) + b"/caf\xe9"
    os.rename(folder, target)
    return os.fsdecode(target)


def _folder_for_file(folder: Path) -> None:
    (folder / "queries.jsonl").unlink()
    (folder / "queries.jsonl").mkdir()


def _same_ending(name: str, command: str) -> Case:
    def build(place: Place) -> list[str]:
        one, two = (place.beir(name=f"{part}/data/mine") for part in ("one", "two"))
        given = "--collection", str(two)
        return place.run(*given, collection=one) if command == "run" else place.evaluate(one, *given)

    return Case(name, build, r"one[_/]data[_/]mine.*two[_/]data[_/]mine", code=0)


CASES = [
    _corpus("a document with half a surrogate", '{"_id": "d1", "text": ' + HALF + "}", "half"),
    _corpus("a document's id with half a surrogate", '{"_id": ' + HALF + ', "text": "a"}', "half"),
    _corpus("a document's id with half a surrogate, mined", '{"_id": ' + HALF + ', "text": "a"}', "half", mine=True),
    _corpus("a document's id with a space", '{"_id": "d 1", "text": "a"}', "white space"),
    _corpus("a document's id with a space, mined", '{"_id": "d 1", "text": "a"}', "white space", mine=True),
    _corpus("an empty id", '{"_id": "", "text": "a"}', "(id|text)"),
    _corpus("a corpus line nested too deep", '{"_id": "d1", "text": ' + DEEP + "}", "nested too deep"),
    _corpus("a corpus line that is no JSON", '{"_id": "d1", "text": ', "not valid JSON"),
    _corpus("a corpus line that is a list", "[1, 2]", "object is expected"),
    _corpus("a corpus line that is not UTF-8", b'{"_id": "d1", "text": "caf\xe9"}', "not UTF-8"),
    _corpus("a document without an id", '{"text": "a"}', "_id"),
    _corpus("a document without a text", '{"_id": "d1", "body": "a"}', "none of the fields"),
    _corpus("a document whose text is a list", '{"_id": "d1", "text": ["a"]}', "text"),
    _corpus("an id of 5,000 digits", '{"_id": ' + "7" * 5000 + ', "text": "a"}', "(digits|_id|cannot be read)"),
    _corpus("a document's id twice with two texts", '{"_id": "d0", "text": "another"}', "before with another text"),
    _queries("a query with half a surrogate", '{"_id": "q1", "text": ' + HALF + "}", "half"),
    _queries("a query's id with a space", '{"_id": "q 1", "text": "a"}', "white space"),
    _queries("a query's id twice with two texts", '{"_id": "q0", "text": "another"}', "before with another text"),
    _queries("a query whose text is null", '{"_id": "q1", "text": null}', "text"),
    _queries("a query line nested too deep", '{"_id": "q1", "text": ' + DEEP + "}", "nested too deep"),
    _grade("a grade that is a letter in the first line", "q0\td0\tx", header=False),
    _grade("a grade of two minus signs", "q1\td1\t--1"),
    _grade("a grade in superscript", "q1\td1\t²"),
    _grade("a grade that is a fraction", "q1\td1\t0.5"),
    _grade("a grade beyond trec_eval's", "q1\td1\t99999999999"),
    _grade("a grade of 5,000 digits", "q1\td1\t" + "7" * 5000),
    _grade("a judgment of two columns", "q1\td1"),
    _judged("a grade that took trec_eval forty seconds", ["q0\td0\t1", "q1\td1\t2000"], r"ndcg@10.*Written to"),
    _judged("a pair judged twice", ["q0\td0\t1", "q0\td0\t0", "q1\td1\t1"], "1 judgments that came again with another"),
    _judged(
        "judgments of absent documents",
        ["q0\td0\t1", "q0\tx\t1", "q1\ty\t2", "q2\td2\t1"],
        "2 judgments of documents that",
    ),
    _judged("judgments of absent documents alone", ["q0\tgone\t1"], "no judgment|none of .*judg|not there", code=1),
    Case("an empty corpus", lambda place: place.evaluate(place.beir(corpus=[])), r"corpus\.jsonl has no documents"),
    _judged("judgments of no query", ["q9\td0\t1"], "no judgment joins", code=1),
    _judged("an empty file of judgments", [], "no judgment|empty", code=1),
    _spoilt("no queries file", lambda f: (f / "queries.jsonl").unlink(), "queries.jsonl.*missing|needs corpus"),
    _spoilt("an unknown split", lambda f: (f / "qrels/dev.tsv").unlink(), "no split 'dev'.*it has train"),
    _spoilt("a folder in a file's place", _folder_for_file, r"queries\.jsonl"),
    _spoilt(
        "a file that may not be read",
        lambda folder: (folder / "corpus.jsonl").chmod(0o000),
        "Permission denied: .*corpus.jsonl",
        setup=as_nobody,
    ),
    _spoilt("a gzip file that was cut off", _cut_gzip, r"corpus\.jsonl\.gz, after line \d+: damaged or cut-off"),
    _spoilt("line ends and marks of Windows", _windows, "ndcg@10.*Written to", code=0),
    _spoilt("a folder name that is not UTF-8", _named_in_bytes, "is not valid UTF-8; rename"),
    Case("a folder that is no collection", lambda place: place.evaluate(place.folder), "has no corpus.jsonl"),
    Case("an unknown collection", lambda place: place.evaluate("miracl/kk"), "unknown collection.*miracl/k"),
    Case("a name with half a surrogate", lambda place: place.evaluate("\udcff"), "is not valid UTF-8"),
    _same_ending("two collections with one ending, evaluated", "evaluate"),
    _same_ending("two collections with one ending, in a run", "run"),
    Case(
        "a collection named twice",
        lambda place: place.run("--collection", str(place.materials.collection)),
        "a collection is named twice",
    ),
    _rows("a training row without pos", '{"query": "a"}', "pos"),
    _rows("a row with too few neg_q", '{"query": "a", "pos": ["b"], "neg": ["c", "d"], "neg_q": ["e"]}', "neg_q"),
    _rows(
        "a training row with a weight of NaN",
        '{"query": "a", "pos": ["b"], "neg": ["c"], "neg_q": [["e"]], "neg_q_source": [[""]], "neg_q_weight": [[NaN]]}',
        "neg_q_weight",
    ),
    _rows("a training row with half a surrogate", '{"query": "a", "pos": [' + HALF + "]}", "half"),
    _rows("a training row nested too deep", '{"query": "a", "pos": ' + DEEP + "}", "nested too deep"),
    _rows("a training row whose neg is a number", '{"query": "a", "pos": ["b"], "neg": 7}', "'neg' must be a list"),
    Case("an empty file of rows", lambda place: place.mine(place.write("rows.jsonl", "")), "rows.jsonl is empty"),
    *(_from_dict(grade, str(grade)) for grade in ("1", 0.5, float("nan"), None)),
    _run_file("a run file of five columns", "q0 Q0 d0 1 0.5\n", "run.trec, line 1: .*6 columns"),
    _run_file("a run file with a score of NaN", "q0 Q0 d0 1 nan x\n", "run.trec, line 1: .*not finite"),
    _run_file("a run file with a document twice", "q0 Q0 d0 1 2 x\nq0 Q0 d0 2 1 x\n", "run.trec, line 2.*comes twice"),
    _run_file("a run file of another collection", "x Q0 d0 1 2 x\n", "answers none of the queries"),
    _run_file("an empty run file", "", "run.trec is empty"),
    _run_file("a run file that is not UTF-8", b"q0 Q0 d\xff 1 2 x\n", "run.trec, line 1: not UTF-8"),
]
