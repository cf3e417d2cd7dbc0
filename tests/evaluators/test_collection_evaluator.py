"""CollectionEvaluator: its metrics, what it leaves out, what it writes, and its life in training."""

from __future__ import annotations

import copy
import csv
import json
import logging
from pathlib import Path

import numpy as np
import pytest
import pytrec_eval
from beir.retrieval.evaluation import EvaluateRetrieval
from datasets import Dataset
from sentence_transformers import (
    InputExample,
    SentenceTransformer,
    SentenceTransformerTrainer,
    SentenceTransformerTrainingArguments,
)
from sentence_transformers.sentence_transformer.evaluation import InformationRetrievalEvaluator
from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss
from torch.utils.data import DataLoader

from evaluators import BenchmarkEvaluator, CollectionEvaluator
from st_clp import Collection
from st_clp.data import CollectionError, MemoryCorpus

KEYS = ["ndcg@10", "ndcg@5", "recall@100", "mrr@10"]


def test_metrics_are_those_of_trec_eval_on_an_exhaustive_run(tiny_model, collection) -> None:
    texts = {document.doc_id: document.text for document in collection.documents()}
    similarity = tiny_model.similarity(
        tiny_model.encode_query(list(collection.queries.values())), tiny_model.encode_document(list(texts.values()))
    )
    run = {
        q: dict(zip(texts, row.tolist(), strict=True)) for q, row in zip(collection.queries, similarity, strict=True)
    }
    expected = pytrec_eval.RelevanceEvaluator(
        collection.judgments, {"ndcg_cut.5,10", "recall.3", "map_cut.10", "P.2"}
    ).evaluate(run)

    evaluator = CollectionEvaluator(
        collection, metrics=["ndcg@10", "ndcg@5", "recall@3", "map@10", "p@2"], dtype="model"
    )
    found = evaluator(tiny_model)
    measures = {"ndcg_cut_10": "ndcg@10", "ndcg_cut_5": "ndcg@5", "recall_3": "recall@3", "map_cut_10": "map@10"}
    for measure, name in {**measures, "P_2": "precision@2"}.items():
        values = [row[measure] for row in expected.values()]
        assert found[f"miracl_xx_dev_{name}"] == pytest.approx(sum(values) / len(values), abs=1e-12)
        assert evaluator.query_scores["q7"][name] == expected["q7"][measure]
    assert 0 < found["miracl_xx_dev_ndcg@10"] < 1


def test_metrics_are_those_of_sentence_transformers(tiny_model, collection) -> None:
    # Its judgments have no grades, and its order of equal scores is another; this collection has neither.
    binary = {q: {d: 1 for d, grade in grades.items() if grade > 0} for q, grades in collection.judgments.items()}
    texts = {document.doc_id: document.text for document in collection.documents()}
    plain = Collection.from_dict(texts, collection.queries, binary, name="plain")
    found = CollectionEvaluator(plain, metrics=["ndcg@10", "mrr@10", "recall@10", "p@5"], dtype="model")(tiny_model)
    peer = InformationRetrievalEvaluator(plain.queries, texts, {q: set(docs) for q, docs in binary.items()})(tiny_model)
    for name in ("ndcg@10", "mrr@10", "recall@10", "precision@5"):
        assert found[f"plain_{name}"] == pytest.approx(peer[f"cosine_{name}"], abs=1e-12), name


def test_ties_are_ordered_as_trec_eval_orders_them(tiny_model) -> None:
    # Four documents of one text score the same; trec_eval puts the last id first.
    documents = {"a": "the river", "b": "the river", "c": "the river", "d": "the river"}
    collection = Collection.from_dict(documents, {"q": "a river", "r": "a river"}, {"q": {"a": 1}, "r": {"d": 1}})
    evaluator = CollectionEvaluator(collection, metrics=["mrr@10"])
    evaluator(tiny_model)
    assert len(set(evaluator.run["q"].values())) == 1
    assert evaluator.query_scores == {"q": {"mrr@10": 0.25}, "r": {"mrr@10": 1.0}}


