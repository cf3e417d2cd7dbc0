"""Comparison of evaluations: the test, the interval and Holm's correction against computations of their own."""

from __future__ import annotations

import csv
import io
import itertools
import json
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from scipy.stats import false_discovery_control

from evaluators import CollectionEvaluator
from evaluators.comparison import compare, comparisons_text, holm, interval, most_changed, p_value
from evaluators.evaluation import Evaluation, EvaluationError, read_evaluation
from evaluators.page import write_page
from st_clp import Collection


def p_by_enumeration(samples: list[np.ndarray]) -> float:
    """The share of all ways to swap the two scores of each query that give as large a mean of means, either way."""
    observed = np.mean([sample.mean() for sample in samples])
    every = np.concatenate(samples)
    bounds = np.cumsum([len(sample) for sample in samples])[:-1]
    as_large = 0
    for signs in itertools.product((1, -1), repeat=len(every)):
        means = [part.mean() for part in np.split(every * np.array(signs), bounds)]
        as_large += abs(np.mean(means)) >= abs(observed) - 1e-12
    return as_large / 2 ** len(every)


differences = st.lists(st.sampled_from([-1.0, -0.5, -0.37, 0.0, 0.25, 0.63, 1.0]), min_size=1, max_size=5)


@settings(max_examples=40, deadline=None)
@given(st.lists(differences, min_size=1, max_size=2))
@example([[-1.0, -0.5, 0.0, 0.25, 1.0], [-0.5, -0.5, -0.37, 0.63, 1.0]])  # a mean of 0, but for rounding
def test_with_few_queries_the_p_value_is_exact(samples) -> None:
    arrays = [np.array(sample) for sample in samples]
    assert p_value(arrays, seed=0) == pytest.approx(p_by_enumeration(arrays), abs=1e-12)


def test_ties_are_not_drawn_for() -> None:
    """However many queries stay as they are, two that gain alike have four ways to be swapped, two of them as large."""
    assert p_value([np.array([0.0] * 500 + [0.5, 0.5])], seed=0) == 0.5


def test_with_many_queries_the_p_value_is_that_of_swaps_by_numpy() -> None:
    generator = np.random.default_rng(7)
    sample = generator.normal(0.0, 0.2, 400)
    sample += 0.018 - sample.mean()
    signs = np.random.default_rng(1).choice([-1.0, 1.0], (20_000, 400))
    expected = (np.abs((signs * sample).mean(axis=1)) >= abs(sample.mean())).mean()
    assert 0.01 < expected < 0.3
    assert p_value([sample], seed=0) == pytest.approx(expected, abs=4 * np.sqrt(expected * (1 - expected) / 10_000))
    assert p_value([sample], seed=0) == p_value([sample], seed=0)
    assert p_value([sample], seed=0) == pytest.approx(p_value([-sample], seed=3), abs=0.02)


def test_the_interval_holds_the_mean_as_often_as_it_says() -> None:
    generator = np.random.default_rng(0)
    held = 0
    for seed in range(50):
        low, high = interval([generator.normal(0.1, 0.5, 150)], seed)
        held += low <= 0.1 <= high
    assert 43 <= held <= 50
    # And it is as wide as the normal distribution has it.
    sample = generator.normal(0.1, 0.5, 1000)
    low, high = interval([sample], 0)
    assert (high - low) / 2 == pytest.approx(1.96 * sample.std() / np.sqrt(1000), rel=0.05)


def test_the_mean_over_collections_counts_each_the_same() -> None:
    generator = np.random.default_rng(0)
    small, large = generator.normal(0.5, 0.1, 50), generator.normal(0.0, 0.1, 2000)
    low, high = interval([small, large], 0)
    assert low < (small.mean() + large.mean()) / 2 < high
    deviation = np.sqrt(small.var() / 50 + large.var() / 2000) / 2
    assert (high - low) / 2 == pytest.approx(1.96 * deviation, rel=0.05)


@settings(max_examples=50, deadline=None)
@given(st.lists(st.floats(0, 1), min_size=1, max_size=18))
def test_holm_by_its_definition(values) -> None:
    ps = {str(number): p for number, p in enumerate(values)}
    found = holm(ps)
    ordered = sorted(values)
    for key, p in ps.items():
        # The largest of (number of hypotheses not yet rejected) x p over all that are no larger.
        expected = max(min(1.0, q * (len(values) - rank)) for rank, q in enumerate(ordered) if q <= p)
        assert found[key] == pytest.approx(expected)
    # Never below what controls the false discovery rate only.
    assert all(found[key] >= q - 1e-12 for key, q in zip(ps, false_discovery_control(values), strict=True))


@pytest.fixture
def two(collection) -> dict[str, Collection]:
    return {"ko": collection, "fa": replace(collection, name="miracl/yy/dev")}


def test_identical_runs_differ_by_nothing(two, make_evaluation) -> None:
    found = compare(make_evaluation("a", two), make_evaluation("b", two))
    assert [difference.key for difference in found.differences] == ["ko", "fa", "mean"]
    for difference in found.differences:
        assert (difference.difference, difference.low, difference.high) == (0, 0, 0)
        assert (difference.p, difference.p_adjusted) == (1, 1)
        assert (difference.wins, difference.losses) == (0, 0)
        assert difference.ties == difference.queries
    assert most_changed(found.changes["ko"], 10) == []


