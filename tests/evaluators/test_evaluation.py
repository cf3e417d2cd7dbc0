"""Evaluations on disk: what is written is read again, and what is broken is named."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import reduce
from operator import getitem
from statistics import fmean

import numpy as np
import pytest
import pytrec_eval
from hypothesis import given, settings
from hypothesis import strategies as st

from evaluators import BenchmarkEvaluator, CollectionEvaluator
from evaluators.comparison import compare, scores_table, to_latex
from evaluators.evaluation import EvaluationError, judgments_fingerprint, read_evaluation, with_distinct_names
from evaluators.runs import read_run, write_run
from st_clp.data import CollectionError
from st_clp.encoding import model_fingerprint


def test_an_evaluation_is_read_as_it_was_found(tiny_model, collection, tmp_path) -> None:
    other = replace(collection, name="miracl/yy/dev", language="ko")
    evaluator = BenchmarkEvaluator({"xx": collection, "yy": other}, "both", ["ndcg@10", "p@3"], dtype="model")
    evaluator(tiny_model)
    evaluator.save(tmp_path / "out", model_name="tiny", model=tiny_model, dtype="model")
    found = read_evaluation(tmp_path / "out")
    assert (found.model, found.fingerprint) == ("tiny", model_fingerprint(tiny_model))
    assert found.metrics == ["ndcg@10", "precision@3"]
    assert found.query_scores == evaluator.query_scores  # to the last digit
    assert {key: found.run(key).keys() for key in found.results} == {q: r.keys() for q, r in evaluator.runs.items()}
    result = found.results["yy"]
    assert (result.source, result.split, result.language) == ("miracl/yy/dev", "dev", "ko")
    assert (result.documents, result.pooled, result.label) == (40, None, "yy")
    assert result.counts == {"queries": 40, "queries without a relevant document": 0}
    assert result.scores == {
        metric: fmean(row[metric] for row in found.query_scores["yy"].values()) for metric in found.metrics
    }
    assert found.settings["dtype"] == "model"
    assert (result.computed_in, found.precision) == ("float32", "float32")
    assert (found.settings["max_seq_length"], found.settings["similarity"]) == (64, "cosine")
    assert found.settings["xx"]["ignore_identical_ids"] is True
    assert {"sentence-transformers", "torch", "pytrec-eval-terrier"} <= found.versions.keys()
    assert list(tmp_path.rglob("*.partial")) == []


def test_saved_runs_give_the_saved_scores_again(collection, make_evaluation) -> None:
    saved = make_evaluation("a", {"xx": collection})
    scores = pytrec_eval.RelevanceEvaluator(collection.judgments, {"ndcg_cut.10"}).evaluate(saved.run("xx"))
    assert {q: row["ndcg_cut_10"] for q, row in scores.items()} == {
        q: row["ndcg@10"] for q, row in saved.query_scores["xx"].items()
    }


def test_the_table_has_a_row_for_each_collection_and_the_mean(collection, make_evaluation) -> None:
    saved = make_evaluation("a", {"xx": collection, "yy_1": replace(collection, name="other")})
    frame = scores_table(saved)
    assert list(frame.index) == ["mean", "xx", "yy_1"]
    assert list(frame.columns) == ["ndcg@10", "mrr@10"]
    assert frame.loc["mean", "ndcg@10"] == pytest.approx(frame.loc[["xx", "yy_1"], "ndcg@10"].mean())
    latex = to_latex(frame, index=True)
    assert r"yy\_1" in latex
    assert r"\toprule" in latex


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("evaluation.json", "{", r"evaluation\.json: not valid JSON .*; evaluate again"),
        ("evaluation.json", "[]", r"evaluation\.json: a JSON object is expected.*; evaluate again"),
        ("evaluation.json", "[" * 100_000, r"evaluation\.json: JSON nested too deep.*; evaluate again"),
        ("evaluation.json", '{"format": 9}', "has format 9, and this version reads 1"),
        ("evaluation.json", None, "holds no evaluation; make one with: st-clp evaluate"),
        ("scores/xx.csv", None, r"xx\.csv is missing; evaluate again"),
        ("scores/xx.csv", "", r"xx\.csv is broken"),
        ("scores/xx.csv", "query,ndcg@10,mrr@10\nq1,high,1\n", r"xx\.csv is broken .*high"),
        ("scores/xx.csv", "query,ndcg@10,mrr@10\nq1,0.5,0.5,1\n", r"xx\.csv is broken"),
        ("scores/xx.csv", "query,ndcg@10\nq1,0.5\n", r"xx\.csv is broken .*no column mrr@10"),
        ("scores/xx.csv", "query,ndcg@10,mrr@10\nq1,nan,0.5\n", r"xx\.csv is broken .*nan"),
    ],
)
def test_a_broken_file_is_named(collection, make_evaluation, file, content, message) -> None:
    path = make_evaluation("a", {"xx": collection}).path
    (path / file).unlink()
    if content is not None:
        (path / file).write_text(content)
    with pytest.raises(EvaluationError, match=message):
        _ = read_evaluation(path).query_scores


FIELDS = [
    *((name,) for name in ("model", "fingerprint", "metrics", "created", "versions", "settings", "collections")),
    ("collections", "xx"),
    *(("collections", "xx", name) for name in ("source", "split", "pooled", "documents", "scores", "counts")),
    ("collections", "xx", "scores", "ndcg@10"),
]
VALUES = [[1], [], {}, {"a": 1}, {"a": "b"}, 7, -0.5, "ndcg@10", "", None, True]


def test_a_field_of_another_kind_is_refused_or_does_no_harm(collection, make_evaluation) -> None:
    file = make_evaluation("a", {"xx": collection}).path / "evaluation.json"
    right = file.read_text()

    @given(path=st.sampled_from(FIELDS), value=st.sampled_from(VALUES))
    @settings(deadline=None)
    def read_with(path: tuple[str, ...], value: object) -> None:
        manifest = json.loads(right)
        *parents, name = path
        reduce(getitem, parents, manifest)[name] = value
        file.write_text(json.dumps(manifest))
        try:
            saved = read_evaluation(file.parent)
            scores_table(with_distinct_names([saved, saved])[0])
            compare(saved, saved, saved.metrics[0])
        except EvaluationError as error:
            said = str(error)
        else:
            return
        assert str(file.parent) in said
        assert said.endswith("evaluate again")

    read_with()


def test_an_evaluator_that_was_not_called_is_not_saved(collection, tmp_path) -> None:
    with pytest.raises(RuntimeError, match="call the evaluator"):
        CollectionEvaluator(collection).save(tmp_path, model_name="a")
    assert not (tmp_path / "evaluation.json").exists()


def test_a_stopped_save_leaves_no_manifest(collection, make_evaluation, monkeypatch) -> None:
    path = make_evaluation("a", {"xx": collection}).path

    def stopped(*arguments: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("evaluators.evaluation._write_scores", stopped)
    with pytest.raises(KeyboardInterrupt):
        make_evaluation("a", {"xx": collection}, skill=0.9)
    # The runs are of one model and the scores of another: nobody is to take them for an evaluation.
    with pytest.raises(EvaluationError, match="holds no evaluation"):
        read_evaluation(path)


def test_the_fingerprint_of_judgments_knows_every_change_but_their_order() -> None:
    judgments = {"q": {"d": 1, "e": 0}, "r": {"d": 2}}
    assert judgments_fingerprint(judgments) == judgments_fingerprint({"r": {"d": 2}, "q": {"e": 0, "d": 1}})
    others = [{"q": {"d": 1, "e": 1}, "r": {"d": 2}}, {"q": {"d": 1}, "r": {"d": 2}}, {"q": {"d": 1, "e": 0, "r": 2}}]
    assert len({judgments_fingerprint(other) for other in [judgments, *others]}) == 4


words = st.text(st.characters(exclude_categories=["Z", "C"]), min_size=1, max_size=8)
runs = st.dictionaries(
    words, st.dictionaries(words, st.floats(allow_nan=False, width=32, allow_infinity=False), min_size=1), min_size=1
)


@settings(max_examples=60, deadline=None)
@given(run=runs)
def test_a_run_file_is_read_as_it_was_written(tmp_path_factory, run) -> None:
    path = tmp_path_factory.mktemp("run") / "run.trec"
    write_run(run, path)
    found = read_run(path)
    as_read = {q: {d: np.float32(score) for d, score in documents.items()} for q, documents in found.items()}
    assert as_read == run
    # And again, from what was read, to the last byte.
    write_run(found, path.with_name("again.trec"))
    assert path.with_name("again.trec").read_bytes() == path.read_bytes()


GOOD = "q1 Q0 d1 1 0.5 tag"


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("q1 Q0 d2 2 0.5", r"run\.trec, line 3: a run's lines have 6 columns .*, this one 5"),
        ("q1 Q0 d2 2 half tag", r"run\.trec, line 3: the score 'half' is no number"),
        ("q1 Q0 d2 2 nan tag", r"run\.trec, line 3: the score 'nan' is not finite"),
        ("q1 Q0 d2 2 inf tag", r"run\.trec, line 3: the score 'inf' is not finite"),
        ("q1 Q0 d1 2 0.4 tag", r"run\.trec, line 3: the document 'd1' comes twice for the query 'q1'"),
    ],
)
def test_a_broken_line_of_a_run_file_is_named(tmp_path, line, message) -> None:
    path = tmp_path / "run.trec"
    path.write_text(f"{GOOD}\n\n{line}\n")
    with pytest.raises(ValueError, match=message):
        read_run(path)


def test_a_run_file_may_begin_with_a_byte_order_mark(tmp_path) -> None:
    file = tmp_path / "run.trec"
    file.write_text("q0 Q0 d0 1 0.9 tag\nq0 Q0 d1 2 0.8 tag\n", encoding="utf-8-sig")
    assert read_run(file) == {"q0": {"d0": 0.9, "d1": 0.8}}


def test_an_empty_run_file_and_one_that_is_no_text_are_refused(tmp_path) -> None:
    (tmp_path / "empty.trec").write_text("\n")
    with pytest.raises(ValueError, match=r"empty\.trec is empty"):
        read_run(tmp_path / "empty.trec")
    (tmp_path / "binary.trec").write_bytes(b"q1 Q0 d\xff\xfe 1 0.5 tag\n")
    with pytest.raises(ValueError, match=r"binary\.trec, line 1: .*not UTF-8"):
        read_run(tmp_path / "binary.trec")


def test_anybodys_run_is_scored_and_what_it_lacks_is_counted(collection, random_run) -> None:
    run = random_run(collection, seed=1)
    del run["q0"], run["q1"]
    run["q0"] = {}
    run["stranger"] = {"d0": 1.0}
    evaluator = CollectionEvaluator(collection, name="c")
    evaluator.score(run)
    assert evaluator.query_scores["q1"]["ndcg@10"] == 0
    assert evaluator.counts["c"]["judged queries that the run does not answer, at 0"] == 1
    assert evaluator.counts["c"]["queries of the run without judgments, left out"] == 1
    assert len(evaluator.query_scores) == 40
    # Another run is counted anew.
    evaluator.score(random_run(collection, seed=1))
    assert evaluator.counts["c"] == {"queries": 40, "queries without a relevant document": 0}
    with pytest.raises(
        CollectionError, match="answers none of the queries of miracl/xx/dev: it has queries such as s1,"
    ):
        evaluator.score({"s1": {"d0": 1.0}})


def test_the_querys_own_id_is_left_out_of_anybodys_run_too(collection, random_run) -> None:
    run = random_run(collection, seed=1)
    run["q3"]["q3"] = 9.0
    evaluators = [CollectionEvaluator(collection, name="c", ignore_identical_ids=switch) for switch in (True, False)]
    for evaluator in evaluators:
        evaluator.score(run)
    left, kept = (evaluator.query_scores["q3"]["mrr@10"] for evaluator in evaluators)
    assert kept < left
    assert evaluators[0].counts["c"]["documents with the query's own id, left out"] == 1
    assert "q3" in run["q3"]  # the caller's run is as it was


def test_a_run_file_ranks_scores_that_are_equal_in_float32_as_trec_eval_does(tmp_path) -> None:
    write_run({"q": {"a": 0.5 + 1e-12, "b": 0.5, "c": 0.25}}, tmp_path / "run.trec")
    ranking = [line.split()[2] for line in (tmp_path / "run.trec").read_text().splitlines()]
    assert ranking == ["b", "a", "c"]
    scores = pytrec_eval.RelevanceEvaluator({"q": {"a": 1}}, {"recip_rank"}).evaluate(
        {"q": {"a": 0.5 + 1e-12, "b": 0.5}}
    )
    assert scores["q"]["recip_rank"] == 1 / 2
