"""``st-clp evaluate``, ``compare`` and ``report`` as a user runs them."""

from __future__ import annotations

import csv
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from sentence_transformers import SentenceTransformer
from typer.testing import CliRunner

from evaluators import CollectionEvaluator
from evaluators.evaluation import read_evaluation
from st_clp import Collection
from st_clp.cli import app
from st_clp.encoding import model_fingerprint
from st_clp.encoding.shards import ShardFiles, read_shards
from st_clp.mining import mine


def invoke(*arguments: object) -> tuple[int, str]:
    result = CliRunner().invoke(app, [*map(str, arguments)])
    return result.exit_code, " ".join(result.output.split())


@pytest.fixture
def two_evaluations(tiny_model_path: Path, collection_path: Path, tmp_path: Path) -> tuple[Path, Path]:
    """Evaluations of the tiny model and of its run with every query's answers turned round."""
    model_folder, run_folder = tmp_path / "model", tmp_path / "turned"
    code, text = invoke("evaluate", tiny_model_path, "--collection", collection_path, "--output", model_folder)
    assert code == 0, text
    (run_file,) = (model_folder / "runs").glob("*.trec")
    lines = [line.split() for line in run_file.read_text().splitlines()]
    turned = tmp_path / "turned.trec"
    turned.write_text("".join(f"{q} Q0 {d} {rank} {-float(s)} turned\n" for q, _, d, rank, s, _ in lines))
    code, text = invoke("evaluate", "--from-run", turned, "--collection", collection_path, "--output", run_folder)
    assert code == 0, text
    return model_folder, run_folder


def test_ctrl_c_says_that_the_same_command_goes_on(
    tiny_model_path: Path, collection_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*arguments: object) -> None:
        raise KeyboardInterrupt

    command = ("evaluate", tiny_model_path, "--collection", collection_path, "--output", tmp_path / "out")
    with monkeypatch.context() as patch:
        patch.setattr(ShardFiles, "add", interrupted)
        code, text = invoke(*command)
    assert code == 130
    assert "Stopped. What was encoded is kept; the same command goes on from there." in text
    assert invoke(*command)[0] == 0


def test_evaluate_compare_and_report(
    two_evaluations: tuple[Path, Path], tiny_model_path: Path, collection_path: Path, tmp_path: Path
) -> None:
    model_folder, run_folder = two_evaluations
    model = SentenceTransformer(str(tiny_model_path), device="cpu")
    collection = Collection.load(str(collection_path), split="dev")
    saved, turned = read_evaluation(model_folder), read_evaluation(run_folder)
    # A folder called "model" says nothing by itself.
    assert (saved.model, saved.fingerprint) == (f"{tiny_model_path.parent.name}/model", model_fingerprint(model))
    assert (turned.model, turned.fingerprint) == ("turned", None)
    evaluator = CollectionEvaluator(collection)
    evaluator(model)
    assert list(saved.query_scores.values()) == [evaluator.query_scores]
    assert saved.metrics == ["ndcg@10", "ndcg@5", "recall@100", "mrr@10"]

    code, text = invoke("compare", model_folder, run_folder)
    assert code == 0, text
    assert "model → turned (ndcg@10)" in text
    code, text = invoke("compare", model_folder, run_folder, "--metric", "mrr@10", "--format", "json")
    (found,) = json.loads(text)
    (difference,) = found["differences"]
    assert difference["after"] < difference["before"]
    assert difference["p"] < 0.05
    code, text = invoke("compare", model_folder, model_folder, "--format", "json")
    (difference,) = json.loads(text)[0]["differences"]
    assert (difference["difference"], difference["p"]) == (0, 1)
    for kind, beginning in (
        ("latex", r"\begin{tabular}"),
        ("csv", "before,after,collection"),
        ("table", "tiny0/model →"),
    ):
        file = tmp_path / f"out.{kind}"
        code, text = invoke("compare", model_folder, run_folder, "--format", kind, "--output", file)
        assert code == 0, text
        assert file.read_text().startswith(beginning)
    rows = list(csv.DictReader(io.StringIO((tmp_path / "out.csv").read_text())))
    assert [row["after"] for row in rows] == ["turned"]

    code, text = invoke("report", model_folder, run_folder, "-o", tmp_path / "page.html", "--title", "Mine & yours")
    assert code == 0, text
    page = (tmp_path / "page.html").read_text()
    assert "<title>Mine &amp; yours</title>" in page
    query = next(iter(collection.queries.values()))
    assert any(query in page for query in collection.queries.values()), query
    assert "could not be read" not in page


