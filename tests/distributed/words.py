"""A collection of random words to work on, and what a store holds."""

from __future__ import annotations

import json
import random
from pathlib import Path

from st_clp.data import Collection

WORDS = "river lake mountain city king queen book song red blue green water fire stone gold one two three".split()
NUMBER = 2500  # documents: five windows


def collection_of_words(number: int = NUMBER, queries: int = 20) -> Collection:
    """Documents, and queries that each have one of them as their answer."""
    generator = random.Random(0)
    documents = {f"d{n}": " ".join(generator.choices(WORDS, k=generator.randrange(1, 12))) for n in range(number)}
    asked = {f"q{n}": " ".join(generator.choices(WORDS, k=3)) for n in range(queries)}
    judgments = {query_id: {f"d{generator.randrange(number)}": 1} for query_id in asked}
    return Collection.from_dict(documents, asked, judgments, name="words")


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def write_beir(collection: Collection, folder: Path) -> Path:
    (folder / "qrels").mkdir(parents=True)
    lines = [json.dumps({"_id": d.doc_id, "text": d.text}) for d in collection.corpus]
    (folder / "corpus.jsonl").write_text("\n".join(lines) + "\n")
    lines = [json.dumps({"_id": query_id, "text": text}) for query_id, text in collection.queries.items()]
    (folder / "queries.jsonl").write_text("\n".join(lines) + "\n")
    rows = [f"{q}\t{d}\t{g}" for q, grades in collection.judgments.items() for d, g in grades.items()]
    (folder / "qrels" / "train.tsv").write_text("query-id\tcorpus-id\tscore\n" + "\n".join(rows) + "\n")
    return folder
