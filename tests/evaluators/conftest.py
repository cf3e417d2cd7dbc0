"""A small collection with graded judgments that a tiny model neither solves nor fails."""

from __future__ import annotations

import itertools
import random
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


MakeEvaluation = Callable[..., Evaluation]


@pytest.fixture
def make_evaluation(tmp_path: Path) -> MakeEvaluation:
    """Save runs of collections as an evaluation: ``make_evaluation("a", {"ko": collection}, skill=0.7)``."""

    def make(
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
        return evaluator.save(tmp_path / "evaluations" / name.replace("/", "_"), model_name=name)

    return make