def test_a_shuffled_run_gets_the_p_value_of_an_independent_computation(collection, make_evaluation, random_run) -> None:
    run = random_run(collection, seed=0)
    ids, answers = list(run), list(run.values())
    shuffled = dict(zip(ids, answers[3:] + answers[:3], strict=True))
    before = make_evaluation("a", {"c": collection}, runs={"c": run})
    after = make_evaluation("b", {"c": collection}, runs={"c": shuffled})
    (found,) = compare(before, after).differences
    sample = np.array([after.query_scores["c"][q]["ndcg@10"] - before.query_scores["c"][q]["ndcg@10"] for q in ids])
    assert found.difference == pytest.approx(sample.mean())
    signs = np.random.default_rng(5).choice([-1.0, 1.0], (100_000, len(sample)))
    expected = (np.abs((signs * sample).mean(axis=1)) >= abs(sample.mean()) - 1e-12).mean()
    assert found.p == pytest.approx(expected, abs=4 * np.sqrt(expected * (1 - expected) / 10_000) + 2e-4)
    assert (found.wins, found.ties, found.losses) == tuple(
        int(n) for n in ((sample > 0).sum(), (sample == 0).sum(), (sample < 0).sum())
    )


def test_changes_are_in_order_and_named(collection, make_evaluation) -> None:
    before = make_evaluation("a", {"c": collection}, seed=1)
    after = make_evaluation("b", {"c": collection}, seed=2, skill=0.8)
    found = compare(before, after, "mrr@10")
    assert found.metric == "mrr@10"
    changes = found.changes["c"]
    assert {change.query_id for change in changes} == set(collection.queries)
    gains = [change.difference for change in changes]
    assert gains == sorted(gains, reverse=True)
    picked = most_changed(changes, 3)
    assert [change.difference for change in picked[:3]] == gains[:3]
    assert all(change.difference < 0 for change in picked[3:])
    lowest = [gain for gain in gains[::-1][:3] if gain < 0]
    assert [change.difference for change in picked[3:]] == lowest


def test_holm_is_applied_over_collections_and_not_to_their_mean(two, make_evaluation) -> None:
    found = compare(make_evaluation("a", two, seed=1), make_evaluation("b", two, seed=2, skill=0.6))
    single = {difference.key: difference.p for difference in found.differences[:2]}
    assert {difference.key: difference.p_adjusted for difference in found.differences[:2]} == holm(single)
    assert found.differences[2].p_adjusted == found.differences[2].p


def test_what_cannot_be_compared_is_refused_with_the_difference(two, collection, make_evaluation) -> None:
    a = make_evaluation("a", two)
    with pytest.raises(EvaluationError, match=r"the collections differ: only .*evaluations/a has fa"):
        compare(a, make_evaluation("b", {"ko": collection}))
    with pytest.raises(EvaluationError, match=r"only .*evaluations/a has fa and only .*evaluations/c has hi"):
        compare(a, make_evaluation("c", {"ko": collection, "hi": collection}))
    fewer = collection.with_queries(set(list(collection.queries)[2:]))
    with pytest.raises(
        EvaluationError, match=r"ko cannot be compared: 2 queries are only in .*/a and 0 only in .*/d, such as q0, q1"
    ):
        compare(a, make_evaluation("d", {**two, "ko": fewer}))
    judged = {q: dict(grades) for q, grades in collection.judgments.items()}
    judged["q0"]["d0"] = 1 - judged["q0"]["d0"] if judged["q0"]["d0"] < 2 else 1
    other = replace(collection, judgments=judged)
    with pytest.raises(EvaluationError, match="the queries are the same, but not their judgments"):
        compare(a, make_evaluation("e", {**two, "ko": other}))
    with pytest.raises(
        EvaluationError, match=r"evaluations/f has no ndcg@10; it has recall@5. Evaluate with --metric ndcg@10"
    ):
        compare(a, make_evaluation("f", two, metrics=["recall@5"]))
    with pytest.raises(ValueError, match="unknown metric 'accuracy@1'"):
        compare(a, a, "accuracy@1")


def test_another_number_of_documents_is_refused(tiny_model, collection, tmp_path) -> None:
    texts = {document.doc_id: document.text for document in collection.documents()}
    larger = Collection.from_dict({**texts, "more": "a tree"}, collection.queries, collection.judgments, name="larger")
    saved = []
    for name, found in (("a", collection), ("b", larger)):
        evaluator = CollectionEvaluator(found, name="c")
        evaluator(tiny_model)
        saved.append(evaluator.save(tmp_path / name, model_name=name))
    with pytest.raises(EvaluationError, match="one searched 40 documents and the other 41"):
        compare(*saved)


