"""Small collections that tests work on, in memory and as BEIR folders, and the settings of a short run."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from st_clp.data import Collection
from st_clp.settings import RunSettings

# Words that the tiny models of conftest.py know.
WORDS = "river lake mountain city country money bank language people capital red blue green old new big small".split()


def make_collection(
    documents: int = 30,
    queries: int = 12,
    *,
    judgments: Mapping[str, Mapping[str, int]] | None = None,
    text: str = "the {one} of {other} {number}",
) -> Collection:
    """Query i is answered by document i, if there are no other judgments; the documents beyond answer none.

    Args:
        documents, queries: How many.
        judgments: Query id to {document id: grade}.
        text: A document's, of two words and its number.
    """
    texts = {f"d{i}": text.format(one=WORDS[i % 17], other=WORDS[(i * 5 + 1) % 17], number=i) for i in range(documents)}
    asked = {f"q{i}": f"which {WORDS[i % 17]} is {WORDS[(i * 3) % 17]}?" for i in range(queries)}
    grades = {query_id: dict(found) for query_id, found in judgments.items()} if judgments else None
    return Collection.from_dict(texts, asked, grades or {f"q{i}": {f"d{i}": 1} for i in range(queries)}, name="toy")


def write_beir(collection: Collection, folder: Path, splits: Iterable[str] = ("train",)) -> Path:
    """A collection as a BEIR folder; each split has all its judgments."""
    (folder / "qrels").mkdir(parents=True)
    documents = [{"_id": d.doc_id, "title": "", "text": d.text} for d in collection.documents()]
    queries = [{"_id": query_id, "text": text} for query_id, text in collection.queries.items()]
    for name, rows in (("corpus", documents), ("queries", queries)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    lines = [f"{q}\t{d}\t{grade}\n" for q, grades in collection.judgments.items() for d, grade in grades.items()]
    for split in splits:
        (folder / "qrels" / f"{split}.tsv").write_text("query-id\tcorpus-id\tscore\n" + "".join(lines))
    return folder


def settings_of(model: Path, collection: Path, output: Path, **changes: Any) -> RunSettings:
    """Settings of a run that trains a tiny model on a collection in seconds.

    Two experts and no queries but those that were asked, if nothing is said.
    """
    values: dict[str, Any] = {
        "model": str(model),
        "collection": [str(collection)],
        "output": str(output),
        "sentence_queries": 0,
        "num_negatives": 2,
        "range_max": 20,
        "batch_size": 16,
        "epochs": 4,
        "learning_rate": 3e-3,
        "scale": 20,
        "experts": 2,
        "average_with_base": "1",
        "bf16": False,
        "training_arg": {"disable_tqdm": True},
    }
    return RunSettings(**{**values, **changes})
