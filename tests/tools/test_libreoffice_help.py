"""The script that makes a collection of LibreOffice's help."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

import pytest

from st_clp.data import Collection

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "libreoffice_help.py"
SENTENCE = (
    "표에 줄을 넣으려면 메뉴에서 표를 고르고 줄 넣기를 누릅니다. 여러 줄을 고르면 그만큼의 줄이 한꺼번에 들어갑니다"
)


def page(title: str, text: str) -> str:
    return f"""<html><head><title>{title}</title><script>var no = 1;</script></head><body><p>menu</p>
<div id="DisplayArea"><h1>{title}</h1><script>var no = 2;</script><p>{text}</p></div></body></html>"""


def test_pages_and_entries_of_the_index_become_a_collection(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "ko"
    (folder / "text").mkdir(parents=True)
    pages = {f"p{n}": page(f"줄 {n}", f"{SENTENCE} {n}") for n in range(20)}
    pages |= {"english": page("Rows", "To insert rows in a table, choose the menu and then rows, and press the key.")}
    pages |= {"short": page("줄", "짧다"), "twice": page("다른 줄", f"{SENTENCE} 3")}
    for name, content in pages.items():
        (folder / "text" / f"{name}.html").write_text(content, encoding="utf-8")
    entry = '{{url:"ko/text/{page}.html?DbPAR=WRITER#bm", app:"WRITER", text:"{text}"}},\n'
    entries = [(f"p{n}", f"표 -- 줄 넣기 {n}") for n in range(20)]
    entries += [("p1", "English entry"), ("english", "영어 쪽"), *((f"p{n}", "모든 줄") for n in range(9))]
    lines = "".join(entry.format(page=name, text=text) for name, text in entries)
    (folder / "bookmarks.js").write_text(f"var bookmarks = [\n{lines}];", encoding="utf-8")
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), str(folder), str(tmp_path / "made")])
    runpy.run_path(str(SCRIPT), run_name="__main__")
    said = capsys.readouterr().out
    with pytest.raises(SystemExit):
        runpy.run_path(str(SCRIPT), run_name="__main__")
    assert "is there already: remove it" in capsys.readouterr().err
    assert "20 pages" in said
    assert "'not translated': 1, 'short': 1, 'twice': 1" in said
    train, dev = (Collection.load(str(tmp_path / "made"), split=split) for split in ("train", "dev"))
    assert len(train.queries) + len(dev.queries) == 20
    assert train.queries
    assert dev.queries
    asked_for = [{doc for found in split.judgments.values() for doc in found} for split in (train, dev)]
    assert not asked_for[0] & asked_for[1]
    for split in (train, dev):
        for query_id, found in split.judgments.items():
            number = split.queries[query_id].removeprefix("표 줄 넣기 ")
            assert found == {f"ko/text/p{number}.html": 1}
    documents = {document.doc_id: document for document in train.documents()}
    assert documents["ko/text/p3.html"].text.split() == f"줄 3 {SENTENCE} 3".split()