def test_the_models_own_similarity_is_used(make_tiny_model, collection) -> None:
    model = make_tiny_model(normalize=False)
    runs = {}
    for name in ("cosine", "dot", "euclidean"):
        model.similarity_fn_name = name
        evaluator = CollectionEvaluator(collection, dtype="model")
        evaluator(model)
        runs[name] = evaluator.run
        documents = {document.doc_id: document.text for document in collection.documents()}
        found = model.similarity(
            model.encode_query([collection.queries["q3"]]), model.encode_document(list(documents.values()))
        )[0]
        best = list(documents)[int(found.argmax())]
        assert next(iter(evaluator.run["q3"])) == best
        assert evaluator.run["q3"][best] == pytest.approx(float(found.max()), abs=1e-4)
    assert runs["cosine"] != runs["dot"]


def test_a_document_with_the_querys_own_id_is_left_out_as_in_beir(tiny_model, collection, caplog) -> None:
    texts = {document.doc_id: document.text for document in collection.documents()}
    queries = {f"d{n}": texts[f"d{n}"] for n in range(10)}  # each asks with its own document's text
    judgments = {query_id: {f"d{n}": 1 for n in range(10, 40)} for query_id in queries}
    same = Collection.from_dict(texts, queries, judgments, name="same")
    kept = CollectionEvaluator(same, metrics=["p@1", "p@5"], ignore_identical_ids=False)
    left = CollectionEvaluator(same, metrics=["p@1", "p@5"])
    whole, found = kept(tiny_model), left(tiny_model)
    assert whole["same_precision@1"] == 0
    assert found["same_precision@1"] > 0
    assert left.counts["same"]["documents with the query's own id, left out"] == 10
    for query_id in queries:
        # The rest moves up, and the run is as deep as ever.
        assert query_id not in left.run[query_id]
        assert list(left.run[query_id])[:4] == list(kept.run[query_id])[1:]
        assert len(left.run[query_id]) == 5
    _, _, _, precision = EvaluateRetrieval.evaluate(judgments, {q: dict(d) for q, d in kept.run.items()}, [1])
    assert found["same_precision@1"] == pytest.approx(precision["P@1"], abs=1e-5)
    assert "own id is judged relevant" not in caplog.text


def test_a_shared_numbering_of_queries_and_documents_is_warned_of(caplog) -> None:
    numbered = Collection.from_dict({"0": "river", "1": "lake"}, {"0": "a river"}, {"0": {"0": 1}})
    with caplog.at_level(logging.WARNING, logger="evaluators"):
        CollectionEvaluator(numbered, ignore_identical_ids=False)
        assert "own id" not in caplog.text
        CollectionEvaluator(numbered)
    assert "ignore_identical_ids=False" in caplog.text


def test_queries_without_a_relevant_document_score_nothing_and_are_said(tiny_model, caplog) -> None:
    collection = Collection.from_dict(
        {"a": "the river", "b": "a bank"}, {"q": "the river", "r": "a bank"}, {"q": {"a": 2}, "r": {"a": 0}}, name="c"
    )
    with caplog.at_level(logging.WARNING, logger="evaluators"):
        evaluator = CollectionEvaluator(collection)
    assert "c: 1 of 2 queries have no relevant document (such as r); they score 0" in caplog.text
    assert evaluator(tiny_model)["c_ndcg@10"] == 0.5
    assert evaluator.counts == {"c": {"queries": 2, "queries without a relevant document": 1}}


def test_a_collection_without_judgments_is_refused(collection) -> None:
    for judgments in ({}, {"q0": {}}, {"nobody": {"d0": 1}}):
        nothing = Collection(collection.corpus, collection.queries, judgments, name="miracl/xx/test-a")
        with pytest.raises(CollectionError, match=r"miracl/xx/test-a has no judgments.*such as dev"):
            CollectionEvaluator(nothing)


