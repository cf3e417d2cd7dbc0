"""A small English collection as a BEIR folder, that a tiny model can learn."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest

KINDS = "river lake mountain city country bank school king queen bird fish tree".split()
COLOURS = "red blue green gold silver old new big small".split()
PLACES = "north south east west".split()


def write_collection(folder: Path, *, seed: int = 0, dev: bool = True) -> Path:
    """Documents name a kind, a colour and a place; queries ask for them in other words. Dev queries ask for others."""
    generator = random.Random(seed)
    triples = [(kind, colour, place) for kind in KINDS for colour in COLOURS for place in PLACES]
    generator.shuffle(triples)
    triples = triples[:90]
    (folder / "qrels").mkdir(parents=True)
    lines: dict[str, list[str]] = {"corpus": [], "queries": [], "train": [], "dev": []}
    for number, (kind, colour, place) in enumerate(triples):
        text = f"in the {place} is a {kind} of the people , {colour} and one of ten"
        lines["corpus"].append(json.dumps({"_id": f"d{number}", "title": f"{kind} {number}", "text": text}))
        split = "dev" if dev and number % 3 == 0 else "train"
        for which, query in enumerate((f"where is the {colour} {kind}", f"what {kind} is in the {place}")):
            query_id = f"q{number}-{which}"
            lines["queries"].append(json.dumps({"_id": query_id, "text": query}))
            lines[split].append(f"{query_id}\td{number}\t1")
    for name in ("corpus", "queries"):
        (folder / f"{name}.jsonl").write_text("\n".join(lines[name]) + "\n")
    for split in ("train", "dev") if dev else ("train",):
        (folder / "qrels" / f"{split}.tsv").write_text("query-id\tcorpus-id\tscore\n" + "\n".join(lines[split]) + "\n")
    return folder


@pytest.fixture
def other_collection_path(tmp_path: Path) -> Path:
    return write_collection(tmp_path / "other collection", seed=1)


@pytest.fixture(scope="session")
def collection_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_collection(tmp_path_factory.mktemp("data") / "collection")
