"""The tiny model and the collections that both campaigns use."""

from __future__ import annotations

import importlib.util
import json
import random
import sys
from pathlib import Path
from types import ModuleType

TESTS = Path(__file__).resolve().parents[1]
sys.path.append(str(TESTS.parent))  # modules of the tests name others of theirs


def tests_module(path: str) -> ModuleType:
    """A module of the tests that is no package's, such as ``conftest.py``, with the builders that are in it."""
    spec = importlib.util.spec_from_file_location(
        "campaigns_" + path.replace("/", "_").removesuffix(".py"), TESTS / path
    )
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def tiny_model(folder: Path, **options: object) -> Path:
    """A SentenceTransformer of width 32 with random weights, and dropout, so that lost random state would show."""
    return tests_module("conftest.py").build_tiny_model(folder, **options)


def small_collection(folder: Path, *, seed: int = 0) -> Path:
    """90 documents, 120 training queries and 60 to evaluate on."""
    return tests_module("integration/conftest.py").write_collection(folder, seed=seed)


def larger_collection(folder: Path, *, documents: int = 2300, queries: int = 240) -> Path:
    """Several shards of documents, with queries to train and to evaluate on."""
    words = tests_module("conftest.py").WORDS
    generator = random.Random(documents)
    texts = [" ".join(generator.choices(words, k=generator.randint(4, 50))) for _ in range(documents)]
    (folder / "qrels").mkdir(parents=True)
    corpus = [json.dumps({"_id": f"d{i}", "title": "", "text": text}) for i, text in enumerate(texts)]
    asked = [json.dumps({"_id": f"q{i}", "text": f"where is {texts[i * 5][:20]}"}) for i in range(queries)]
    (folder / "corpus.jsonl").write_text("\n".join(corpus) + "\n", encoding="utf-8")
    (folder / "queries.jsonl").write_text("\n".join(asked) + "\n", encoding="utf-8")
    for number, split in enumerate(("train", "dev")):
        lines = [f"q{i}\td{i * 5}\t1" for i in range(number, queries, 2)]
        (folder / "qrels" / f"{split}.tsv").write_text("query-id\tcorpus-id\tscore\n" + "\n".join(lines) + "\n")
    return folder