def test_judgments_of_a_query_without_text_are_left_out_and_said(tiny_model, collection, caplog) -> None:
    judgments = {"q0": collection.judgments["q0"], "nobody": {"d0": 1}}
    with caplog.at_level(logging.WARNING, logger="evaluators"):
        evaluator = CollectionEvaluator(Collection(collection.corpus, collection.queries, judgments))
    assert "left out the judgments of 1 queries that have no text" in caplog.text
    evaluator(tiny_model)
    assert list(evaluator.run) == ["q0"]


@pytest.mark.parametrize(
    ("name", "expected"),
    [("miracl/ko/dev", "miracl_ko_dev"), ("/home/me/my data/test", "my_data_test"), ("./laws/dev", "laws_dev")],
)
def test_the_default_name_is_the_collections(collection, name, expected) -> None:
    collection.name = name
    assert CollectionEvaluator(collection).primary_metric == f"{expected}_ndcg@10"


def test_names_and_primary_metric_follow_sentence_transformers(tiny_model, collection) -> None:
    evaluator = CollectionEvaluator(collection, name="laws")
    assert evaluator.primary_metric == "laws_ndcg@10"
    found = evaluator(tiny_model)
    assert list(found) == [f"laws_{key}" for key in KEYS]
    assert all(type(value) is float for value in found.values())
    assert evaluator.primary_metric == "laws_ndcg@10"
    bare = CollectionEvaluator(collection, name="", metrics=["recall@3", "ndcg@10"])
    assert bare.primary_metric == "recall@3"
    assert list(bare(tiny_model)) == ["recall@3", "ndcg@10"]


def test_run_depth(tiny_model, collection) -> None:
    evaluator = CollectionEvaluator(collection, metrics=["ndcg@5"])
    evaluator(tiny_model)
    assert {len(documents) for documents in evaluator.run.values()} == {5}
    evaluator = CollectionEvaluator(collection, metrics=["ndcg@5"], run_depth=1000)
    evaluator(tiny_model)
    assert {len(documents) for documents in evaluator.run.values()} == {40}
    with pytest.raises(ValueError, match="run_depth 4 is too small for a metric cut at 5"):
        CollectionEvaluator(collection, metrics=["ndcg@5"], run_depth=4)


def test_embeddings_are_kept_and_reused_for_the_same_model_only(
    tiny_model, make_tiny_model, collection, tmp_path, monkeypatch
) -> None:
    evaluator = CollectionEvaluator(collection, store_dir=tmp_path / "store")
    first = evaluator(tiny_model)
    encoded = []
    preprocess = SentenceTransformer.preprocess

    def counted(self, texts, *, task, **settings):
        if task == "document":
            encoded.append(len(texts))
        return preprocess(self, texts, task=task, **settings)

    monkeypatch.setattr(SentenceTransformer, "preprocess", counted)
    assert evaluator(tiny_model) == first
    assert encoded == []
    assert evaluator(make_tiny_model(seed=5)) != first
    assert encoded == [40]


def test_a_run_file_gives_the_metrics_again(tiny_model, collection, tmp_path) -> None:
    evaluator = CollectionEvaluator(collection)
    with pytest.raises(RuntimeError, match="call the evaluator 'miracl_xx_dev' with a model first"):
        evaluator.write_run(tmp_path / "early.trec")
    found = evaluator(tiny_model)
    path = tmp_path / "runs" / "tiny.trec"
    evaluator.write_run(path, tag="tiny")
    with open(path) as file:
        run = pytrec_eval.parse_run(file)
    scores = pytrec_eval.RelevanceEvaluator(collection.judgments, {"ndcg_cut.10"}).evaluate(run)
    values = [row["ndcg_cut_10"] for row in scores.values()]
    assert sum(values) / len(values) == pytest.approx(found["miracl_xx_dev_ndcg@10"], abs=1e-15)
    assert run.keys() == evaluator.run.keys()
    for query_id, documents in evaluator.run.items():
        # Not a bit of a float32 score is lost.
        assert {d: np.float32(score) for d, score in run[query_id].items()} == documents
    columns = [line.split() for line in path.read_text().splitlines()[:3]]
    assert [[row[0], row[1], row[3], row[5]] for row in columns] == [["q0", "Q0", str(n), "tiny"] for n in (1, 2, 3)]
    assert list(tmp_path.rglob("*.partial")) == []