def test_a_second_evaluation_encodes_nothing_and_the_miner_shares_the_store(
    tiny_model_path: Path, collection_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    common = ["evaluate", tiny_model_path, "--collection", collection_path, "--output", tmp_path / "out"]
    code, text = invoke(*common)
    assert code == 0, text
    first = read_evaluation(tmp_path / "out")

    def forbidden(*arguments: Any, **options: Any) -> Any:
        raise AssertionError("encoded again")

    model = SentenceTransformer(str(tiny_model_path), device="cpu")
    train = Collection.load(str(collection_path), split="train")
    (store,) = [path.parent for path in tmp_path.rglob("embeddings.bin") if not path.parent.name.endswith(".queries")]
    mined = mine(model, train, store_dir=store, show_progress_bar=False)  # each at its default precision
    assert mined.account.rows == 120
    # The miner's queries did not replace the evaluator's: not a text is encoded again.
    monkeypatch.setattr(SentenceTransformer, "preprocess", forbidden)
    shutil.rmtree(tmp_path / "out" / "runs")
    code, text = invoke(*common)
    assert code == 0, text
    assert read_evaluation(tmp_path / "out").query_scores == first.query_scores


def write_large_collection(folder: Path, documents: int) -> Path:
    (folder / "qrels").mkdir(parents=True)
    with open(folder / "corpus.jsonl", "w") as file:
        for number in range(documents):
            text = f"the river of {number} and the lake {number % 13} " * (1 + number % 9)
            file.write(json.dumps({"_id": f"d{number}", "title": "", "text": text}) + "\n")
    (folder / "queries.jsonl").write_text(json.dumps({"_id": "q", "text": "which river"}) + "\n")
    (folder / "qrels" / "test.tsv").write_text("query-id\tcorpus-id\tscore\nq\td7\t1\n")
    return folder


def test_killed_it_goes_on_where_it_was(tiny_model_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    documents = 3000
    collection = write_large_collection(tmp_path / "large", documents)
    arguments = ["evaluate", tiny_model_path, "--collection", collection, "--output", tmp_path / "out"]
    process = subprocess.Popen(
        [sys.executable, "-m", "st_clp", *map(str, arguments)],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    done = 0
    while done < 1024:
        assert process.poll() is None, "it was finished before it could be killed"
        time.sleep(0.01)
        done = max((sum(s.rows for s in read_shards(p)) for p in (tmp_path / "out").rglob("*.partial")), default=0)
    process.send_signal(signal.SIGKILL)
    process.wait()
    encoded = []
    preprocess = SentenceTransformer.preprocess

    def counted(self: Any, texts: Any, *, task: str | None = None, **options: Any) -> Any:
        if task == "document":
            encoded.append(len(texts))
        return preprocess(self, texts, task=task, **options)

    monkeypatch.setattr(SentenceTransformer, "preprocess", counted)
    code, text = invoke(*arguments)
    assert code == 0, text
    assert 0 < sum(encoded) <= documents - done
    found = read_evaluation(tmp_path / "out")
    model = SentenceTransformer(str(tiny_model_path), device="cpu")
    undisturbed = CollectionEvaluator(Collection.load(str(collection), split="test"))
    undisturbed(model)
    assert list(found.query_scores.values()) == [undisturbed.query_scores]


def test_pooled_evaluations_are_marked_and_not_compared_with_full_ones(
    two_evaluations: tuple[Path, Path], tiny_model_path: Path, collection_path: Path, tmp_path: Path
) -> None:
    full, _ = two_evaluations
    (run_file,) = (full / "runs").glob("*.trec")
    common = ["evaluate", tiny_model_path, "--collection", collection_path, "--output", tmp_path / "pool"]
    code, text = invoke(*common, "--pool", run_file, "--pool-depth", 3)
    assert code == 0, text
    assert "(pooled)" in text
    assert "pooled: judged documents and the best 3 of" in text
    code, text = invoke("compare", full, tmp_path / "pool")
    assert code == 1
    assert "figures over a pool are only comparable with those over the same pool" in text


def test_what_is_wrong_is_said(
    two_evaluations: tuple[Path, Path], tiny_model_path: Path, collection_path: Path, tmp_path: Path
) -> None:
    broken = tmp_path / "broken.trec"
    broken.write_text("q1 Q0 d1 1 0.5\n")
    out = ["--output", tmp_path / "out"]
    one = ["--collection", collection_path]
    for arguments, message in [
        (["evaluate", tiny_model_path, *out], "no collection: give --collection"),
        (["evaluate", tiny_model_path, *one], "no output: give --output"),
        (["evaluate", *one, *out], "name a model, or give --from-run"),
        (["evaluate", tiny_model_path, "--from-run", broken, *one, *out], "not both"),
        (["evaluate", "--from-run", broken, *one, *one, *out], "2 collections and 1 --from-run: give one for each"),
        (["evaluate", "--from-run", broken, *one, *out], "broken.trec, line 1: a run's lines have 6 columns"),
        (["evaluate", tiny_model_path, *one, *one, *out], "is named twice; name each once"),
        (["evaluate", tiny_model_path, *one, *out, "--metric", "accuracy@1"], "unknown metric 'accuracy@1'"),
        (["evaluate", tiny_model_path, *one, *out, "--split", "nowhere"], "nowhere"),
        (["compare", two_evaluations[0]], "a comparison needs two evaluations"),
        (["compare", two_evaluations[0], tmp_path], "holds no evaluation; make one with: st-clp evaluate"),
        (["report", tmp_path], "holds no evaluation; make one with: st-clp evaluate"),
    ]:
        code, text = invoke(*arguments)
        assert code == 1, (arguments, text)
        assert message in text, (arguments, text)
        assert "Traceback" not in text
    assert not (tmp_path / "out" / "evaluation.json").exists()
