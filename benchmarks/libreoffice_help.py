"""A collection of LibreOffice's help in a language with its own script: other text than MIRACL's to try a training on.

    apt-get install libreoffice-help-ko
    python benchmarks/libreoffice_help.py /usr/share/libreoffice/help/ko help-ko
    st-clp run --model MODEL --collection help-ko --output out

A document is a page. A query is an entry of the index that the help's writers made: some words for what is to be found,
not for the page that it is found on. The pages are divided into two halves; entries that lead to one half alone are to
train on, and those that lead to the other are to evaluate on. Pages and entries that are not translated are left out,
and so are entries that lead to more than three pages.
"""

from __future__ import annotations

import argparse
import hashlib
import html
import json
import re
from collections import Counter, defaultdict
from collections.abc import Mapping
from html.parser import HTMLParser
from pathlib import Path

SHORTEST = 60  # characters of a page that says something
BEGINNING = 1500  # characters that show which language it is in
MOST_PAGES = 3  # of an entry: what leads to more says too little
ENTRY = re.compile(r'\{url:"([^"?]*)[^"]*", app:"[^"]*", text:"((?:[^"\\]|\\.)*)"\}')


class Page(HTMLParser):
    """The title and the lines of a page."""

    def __init__(self, content: str) -> None:
        super().__init__()
        self.title, self._text, self._within, self._shown = "", "", Counter[str](), False
        self.feed(content)
        lines = [" ".join(line.split()) for line in self._text.split("\n")]
        self.lines = [line for line in lines if line]

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self._within[tag] += 1
        self._shown |= dict(attrs).get("id") == "DisplayArea"
        self._end_line(tag)

    def handle_endtag(self, tag: str) -> None:
        self._within[tag] -= 1
        self._end_line(tag)

    def handle_data(self, data: str) -> None:
        if self._within["title"] > 0:
            self.title += data.strip()
        elif self._shown and not any(self._within[tag] > 0 for tag in ("script", "style", "footer")):
            self._text += data

    def _end_line(self, tag: str) -> None:
        if tag in {"p", "h1", "h2", "h3", "li", "td", "div", "br"}:
            self._text += "\n"


def is_translated(text: str) -> bool:
    """Whether it is in another language than English, where that language has another script."""
    letters = [letter for letter in text if letter.isalpha()]
    return 2 * sum(not letter.isascii() for letter in letters) >= len(letters) > 2


def read_pages(folder: Path) -> tuple[dict[str, tuple[str, str]], Counter[str]]:
    """Page to (title, text), and how many pages are left out for which reason."""
    pages: dict[str, tuple[str, str]] = {}
    seen: set[str] = set()
    left_out: Counter[str] = Counter()
    for path in sorted(folder.rglob("*.html")):
        page = Page(path.read_text(encoding="utf-8", errors="replace"))
        text = "\n".join(page.lines[1:] if page.lines[:1] == [page.title] else page.lines)
        if len(text) < SHORTEST:
            left_out["short"] += 1
        elif not is_translated(text[:BEGINNING]):
            left_out["not translated"] += 1
        elif text in seen:
            left_out["twice"] += 1
        else:
            seen.add(text)
            pages[path.relative_to(folder.parent).as_posix()] = page.title, text
    return pages, left_out


def read_entries(folder: Path, pages: Mapping[str, object]) -> dict[str, set[str]]:
    """Index entry to the pages that it leads to."""
    entries: dict[str, set[str]] = defaultdict(set)
    for page, text in ENTRY.findall((folder / "bookmarks.js").read_text(encoding="utf-8")):
        entry = " ".join(html.unescape(text).replace(" -- ", " ").replace("\\", "").split())
        if page in pages and is_translated(entry):
            entries[entry].add(page)
    return {entry: found for entry, found in entries.items() if len(found) <= MOST_PAGES}


def write_collection(
    output: Path, pages: Mapping[str, tuple[str, str]], splits: Mapping[str, Mapping[str, set[str]]]
) -> None:
    """In BEIR's format."""
    (output / "qrels").mkdir(parents=True)
    documents = [{"_id": page, "title": title, "text": text} for page, (title, text) in pages.items()]
    ids = {entry: f"q{number}" for number, entry in enumerate(entry for split in splits.values() for entry in split)}
    for name, rows in (("corpus", documents), ("queries", [{"_id": id_, "text": entry} for entry, id_ in ids.items()])):
        lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in rows]
        (output / f"{name}.jsonl").write_text("".join(lines), encoding="utf-8")
    for name, entries in splits.items():
        judged = [f"{ids[entry]}\t{page}\t1\n" for entry, found in entries.items() for page in sorted(found)]
        (output / "qrels" / f"{name}.tsv").write_text("query-id\tcorpus-id\tscore\n" + "".join(judged), "utf-8")


def in_first_half(page: str) -> bool:
    """Whether entries that lead to a page are to train on."""
    return hashlib.md5(page.encode(), usedforsecurity=False).digest()[-1] % 2 == 0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="the help in one language")
    parser.add_argument("output", type=Path, help="the new collection")
    given = parser.parse_args()
    if not (given.folder / "bookmarks.js").is_file():
        parser.error(f"{given.folder} has no bookmarks.js: name a language's folder of the help")
    if given.output.exists():
        parser.error(f"{given.output} is there already: remove it, or name another folder")
    pages, left_out = read_pages(given.folder)
    entries = read_entries(given.folder, pages)
    if not entries:
        parser.error(f"{given.folder} has no translated page with an entry: name a language with its own script")
    train = {entry: found for entry, found in entries.items() if all(map(in_first_half, found))}
    dev = {entry: found for entry, found in entries.items() if not any(map(in_first_half, found))}
    write_collection(given.output, pages, {"train": train, "dev": dev})
    print(f"{len(pages):,} pages; {len(train):,} entries to train on, {len(dev):,} to evaluate on")
    print(
        f"left out: pages {dict(left_out)}; {len(entries) - len(train) - len(dev):,} entries that lead to both halves"
    )


if __name__ == "__main__":
    main()