def test_equal_scores_stand_in_a_run_file_as_trec_eval_ranks_them(tiny_model, tmp_path) -> None:
    documents = {"a": "the river", "b": "the river", "c": "the river"}
    evaluator = CollectionEvaluator(Collection.from_dict(documents, {"q": "a river"}, {"q": {"a": 1}}))
    evaluator(tiny_model)
    evaluator.write_run(tmp_path / "run.trec")
    lines = [line.split() for line in (tmp_path / "run.trec").read_text().splitlines()]
    assert [(row[2], row[3]) for row in lines] == [("c", "1"), ("b", "2"), ("a", "3")]


def test_an_id_with_white_space_does_not_break_a_run_file(tiny_model, tmp_path) -> None:
    # The readers refuse such an id before any work; a collection that is put together by hand may have one.
    corpus = MemoryCorpus("c", {"a b": "the river"})
    evaluator = CollectionEvaluator(Collection(corpus, {"q": "a river"}, {"q": {"a b": 1}}))
    evaluator(tiny_model)
    with pytest.raises(ValueError, match="document id 'a b' is empty or holds white space"):
        evaluator.write_run(tmp_path / "run.trec")
    assert list(tmp_path.iterdir()) == []


def test_csv_json_and_run_files(tiny_model, make_tiny_model, collection, tmp_path) -> None:
    evaluator = CollectionEvaluator(collection, name="laws", save_runs=True)
    first = evaluator(tiny_model, output_path=str(tmp_path), epoch=0.5, steps=10)
    second = evaluator(make_tiny_model(seed=5), output_path=str(tmp_path), epoch=1.0, steps=20)
    with open(tmp_path / evaluator.csv_file, newline="") as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0]) == ["epoch", "steps", *KEYS]
    assert [(row["epoch"], row["steps"]) for row in rows] == [("0.5", "10"), ("1.0", "20")]
    assert [float(row["ndcg@10"]) for row in rows] == [first["laws_ndcg@10"], second["laws_ndcg@10"]]
    assert first != second
    written = json.loads((tmp_path / evaluator.json_file).read_text())
    assert written == {
        "epoch": 1.0,
        "steps": 20,
        "primary_metric": "laws_ndcg@10",
        "metrics": second,
        "counts": {"laws": {"queries": 40, "queries without a relevant document": 0}},
    }
    assert sorted(path.name for path in tmp_path.glob("*.trec")) == ["laws_10_steps.trec", "laws_20_steps.trec"]


def test_nothing_is_written_unless_asked_for(tiny_model, collection, tmp_path) -> None:
    evaluator = CollectionEvaluator(collection, write_csv=False, write_json=False)
    evaluator(tiny_model, output_path=str(tmp_path))
    assert list(tmp_path.iterdir()) == []


def test_a_csv_file_of_other_metrics_is_refused_before_any_work(tiny_model, collection, tmp_path) -> None:
    CollectionEvaluator(collection, name="laws")(tiny_model, output_path=str(tmp_path))
    other = CollectionEvaluator(collection, name="laws", metrics=["recall@3"])
    with pytest.raises(ValueError, match=r"has the columns epoch, steps, ndcg@10.*writes epoch, steps, recall@3"):
        other(tiny_model, output_path=str(tmp_path))
    with pytest.raises(RuntimeError, match="nothing has been retrieved yet"):
        _ = other.run


