"""A small collection with graded judgments that a tiny model neither solves nor fails."""

from __future__ import annotations

import itertools
import json
import random
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from evaluators import BenchmarkEvaluator
from evaluators.evaluation import Evaluation
from evaluators.runs import Run
from st_clp import Collection

KINDS = "river lake mountain city bank school king queen".split()
COLOURS = "red blue green gold silver".split()


@pytest.fixture
def collection() -> Collection:
    """40 documents, 40 queries; a document of the asked kind and colour has grade 2, one of the kind alone 1."""
    triples = list(itertools.product(KINDS, COLOURS))
    documents = {f"d{n}": f"the {colour} {kind} of the north is old" for n, (kind, colour) in enumerate(triples)}
    queries = {f"q{n}": f"where is a {kind} , {colour} and big" for n, (kind, colour) in enumerate(triples)}
    judgments = {
        f"q{n}": {
            f"d{m}": 1 + (other_colour == colour) if other_kind == kind else 0
            for m, (other_kind, other_colour) in enumerate(triples)
            if other_kind == kind or other_colour == colour
        }
        for n, (kind, colour) in enumerate(triples)
    }
    return Collection.from_dict(documents, queries, judgments, name="miracl/xx/dev", language="en", split="dev")


def make_random_run(collection: Collection, *, seed: int, skill: float = 0.5, depth: int = 20) -> Run:
    """A run that puts each relevant document among random ones, the higher the greater the skill."""
    generator = random.Random(f"{collection.name} {seed}")
    doc_ids = [document.doc_id for document in collection.documents()]
    run: Run = {}
    for query_id, grades in collection.judgments.items():
        documents = {doc_id: generator.random() for doc_id in generator.sample(doc_ids, min(depth, len(doc_ids)))}
        documents |= {doc_id: skill + generator.random() / 2 for doc_id, grade in grades.items() if grade > 0}
        run[query_id] = documents
    return run


@pytest.fixture
def random_run() -> Callable[..., Run]:
    """``random_run(collection, seed=1, skill=0.5)``: relevant documents among random ones."""
    return make_random_run


class EvaluationMaker:
    """Saves runs of collections as evaluations: ``make("a", {"ko": collection}, skill=0.7)``."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __call__(
        self,
        name: str,
        collections: Mapping[str, Collection],
        *,
        runs: Mapping[str, Run] | None = None,
        seed: int = 0,
        skill: float = 0.5,
        metrics: Sequence[str] = ("ndcg@10", "mrr@10"),
        **settings: Any,
    ) -> Evaluation:
        evaluator = BenchmarkEvaluator(collections, "", metrics, **settings)
        for key, part in evaluator.parts.items():
            part.score(runs[key] if runs else make_random_run(part.collection, seed=seed, skill=skill))
        return evaluator.save(self.folder / "evaluations" / name.replace("/", "_"), model_name=name)


@pytest.fixture(scope="session")
def evaluations_in() -> Callable[[Path], EvaluationMaker]:
    """``evaluations_in(folder)`` makes what :func:`make_evaluation` is."""
    return EvaluationMaker


@pytest.fixture
def make_evaluation(tmp_path: Path) -> EvaluationMaker:
    """Save runs of collections as an evaluation in the test's folder."""
    return EvaluationMaker(tmp_path)


