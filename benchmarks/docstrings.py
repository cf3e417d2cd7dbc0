"""A collection of Python libraries' docstrings, in English: other text than MIRACL's, for a base that knows it.

    python benchmarks/docstrings.py docstrings --packages networkx sklearn
    st-clp run --model all-MiniLM-L6-v2 --collection docstrings --output out

A document is the docstring of a public function or class without its summary. A query is that summary, the first
paragraph, which its author wrote for readers who look for what it does. Names are not added, but examples use them.
Half of the documents have their queries to train on, and the others theirs to evaluate on; texts and summaries that are
equal are taken once, those that are only much alike may be in both halves. What a package has depends on its version,
which is printed. Packages are imported, and nothing in them is called.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.util
import inspect
import json
import re
import warnings
from collections import Counter
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

SUMMARY = range(4, 26)  # words of a summary that says what is looked for, and no more
SHORTEST = 40  # words of a document that says something
DEEPEST = 4  # modules and classes within one another


def objects(found: Any, name: str, seen: set[int], depth: int = 0) -> Iterator[tuple[str, Any]]:
    """Every public function and class of a module, and of the modules and classes in it, once."""
    if depth > DEEPEST or id(found) in seen:
        return
    seen.add(id(found))
    if not inspect.ismodule(found):
        yield name, found
    if not (inspect.ismodule(found) or inspect.isclass(found)):
        return
    package = name.split(".")[0]
    for part, inner in sorted(vars(found).items()):
        if part.startswith("_"):
            continue
        if inspect.ismodule(inner):
            if inner.__name__.split(".")[0] == package:
                yield from objects(inner, inner.__name__, seen, depth + 1)
        elif inspect.isclass(inner) or inspect.isroutine(inner):
            yield from objects(inner, f"{name}.{part}", seen, depth + 1)


def parts(docstring: str) -> tuple[str, str]:
    """The summary and the rest, each on one line."""
    summary, _, rest = re.sub(r"\n\s*\n", "\0", inspect.cleandoc(docstring), count=1).partition("\0")
    return " ".join(summary.split()), " ".join(rest.split())


def read_packages(packages: list[str]) -> tuple[dict[str, tuple[str, str]], Counter[str]]:
    """Name to (summary, rest), and how many docstrings are left out for which reason."""
    documents: dict[str, tuple[str, str]] = {}
    summaries, texts, left_out = set[str](), set[str](), Counter[str]()
    for package in packages:
        for name, found in objects(importlib.import_module(package), package, set()):
            docstring = getattr(found, "__doc__", None)
            if not isinstance(docstring, str):
                left_out["none"] += 1
                continue
            summary, text = parts(docstring)
            if len(summary.split()) not in SUMMARY or len(text.split()) < SHORTEST:
                left_out["short, or a summary that is long"] += 1
            elif re.match(r"\S*\(", summary):
                left_out["a signature for a summary"] += 1
            elif text in texts or summary.lower() in summaries:
                left_out["twice"] += 1
            else:
                texts.add(text)
                summaries.add(summary.lower())
                documents[name] = summary, text
    return documents, left_out


def write_collection(output: Path, documents: dict[str, tuple[str, str]]) -> dict[str, int]:
    """In BEIR's format; how many queries each split has."""
    (output / "qrels").mkdir(parents=True)
    corpus = [{"_id": name, "title": "", "text": text} for name, (_, text) in documents.items()]
    queries = [{"_id": f"summary-of-{name}", "text": summary} for name, (summary, _) in documents.items()]
    for file, rows in (("corpus", corpus), ("queries", queries)):
        (output / f"{file}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    judged: dict[str, list[str]] = {"train": [], "dev": []}
    for name in documents:
        half = hashlib.md5(name.encode(), usedforsecurity=False).digest()[-1] % 2
        judged["dev" if half else "train"].append(f"summary-of-{name}\t{name}\t1\n")
    for split, lines in judged.items():
        (output / "qrels" / f"{split}.tsv").write_text("query-id\tcorpus-id\tscore\n" + "".join(lines), "utf-8")
    return {split: len(lines) for split, lines in judged.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path, help="the new collection")
    parser.add_argument("--packages", nargs="+", required=True, metavar="NAME", help="packages that are installed")
    given = parser.parse_args()
    if given.output.exists():
        parser.error(f"{given.output} is there already: remove it, or name another folder")
    for package in given.packages:
        if importlib.util.find_spec(package) is None:
            parser.error(f"{package} is not installed: pip install {package}, or name other packages")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of old names that are looked at
        documents, left_out = read_packages(given.packages)
    if len(documents) < 2:
        parser.error(
            f"{', '.join(given.packages)}: {len(documents)} docstrings with summary and text, left out {dict(left_out)}"
            "; name other packages, or modules that a package imports only when they are asked for (scipy.stats)"
        )
    split = write_collection(given.output, documents)
    print(f"{len(documents):,} documents; {split['train']:,} queries to train on, {split['dev']:,} to evaluate on")
    print(f"left out: {dict(left_out)}")
    print("packages: " + ", ".join(f"{package} {version_of(package)}" for package in given.packages))


def version_of(package: str) -> str:
    """The version of the distribution that a package came with."""
    found = metadata.packages_distributions().get(package.split(".")[0])
    return metadata.version(found[0]) if found else "of Python itself"


if __name__ == "__main__":
    main()
