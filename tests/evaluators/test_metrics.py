"""The metrics against their formulas, trec_eval (by pytrec_eval) and beir."""

from __future__ import annotations

import math

import numpy as np
import pytest
import pytrec_eval
from beir.retrieval.evaluation import EvaluateRetrieval
from hypothesis import given, settings
from hypothesis import strategies as st

from evaluators import CollectionEvaluator
from evaluators.metrics import Metric, mean_scores, parse_metrics, score_queries
from st_clp import Collection
from st_clp.data import MemoryCorpus
from tests.fresh import run_fresh

DOC_IDS = [f"d{number}" for number in range(12)]
QUERY_IDS = [f"q{number}" for number in range(5)]
CUTS = (1, 2, 3, 5, 10, 100)

grades = st.dictionaries(st.sampled_from(DOC_IDS), st.integers(0, 3), min_size=1)
judgment_sets = st.dictionaries(st.sampled_from(QUERY_IDS), grades, min_size=1)
# Few distinct scores, so that ties are common. trec_eval compares float32 numbers, so the last two tie with others.
scores = st.sampled_from([0.0, 0.25, 0.5, 0.75, 1.0, -1.0, 0.5 + 1e-12, 1.0 - 1e-12])
documents = st.dictionaries(st.sampled_from(DOC_IDS), scores)


@st.composite
def judged_runs(draw):
    """Judgments, and a run that answers exactly the judged queries, some of them with nothing."""
    judgments = draw(judgment_sets)
    return judgments, {query_id: draw(documents) for query_id in judgments}


def ranking(documents: dict[str, float]) -> list[str]:
    """As trec_eval ranks: best score first, equal scores by descending document id."""
    return sorted(documents, key=lambda doc_id: (np.float32(documents[doc_id]), doc_id), reverse=True)


def by_formula(grades: dict[str, int], ranked: list[str], family: str, k: int) -> float:
    relevant = {doc_id for doc_id, grade in grades.items() if grade > 0}
    if not relevant:
        return 0.0
    hits = [doc_id in relevant for doc_id in ranked[:k]]
    if family == "ndcg":
        gains = [grades.get(doc_id, 0) for doc_id in ranked[:k]]
        ideal = sorted(grades.values(), reverse=True)[:k]
        dcg, best = (sum(g / math.log2(rank + 2) for rank, g in enumerate(row)) for row in (gains, ideal))
        return dcg / best
    if family == "recall":
        return sum(hits) / len(relevant)
    if family == "precision":
        return sum(hits) / k
    if family == "mrr":
        return next((1 / (rank + 1) for rank, hit in enumerate(hits) if hit), 0.0)
    return sum(sum(hits[: rank + 1]) / (rank + 1) for rank, hit in enumerate(hits) if hit) / len(relevant)


@settings(max_examples=150, deadline=None)
@given(judged_runs(), st.sampled_from(CUTS))
def test_each_query_scores_what_the_formulas_say(judged_run, k) -> None:
    judgments, run = judged_run
    metrics = parse_metrics(f"{family}@{k}" for family in ("ndcg", "recall", "precision", "mrr", "map"))
    found = score_queries(judgments, run, metrics)
    assert found.keys() == judgments.keys()
    for query_id, values in found.items():
        ranked = ranking(run[query_id])
        for metric in metrics:
            expected = by_formula(judgments[query_id], ranked, metric.family, k)
            assert values[metric.name] == pytest.approx(expected, abs=1e-9), (query_id, metric)


@settings(max_examples=60, deadline=None)
@given(judged_runs())
def test_means_are_those_of_beirs_evaluate_retrieval_in_full(judged_run) -> None:
    judgments, run = judged_run
    families = {"NDCG": "ndcg", "MAP": "map", "Recall": "recall", "P": "precision"}
    metrics = [Metric(family, k) for family in families.values() for k in CUTS]
    means = mean_scores(score_queries(judgments, run, metrics).values())
    answers = EvaluateRetrieval.evaluate(judgments, {q: dict(d) for q, d in run.items()}, list(CUTS))
    for answer in answers:
        for key, value in answer.items():
            family, _, k = key.partition("@")
            assert means[f"{families[family]}@{k}"] == pytest.approx(value, abs=5.001e-6)