def train_dataset(collection: Collection) -> Dataset:
    texts = {document.doc_id: document.text for document in collection.documents()}
    positives = {q: next(d for d, grade in docs.items() if grade == 2) for q, docs in collection.judgments.items()}
    return Dataset.from_dict(
        {
            "anchor": [collection.queries[q] for q in positives],
            "positive": [texts[d] for d in positives.values()],
        }
    )


@pytest.mark.parametrize("several", [False, True])
def test_the_trainer_evaluates_and_keeps_the_best_model(tiny_model, collection, tmp_path, several) -> None:
    """By nDCG@10 on one collection, or by its mean over two, one of them small."""
    small = collection.with_queries(set(list(collection.queries)[:7]))
    if several:
        evaluator = BenchmarkEvaluator({"all": collection, "small": small}, "laws", store_dir=tmp_path / "stores")
    else:
        evaluator = CollectionEvaluator(collection, name="laws")
    metric = evaluator.primary_metric
    assert metric == ("laws_mean_ndcg@10" if several else "laws_ndcg@10")
    arguments = SentenceTransformerTrainingArguments(
        output_dir=str(tmp_path),
        max_steps=2,
        per_device_train_batch_size=8,
        learning_rate=1e-2,
        eval_strategy="steps",
        eval_steps=1,
        save_strategy="steps",
        save_steps=1,
        load_best_model_at_end=True,
        metric_for_best_model=f"eval_{metric}",
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
    )
    trainer = SentenceTransformerTrainer(
        model=tiny_model,
        args=arguments,
        train_dataset=train_dataset(collection),
        loss=MultipleNegativesRankingLoss(tiny_model),
        evaluator=evaluator,
    )
    trainer.train()
    seen = [entry[f"eval_{metric}"] for entry in trainer.state.log_history if f"eval_{metric}" in entry]
    assert len(seen) == 2
    assert seen[0] != seen[1]
    assert trainer.state.best_metric == max(seen)
    assert evaluator(tiny_model)[metric] == pytest.approx(max(seen), abs=1e-6)
    with open(tmp_path / "eval" / evaluator.csv_file, newline="") as file:
        assert [int(row["steps"]) for row in csv.DictReader(file)] == [1, 2]
    tiny_model.save(str(tmp_path / "model"))
    card = (tmp_path / "model" / "README.md").read_text()
    assert "#### Information Retrieval" in card
    assert f"| **{metric.removeprefix('laws_')}**" in card
    assert '"collection": "miracl/xx/dev"' in card


def test_model_fit_saves_the_best_model(tiny_model, collection, tmp_path) -> None:
    rows = train_dataset(collection)
    examples = [InputExample(texts=[row["anchor"], row["positive"]]) for row in rows]
    evaluator = CollectionEvaluator(collection, name="laws")
    tiny_model.fit(
        train_objectives=[(DataLoader(examples, batch_size=20), MultipleNegativesRankingLoss(tiny_model))],
        evaluator=evaluator,
        epochs=1,
        output_path=str(tmp_path / "fitted"),
        show_progress_bar=False,
    )
    best = evaluator.run
    evaluator(SentenceTransformer(str(tmp_path / "fitted"), device="cpu"))
    assert {q: list(docs) for q, docs in evaluator.run.items()} == {q: list(docs) for q, docs in best.items()}
    assert Path(tmp_path / "fitted" / "eval" / evaluator.csv_file).is_file()


def test_a_model_that_was_evaluated_can_be_copied(tiny_model, collection) -> None:
    # Its card remembers the evaluator, which holds a corpus that may be of any size and kind.
    evaluator = CollectionEvaluator(collection)
    found = evaluator(tiny_model)
    copied = copy.deepcopy(tiny_model)
    (remembered,) = copied.model_card_data.eval_results_dict
    assert remembered.collection.corpus is collection.corpus
    assert evaluator(copied) == found