REPORT: dict[str, Any] = {
    "mining": {
        "miracl/ko/train": {
            "collection": "miracl/ko/train",
            "queries": 1234,
            "rows": 1200,
            "rows_relaxed": 34,
            "negatives": {"ranked": 2400},
            "filtered": {"too near the positive": 77},
            "with_query": 900,
            "scores": {
                "positives": {"count": 10, "edges": [0.0, 0.5, 1.0], "counts": [2, 8]},
                "negatives": {"count": 10, "edges": [0.0, 0.5, 1.0], "counts": [7, 3]},
            },
        }
    },
    "training": {
        "history": [
            {"step": step, "loss": 3 / step, "learning_rate": 1e-5 * step, "grad_norm": float("nan")}
            for step in range(1, 40)
        ],
        "refreshes": [
            {
                "step": 0,
                "status": "first",
                "seconds": 12,
                "mean_negative_score": 0.5,
                "mean_positive_score": 0.7,
                "collections": {"ko": {"mean_negative_score": 0.5, "mean_positive_score": 0.7, "changed": None}},
            },
            {
                "step": 20,
                "status": "used",
                "age": 20,
                "changed": 0.35,
                "above_positive": 0.02,
                "collections": {"ko": {"changed": 0.4, "above_positive": 0.02}, "fa": {"changed": 0.3}},
            },
            {"step": 30, "collections": {"ko": {"changed": 0.2, "something new": "!"}, "fa": {}}},
            {"step": 40, "status": "failed", "error": "the disk is full", "collections": {}},
        ],
    },
    "expert_usage": {
        "layers": [
            {"layer": 0, "tokens": [30, 70], "groups": {"ko": [10, 30], "fa": [20, 40]}},
            {"layer": 1, "tokens": [100, 0], "groups": {"ko": [40, 0], "fa": [60, 0]}},
        ],
        "dead": [[1, 1]],
    },
    "seconds": {"mine": 12.3, "train": 456.0},
}


@pytest.fixture(scope="session")
def report() -> dict[str, Any]:
    """What a training run with refreshed negatives and a mixture of experts reports."""
    return REPORT


HOSTILE_TEXTS = [
    "<script>window.hacked = 1</script>",
    "<img src=x onerror='window.hacked = 1'>",
    '"><svg onload="window.hacked = 1">',
    "</title></style><b>bold</b>",
    "{{ 7 * 7 }} {% raw %} &lt;i&gt; &amp;",
]


@pytest.fixture
def hostile(tmp_path: Path, make_evaluation: Callable[..., Any]) -> list[Any]:
    """Two evaluations whose texts, ids and names are markup, from a folder that the page reads."""
    folder = tmp_path / "hostile"
    (folder / "qrels").mkdir(parents=True)
    ids = [re.sub(r"\s", "", text) for text in HOSTILE_TEXTS]
    rows = [
        json.dumps({"_id": i, "title": "", "text": f"document {t}"}) for i, t in zip(ids, HOSTILE_TEXTS, strict=True)
    ]
    (folder / "corpus.jsonl").write_text("\n".join(rows))
    rows = [json.dumps({"_id": f"q{i}", "text": f"query {t}"}) for i, t in zip(ids, HOSTILE_TEXTS, strict=True)]
    (folder / "queries.jsonl").write_text("\n".join(rows))
    lines = [f"q{doc_id}\t{doc_id}\t1" for doc_id in ids]
    (folder / "qrels" / "test.tsv").write_text("\n".join(["query-id\tcorpus-id\tscore", *lines]) + "\n")
    collection = Collection.load(str(folder), split="test")
    right = {f"q{i}": {i: 1.0, ids[n - 1]: 0.5} for n, i in enumerate(ids)}
    wrong = {f"q{i}": {i: 0.5, ids[n - 1]: 1.0} for n, i in enumerate(ids)}
    return [
        make_evaluation(HOSTILE_TEXTS[0], {"c": collection}, runs={"c": wrong}),
        make_evaluation(HOSTILE_TEXTS[1], {"c": collection}, runs={"c": right}),
    ]


HOSTILE_REPORT = {
    "mining": {HOSTILE_TEXTS[2]: {"collection": HOSTILE_TEXTS[2], "queries": 1, "negatives": {HOSTILE_TEXTS[0]: 3}}},
    "training": {
        "refreshes": [
            {"step": 1, "collections": {HOSTILE_TEXTS[1]: {"changed": 0.5}, "b": {}}},
            {"step": 2, "status": "failed", "error": HOSTILE_TEXTS[0]},
        ]
    },
    "expert_usage": {"layers": [{"layer": 0, "tokens": [1, 1], "groups": {HOSTILE_TEXTS[2]: [1, 1]}}], "dead": []},
}


@pytest.fixture
def hostile_texts() -> list[str]:
    """Texts that are markup."""
    return HOSTILE_TEXTS


@pytest.fixture
def hostile_report() -> dict[str, Any]:
    """A training run whose names are markup."""
    return HOSTILE_REPORT