def test_pooled_and_full_figures_are_never_compared(two, make_evaluation, random_run) -> None:
    references = {key: random_run(collection, seed=9) for key, collection in two.items()}
    full = make_evaluation("full", two)
    pooled = make_evaluation("pooled", two, corpus="pooled", reference_runs=references, pool_depth=5)
    deeper = make_evaluation("deeper", two, corpus="pooled", reference_runs=references, pool_depth=10)
    with pytest.raises(
        EvaluationError, match=r"full is over the whole corpus and .*pooled is over judged documents and the best 5"
    ):
        compare(full, pooled)
    with pytest.raises(EvaluationError, match="only comparable with those over the same pool"):
        compare(pooled, deeper)
    again = make_evaluation("again", two, corpus="pooled", reference_runs=references, pool_depth=5, skill=0.9)
    found = compare(pooled, again)
    assert found.pooled
    rows = list(csv.DictReader(io.StringIO(comparisons_text([found], "csv"))))
    assert [row["collection"] for row in rows] == ["ko (pooled)", "fa (pooled)", "mean (pooled)"]
    assert "mean (pooled)" in comparisons_text([found], "latex")
    content = json.loads(comparisons_text([found], "json"))
    assert content[0]["pooled"] is True


def test_tables_hold_the_numbers_in_every_format(two, make_evaluation) -> None:
    found = compare(make_evaluation("model_a", two), make_evaluation("b & c", two, seed=3, skill=0.8))
    rows = list(csv.DictReader(io.StringIO(comparisons_text([found], "csv"))))
    assert [row["collection"] for row in rows] == ["ko", "fa", "mean"]
    for row, difference in zip(rows, found.differences, strict=True):
        for column, value in {
            "difference": difference.difference,
            "ndcg@10 before": difference.before,
            "ndcg@10 after": difference.after,
            "95% low": difference.low,
            "p": difference.p,
            "p (Holm)": difference.p_adjusted,
            "wins": difference.wins,
        }.items():
            assert float(row[column]) == pytest.approx(value)
    latex = comparisons_text([found], "latex")
    assert r"model\_a & b \& c & ko" in latex
    assert rf"{found.differences[0].difference:.4f}" in latex
    (content,) = json.loads(comparisons_text([found], "json"))
    assert content["differences"][2]["key"] == "mean"
    assert content["differences"][0]["p"] == found.differences[0].p
    assert len(content["changes"]["ko"]) <= 20
    best = found.changes["ko"][0]
    assert content["changes"]["ko"][0] == {
        "query_id": best.query_id,
        "before": best.before,
        "after": best.after,
        "difference": best.difference,
    }


@pytest.fixture
def in_precision(tiny_model, collection, tmp_path) -> Callable[..., Evaluation]:
    """Evaluate the tiny model in this precision; ``noted=False`` as version 0.1.0 wrote it."""

    def make(name: str, dtype: str, *, noted: bool = True) -> Evaluation:
        evaluator = CollectionEvaluator(collection, name="c", dtype=dtype)
        evaluator(tiny_model)
        evaluator.save(tmp_path / name, model_name=name, model=tiny_model, dtype=dtype)
        if not noted:
            manifest = json.loads((tmp_path / name / "evaluation.json").read_text())
            del manifest["collections"]["c"]["computed_in"]
            (tmp_path / name / "evaluation.json").write_text(json.dumps(manifest))
        return read_evaluation(tmp_path / name)

    return make


def test_a_comparison_across_precisions_is_marked_everywhere(in_precision, tmp_path) -> None:
    wide, narrow = in_precision("wide", "model"), in_precision("narrow", "bfloat16")
    assert (wide.precision, narrow.precision) == ("float32", "bfloat16")
    assert compare(wide, in_precision("again", "model")).precision_note is None
    found = compare(wide, narrow)
    note = "precision of the models' computation: float32 before, bfloat16 after"
    assert note in found.precision_note
    assert note in comparisons_text([found], "latex")
    (content,) = json.loads(comparisons_text([found], "json"))
    assert content["precisions"]["note"] == found.precision_note
    (row,) = csv.DictReader(io.StringIO(comparisons_text([found], "csv")))
    assert (row["precision before"], row["precision after"]) == ("float32", "bfloat16")
    page = write_page(tmp_path / "page.html", [wide, narrow], texts=False).read_text()
    assert "Precision of the models&#39; computation: float32 before, bfloat16 after." in page
    assert "computed in bfloat16" in page


def test_the_precision_of_an_older_evaluation_is_unknown_unless_it_was_asked_for(in_precision, make_evaluation) -> None:
    wide = in_precision("wide", "model")
    old, older = in_precision("old", "auto", noted=False), in_precision("older", "auto", noted=False)
    assert "unknown before, float32 after" in compare(old, wide).precision_note
    assert "unknown before, unknown after" in compare(old, older).precision_note
    asked = in_precision("asked", "bfloat16", noted=False)
    assert compare(asked, in_precision("narrow", "bfloat16")).precision_note is None


def test_a_run_file_has_no_precision_to_compare(in_precision, make_evaluation, collection) -> None:
    run = make_evaluation("run", {"c": collection}, metrics=["ndcg@10"])
    assert run.precision is None
    wide = in_precision("wide", "model")
    assert compare(wide, run).precision_note is None
