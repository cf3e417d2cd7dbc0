"""Evaluation over a pool: which documents are in it, and that its figures are marked wherever they appear."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest

from evaluators import BenchmarkEvaluator, CollectionEvaluator
from evaluators.comparison import scores_table
from evaluators.runs import write_run
from st_clp import Collection
from st_clp.data import CollectionError


def pool_of(evaluator: CollectionEvaluator) -> set[str]:
    return {document.doc_id for document in evaluator.collection.documents()}


def test_the_pool_is_the_judged_documents_and_the_best_of_the_run(collection, random_run) -> None:
    few = collection.with_queries({"q0", "q1"})
    judged = {doc_id for grades in few.judgments.values() for doc_id in grades}
    run = random_run(collection, seed=1)  # answers other queries too, which do not count
    for depth in (1, 3):
        evaluator = CollectionEvaluator(few, corpus="pooled", reference_run=run, pool_depth=depth)
        best = {d for q in ("q0", "q1") for d in sorted(run[q], key=lambda d, q=q: (run[q][d], d))[-depth:]}
        assert pool_of(evaluator) == judged | best
    assert pool_of(CollectionEvaluator(few, corpus="pooled")) == judged


def test_a_run_file_pools_as_the_run_does(collection, random_run, tmp_path) -> None:
    run = random_run(collection, seed=1)
    write_run(run, tmp_path / "reference.trec")
    evaluators = [
        CollectionEvaluator(collection, corpus="pooled", reference_run=reference, pool_depth=2)
        for reference in (run, tmp_path / "reference.trec")
    ]
    assert pool_of(evaluators[0]) == pool_of(evaluators[1])
    assert "the best 2 of reference.trec" in evaluators[1].pooled


def test_a_query_finds_over_the_pool_what_it_finds_over_the_corpus_without_the_others(tiny_model, collection) -> None:
    few = collection.with_queries({"q0"})
    full = CollectionEvaluator(few, run_depth=100)
    full(tiny_model)
    pooled = CollectionEvaluator(few, corpus="pooled")
    pooled(tiny_model)
    pool = pool_of(pooled)
    assert len(pool) < 40
    assert list(pooled.run["q0"]) == [doc_id for doc_id in full.run["q0"] if doc_id in pool]


@pytest.fixture
def pooled(collection, random_run) -> BenchmarkEvaluator:
    return BenchmarkEvaluator(
        {"ko": collection},
        "miracl",
        ["ndcg@10"],
        corpus="pooled",
        reference_runs={"ko": random_run(collection, seed=1)},
        save_runs=True,
    )


def test_pooled_figures_are_marked_wherever_they_appear(pooled, tiny_model, tmp_path) -> None:
    metrics = pooled(tiny_model, output_path=str(tmp_path / "out"))
    assert list(metrics) == ["miracl_pooled_mean_ndcg@10", "miracl_pooled_ko_ndcg@10"]
    assert pooled.primary_metric == "miracl_pooled_mean_ndcg@10"
    assert pooled.evaluators["ko"].primary_metric == "miracl_ko_pooled_ndcg@10"
    assert pooled.csv_file == "retrieval_evaluation_miracl_pooled_results.csv"
    with open(tmp_path / "out" / pooled.csv_file, newline="") as file:
        assert next(csv.reader(file))[2:] == ["mean_ndcg@10", "ko_ndcg@10"]
    content = json.loads((tmp_path / "out" / pooled.json_file).read_text())
    assert content["primary_metric"] == "miracl_pooled_mean_ndcg@10"
    assert content["pooled"] == {"ko": pooled.evaluators["ko"].pooled}
    # What the model card is made of.
    assert tiny_model.model_card_data.eval_results_dict == {pooled: metrics}
    assert pooled.get_config_dict()["ko"]["pooled"].startswith("judged documents and the best 100 of a run: ")

    saved = pooled.save(tmp_path / "saved", model_name="tiny", model=tiny_model)
    assert list(scores_table(saved).index) == ["ko (pooled)"]
    assert sorted(path.name for path in (tmp_path / "saved").rglob("*.*")) == [
        "evaluation.json",
        "ko.pooled.csv",
        "ko.pooled.trec",
    ]
    manifest = json.loads((tmp_path / "saved" / "evaluation.json").read_text())
    assert manifest["collections"]["ko"]["pooled"].startswith("judged documents and the best 100 of a run")


def test_pooled_and_full_figures_do_not_go_into_one_evaluation(collection, random_run, tmp_path) -> None:
    from evaluators.base import save_parts

    parts = {
        "full": CollectionEvaluator(collection),
        "pooled": CollectionEvaluator(collection, corpus="pooled"),
    }
    for part in parts.values():
        part.score(random_run(collection, seed=1))
    with pytest.raises(ValueError, match="over pools and over whole corpora do not go into one evaluation"):
        save_parts(tmp_path, parts, model_name="a")


def test_the_pools_embeddings_do_not_replace_the_corpuss(tiny_model, collection, tmp_path) -> None:
    full = CollectionEvaluator(collection, store_dir=tmp_path / "store")
    full(tiny_model)
    kept = (tmp_path / "store" / "embeddings.bin").stat()
    few = collection.with_queries({"q0"})
    CollectionEvaluator(few, corpus="pooled", store_dir=tmp_path / "store")(tiny_model)
    after = (tmp_path / "store" / "embeddings.bin").stat()
    assert (kept.st_size, kept.st_mtime_ns, kept.st_ino) == (after.st_size, after.st_mtime_ns, after.st_ino)


def test_saved_runs_of_a_benchmark_are_the_reference_of_the_next(tiny_model, collection, tmp_path) -> None:
    datasets = {"ko": collection, "fa": collection}
    evaluator = BenchmarkEvaluator(datasets, "b")
    evaluator(tiny_model)
    evaluator.write_runs(tmp_path)
    pooled = BenchmarkEvaluator(datasets, "b", corpus="pooled", reference_runs=tmp_path, pool_depth=1)
    assert set(pooled.parts) == {"ko", "fa"}
    (tmp_path / "fa.trec").unlink()
    with pytest.raises(ValueError, match=r"there is no reference run .*fa\.trec; a pool needs one for each"):
        BenchmarkEvaluator(datasets, "b", corpus="pooled", reference_runs=tmp_path)
    with pytest.raises(ValueError, match="reference_runs has no run for fa"):
        BenchmarkEvaluator(datasets, "b", corpus="pooled", reference_runs={"ko": {}})


def test_a_pool_that_cannot_be_made_is_refused(collection, tmp_path) -> None:
    with pytest.raises(ValueError, match="corpus must be one of full, pooled, got 'half'"):
        CollectionEvaluator(collection, corpus="half")
    with pytest.raises(ValueError, match="a reference_run is for a pool; give corpus='pooled' too"):
        CollectionEvaluator(collection, reference_run={"q0": {"d0": 1.0}})
    with pytest.raises(ValueError, match="pool_depth must be at least 1, got 0"):
        CollectionEvaluator(collection, corpus="pooled", pool_depth=0)
    with pytest.raises(CollectionError, match=r"a run answers none of the queries of miracl/xx/dev"):
        CollectionEvaluator(collection, corpus="pooled", reference_run={"x": {"d0": 1.0}})
    (tmp_path / "broken.trec").write_text("q0 Q0 d0 1 high tag\n")
    with pytest.raises(ValueError, match=r"broken\.trec, line 1: the score 'high' is no number"):
        CollectionEvaluator(collection, corpus="pooled", reference_run=Path(tmp_path / "broken.trec"))
    missing = Collection(collection.corpus, {"q": "a river"}, {"q": {"nowhere": 1}}, name="missing")
    with pytest.raises(CollectionError, match="missing: none of the 1 documents of the pool is in the corpus"):
        CollectionEvaluator(missing, corpus="pooled")