@settings(max_examples=100, deadline=None)
@given(judged_runs())
def test_values_are_pytrec_evals_to_the_last_digit(judged_run) -> None:
    judgments, run = judged_run
    found = score_queries(judgments, run, parse_metrics(["ndcg@10", "ndcg@3", "recall@5", "map@10", "p@7", "mrr@12"]))
    measures = {"ndcg_cut.3,10", "recall.5", "map_cut.10", "P.7", "recip_rank"}
    expected = pytrec_eval.RelevanceEvaluator(judgments, measures).evaluate(run)
    for query_id in judgments:
        assert found[query_id] == {
            "ndcg@10": expected[query_id]["ndcg_cut_10"],
            "ndcg@3": expected[query_id]["ndcg_cut_3"],
            "recall@5": expected[query_id]["recall_5"],
            "map@10": expected[query_id]["map_cut_10"],
            "precision@7": expected[query_id]["P_7"],
            "mrr@12": expected[query_id]["recip_rank"],
        }


@settings(max_examples=40, deadline=None)
@given(judged_runs())
def test_identical_ids_are_left_out_as_by_beirs_evaluate_retrieval(judged_run) -> None:
    # Queries are numbered as documents are.
    judgments, run = ({f"d{q[1:]}": dict(documents) for q, documents in part.items()} for part in judged_run)
    collection = Collection(MemoryCorpus("c", dict.fromkeys(DOC_IDS, "text")), dict.fromkeys(run, "text"), judgments)
    found = CollectionEvaluator(collection, metrics=["ndcg@3", "recall@5", "map@10", "p@2"]).score(run)
    answers = EvaluateRetrieval.evaluate(judgments, {q: dict(d) for q, d in run.items()}, [2, 3, 5, 10])
    beir = {key: value for answer in answers for key, value in answer.items()}
    expected = {"ndcg@3": "NDCG@3", "recall@5": "Recall@5", "map@10": "MAP@10", "precision@2": "P@2"}
    assert {name: round(value, 5) for name, value in found.items()} == {
        name: pytest.approx(beir[key], abs=1.001e-5) for name, key in expected.items()
    }


@pytest.mark.parametrize("rank", range(1, 50))
def test_mrr_is_cut_exactly_at_k(rank: int) -> None:
    run = {"q": {f"d{number:02}": -float(number) for number in range(1, 51)}}
    metrics = [Metric("mrr", k) for k in range(1, 51)]
    found = score_queries({"q": {f"d{rank:02}": 1}}, run, metrics)["q"]
    assert found == {f"mrr@{k}": 1 / rank if rank <= k else 0.0 for k in range(1, 51)}


def test_a_judged_query_without_an_answer_scores_nothing_and_counts() -> None:
    judgments = {"answered": {"d": 1}, "not in the run": {"d": 1}, "not relevant": {"d": 0}, "negative": {"d": -1}}
    run = {"answered": {"d": 1.0}, "not relevant": {"d": 1.0}, "negative": {"d": 1.0}, "not judged": {"d": 1.0}}
    found = score_queries(judgments, run, parse_metrics(["ndcg@10", "mrr@10"]))
    assert found.keys() == judgments.keys()
    assert mean_scores(found.values()) == {"ndcg@10": 0.25, "mrr@10": 0.25}


def test_names_are_read_with_capitals_and_short_forms_once() -> None:
    assert [metric.name for metric in parse_metrics(["nDCG@10", "P@5", "precision@5", "MRR@1"])] == [
        "ndcg@10",
        "precision@5",
        "mrr@1",
    ]


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["accuracy@10"], r"unknown metric 'accuracy@10'; known are ndcg@k, recall@k, map@k, precision@k, mrr@k"),
        (["ndcg"], r"'ndcg' needs a whole number after the @, such as ndcg@10"),
        (["ndcg@ten"], "needs a whole number"),
        (["recall@0"], "cut-off below 1"),
        (["recall@-5"], "cut-off below 1"),
        ([], "at least one metric"),
        ("ndcg@10", r"write \['ndcg@10'\]"),
    ],
)
def test_a_wrong_metric_is_refused(names, message) -> None:
    with pytest.raises(ValueError, match=message):
        parse_metrics(names)


def test_pytrec_eval_is_needed_only_to_score_and_its_absence_says_what_to_install() -> None:
    code = (
        "import sys\n"
        "for name in ('faiss', 'beir', 'ir_datasets', 'pytrec_eval'): sys.modules[name] = None\n"
        "import evaluators\n"
        "from evaluators.metrics import parse_metrics, score_queries\n"
        "try: score_queries({'q': {'d': 1}}, {'q': {'d': 1.0}}, parse_metrics(['ndcg@10']))\n"
        "except ModuleNotFoundError as error: print(error)\n"
    )
    assert "pip install beir" in run_fresh(code).stdout
