"""The script that makes a collection of packages' docstrings."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

import pytest

from st_clp.data import Collection

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "docstrings.py"
WORDS = " ".join(f"word{number}" for number in range(40))


def function(name: str, summary: str, rest: str) -> str:
    return f'def {name}():\n    """{summary}\n\n    {rest}\n    """\n\n\n'


def test_docstrings_become_a_collection(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    package = tmp_path / "somewhere" / "documented"
    package.mkdir(parents=True)
    code = "".join(function(f"f{n}", f"Return the number {n} of all.", f"{WORDS}\n    {n}") for n in range(20))
    code += function("short", "Return what is not described.", "Nothing.")
    code += function("twice", "Return the number 3 of all.", f"{WORDS} anew")
    code += function("signed", "signed(a, b, c) -> d and more", f"{WORDS} signed")
    code += function("_private", "Return what nobody calls.", f"{WORDS} private")
    (package / "__init__.py").write_text("import json\nfrom documented import inner\n" + code, encoding="utf-8")
    method = function("method", "Do what a method does.", f"{WORDS} method").replace("\n", "\n    ")
    (package / "inner.py").write_text("class Inner:\n    " + method.rstrip(), encoding="utf-8")
    monkeypatch.syspath_prepend(str(package.parent))
    output = tmp_path / "made"
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), str(output), "--packages", "documented"])
    runpy.run_path(str(SCRIPT), run_name="__main__")
    said = capsys.readouterr().out
    assert "21 documents" in said
    for reason in ("short, or a summary that is long", "a signature for a summary", "twice", "none"):
        assert f"'{reason}': 1" in said
    train, dev = (Collection.load(str(output), split=split) for split in ("train", "dev"))
    assert len(train.queries) + len(dev.queries) == 21
    assert train.queries
    assert dev.queries
    documents = {document.doc_id: document.text for document in train.documents()}
    assert documents["documented.f7"] == f"{WORDS} 7"
    assert documents["documented.inner.Inner.method"] == f"{WORDS} method"
    for split in (train, dev):
        for query_id, found in split.judgments.items():
            name = query_id.removeprefix("summary-of-")
            assert found == {name: 1}
            expected = f"Return the number {name[12:]} of all." if "Inner" not in name else "Do what a method does."
            assert split.queries[query_id] == expected
    for given, complaint in ((["documented"], "is there already"), (["nowhere"], "nowhere is not installed")):
        where = output if given == ["documented"] else tmp_path / "other"
        monkeypatch.setattr(sys, "argv", [str(SCRIPT), str(where), "--packages", *given])
        with pytest.raises(SystemExit):
            runpy.run_path(str(SCRIPT), run_name="__main__")
        assert complaint in capsys.readouterr().err
