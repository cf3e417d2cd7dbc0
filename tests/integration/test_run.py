"""Whole runs on a tiny model: what comes out, and what becomes of a run that is stopped, resumed or misused."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from safetensors import SafetensorError
from sentence_transformers import SentenceTransformer
from typer.testing import CliRunner, Result

import st_clp
from st_clp import cli, load, mine_hard_negatives, upcycle
from st_clp.data import Collection
from st_clp.run import stages
from tests.fresh import run_fresh
from tests.toy import settings_of

TEXTS = ["where is the red river", "in the north is a big lake"]


@pytest.fixture(scope="module")
def finished(
    tiny_model_path: Path, collection_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, dict]:
    """An undisturbed run: (its folder, its report)."""
    output = tmp_path_factory.mktemp("finished") / "out"
    return output, stages.run(settings_of(tiny_model_path, collection_path, output))


def test_a_run_leaves_a_better_model_a_card_a_report_and_runs(
    finished: tuple[Path, dict], collection_path: Path, run_snippets: Any
) -> None:
    output, report = finished
    name = f"{collection_path}/dev"
    before, after = (report["scores"][when][name]["ndcg@10"] for when in ("before", "after"))
    assert after > before + 0.1
    assert json.loads((output / "report.json").read_text()) == report
    assert report["settings"]["collection"] == [str(collection_path)]
    assert report["versions"]["st-clp"] == st_clp.__version__
    assert report["training"]["trainable_parameters"] < report["training"]["all_parameters"]
    usage = report["expert_usage"]["layers"]
    assert [layer["layer"] for layer in usage] == [0, 1]
    assert all(sum(layer["shares"]) == pytest.approx(1) for layer in usage)
    assert set(usage[0]["groups"]) == {name}
    losses = [entry["loss"] for entry in report["training"]["history"]]
    assert np.mean(losses[-5:]) < np.mean(losses[:5])
    card = (output / "README.md").read_text()
    assert "2412.17364" in card
    assert f"{before:.3f} → {after:.3f}" in card
    assert "## Model Details" in card
    assert run_snippets(output) == {output.name: [3, 32]}
    run_lines = [
        line.split()
        for line in next((output / "run" / "evaluations" / "after" / "runs").glob("*.trec")).read_text().splitlines()
    ]
    assert {len(line) for line in run_lines} == {6}
    mined = report["mining"][f"{collection_path}/train"]
    assert mined["queries"] == mined["rows"] == 120
    assert mined["with_query"] > 0


def test_the_saved_model_is_the_same_in_a_fresh_process(finished: tuple[Path, dict]) -> None:
    output, _ = finished
    expected = st_clp.load(str(output)).encode(TEXTS)
    code = (
        "import sys, json; from sentence_transformers import SentenceTransformer\n"
        "model = SentenceTransformer(sys.argv[1], trust_remote_code=True, device='cpu')\n"
        "print(json.dumps([type(model[0]).__name__, model.encode(json.loads(sys.argv[2])).tolist()]))"
    )
    result = run_fresh(code, output, json.dumps(TEXTS))
    kind, embeddings = json.loads(result.stdout.splitlines()[-1])
    assert kind == "MoETransformer"
    np.testing.assert_array_equal(np.array(embeddings, dtype=np.float32), expected)


def test_search_answers_from_the_evaluated_collection(finished: tuple[Path, dict], collection_path: Path) -> None:
    output, _ = finished
    dev = Collection.load(str(collection_path), split="dev")
    found = 0
    for query_id, query in list(dev.queries.items())[:10]:
        result = CliRunner().invoke(cli.app, ["search", str(output), query, "-k", "10"])
        assert result.exit_code == 0, result.output
        found += any(f" {doc_id}\n" in result.output for doc_id in dev.judgments[query_id])
    assert found >= 3
    assert CliRunner().invoke(cli.app, ["search", str(output), "x", "--corpus", "nope"]).exit_code == 1


class Stop:
    """Raises an error the first time that a function is called, and steps aside after that."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, owner: Any, name: str, error: BaseException, *, skip: int = 0):
        original, self.calls = getattr(owner, name), 0

        def stopping(*args: Any, **kwargs: Any) -> Any:
            self.calls += 1
            if self.calls == skip + 1:
                raise error
            return original(*args, **kwargs)

        monkeypatch.setattr(owner, name, stopping)


def stops() -> dict[str, Callable[[pytest.MonkeyPatch, BaseException], Stop]]:
    from sentence_transformers import SentenceTransformerTrainer

    return {
        "evaluate-before": lambda m, e: Stop(m, stages.CollectionEvaluator, "evaluate_in", e),
        "mine": lambda m, e: Stop(m, stages, "write_rows", e),
        "train": lambda m, e: Stop(m, SentenceTransformerTrainer, "training_step", e, skip=20),
        "evaluate-after": lambda m, e: Stop(m, stages, "load", e),
        "report": lambda m, e: Stop(m, stages, "write_card", e),
    }


def invoke(*arguments: str) -> Result:
    return CliRunner().invoke(cli.app, ["run", *arguments])


@pytest.mark.parametrize("stage", ["evaluate-before", "mine", "train", "evaluate-after", "report"])
def test_stopped_anywhere_and_resumed_gives_the_undisturbed_result(
    finished: tuple[Path, dict],
    tiny_model_path: Path,
    collection_path: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    stage: str,
) -> None:
    output = tmp_path / "out"
    settings = settings_of(tiny_model_path, collection_path, output)
    config = tmp_path / "run.yaml"
    config.write_text(yaml.safe_dump(settings.to_dict()))
    stops()[stage](monkeypatch, KeyboardInterrupt())
    result = invoke("--config", str(config))
    assert result.exit_code == 130, result.output
    assert f"st-clp run --output {output} --resume" in result.output
    result = invoke("--output", str(output), "--resume")
    assert result.exit_code == 0, result.output
    assert json.loads((output / "report.json").read_text())["scores"] == finished[1]["scores"]
    np.testing.assert_array_equal(st_clp.load(str(output)).encode(TEXTS), st_clp.load(str(finished[0])).encode(TEXTS))
    if stage == "train":
        assert "going on from checkpoint-" in result.output
        cards = [(folder / "README.md").read_text() for folder in (output, finished[0])]
        logs = [card.partition("### Training Logs")[2].partition("### Training Time")[0] for card in cards]
        assert logs[0] == logs[1] != ""


def test_a_full_disk_is_said_and_the_run_resumes(
    tiny_model_path: Path, collection_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "out"
    error = OSError(28, "No space left on device", str(output / "run" / "mined"))
    Stop(monkeypatch, stages, "write_rows", error)
    settings = settings_of(tiny_model_path, collection_path, output, epochs=1)
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(settings.to_dict()))
    result = invoke("--config", str(tmp_path / "run.yaml"))
    assert result.exit_code == 1
    assert "No space left on device" in result.output
    assert "--resume" in result.output
    assert invoke("--output", str(output), "--resume").exit_code == 0


def test_an_output_folder_in_use_is_refused_unless_told(
    finished: tuple[Path, dict], tiny_model_path: Path, collection_path: Path, tmp_path: Path
) -> None:
    output = tmp_path / "out"
    shutil.copytree(finished[0], output)
    common = ["--model", str(tiny_model_path), "--collection", str(collection_path), "--output", str(output)]
    result = invoke(*common)
    assert result.exit_code == 1
    assert "holds a run already" in result.output
    result = invoke(*common, "--resume")
    assert result.exit_code == 1
    assert "started with other settings" in result.output
    assert "num_negatives was 2, now 4" in result.output
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    (foreign / "thesis.tex").write_text("years of work")
    result = invoke(*common[:-1], str(foreign), "--overwrite")
    assert result.exit_code == 1
    assert "is not the folder of a run" in result.output
    assert (foreign / "thesis.tex").exists()
    result = invoke(*common, "--overwrite", "--epochs", "0.1", "--no-bf16", "--range-max", "10")
    assert result.exit_code == 0, result.output
    assert json.loads((output / "report.json").read_text())["settings"]["epochs"] == 0.1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--collection", "miracl/kk"], "unknown collection 'miracl/kk'"),
        (["--collection", "{tmp}/missing.jsonl"], "no file or folder"),
        (["--collection", "{tmp}/empty.jsonl"], "is empty"),
        (["--collection", "{tmp}/broken.jsonl"], "line 2: not valid JSON"),
        (["--collection", "{tmp}/unjudged"], "there are no judgments"),
        (["--collection", "{collection}", "--model", "{tmp}/no-model"], "there is no folder"),
        (["--collection", "{collection}", "--model", "{tmp}"], "cannot be loaded"),
        (["--collection", "{collection}", "--experts", "1"], "a mixture needs at least two experts"),
        (["--collection", "{collection}", "--penalty-weight", "2"], "penalty_weight must be at least 0 and at most 1"),
        (["--collection", "{collection}", "--training-arg", "weight_decoy=1"], "did you mean weight_decay?"),
        (["--collection", "{collection}", "--training-arg", "weight_decay"], "takes NAME=VALUE"),
        (["--collection", "{collection}", "--training-arg", "max_steps=["], "max_steps=[: the value is no valid YAML"),
        (["--collection", "{collection}", "--training-arg", "max_steps=!!python/tuple x"], "is no valid YAML"),
        (["--collection", "{collection}", "--training-arg", "max_steps=x"], "max_steps must be of the kind int"),
        (["--collection", "{collection}", "--learning-rate", "inf"], "learning_rate must be a finite number"),
        (["--collection", "{collection}", "--seed", "-1"], "seed must be at least 0"),
        (["--collection", "{collection}", "--eval-split", "test"], "no split 'test' to evaluate on; it has dev, train"),
        (["--collection", "{collection}", "--range-min", "100"], "range_min"),
        (["--collection", "{collection}", "--output", "/proc/out"], "/proc/out"),
        (["--config", "{tmp}/bad.yaml"], "there is no setting 'num_negative'; did you mean num_negatives?"),
        ([], "no collection"),
        (["--collection", "{tmp}/spaced"], "the document id 'd 1' is empty or holds white space"),
    ],
)
def test_mistakes_end_in_a_message_that_helps_and_leave_nothing(
    tiny_model_path: Path, collection_path: Path, tmp_path: Path, arguments: list[str], message: str
) -> None:
    (tmp_path / "empty.jsonl").write_text("")
    (tmp_path / "broken.jsonl").write_text('{"query": "a", "pos": ["b"]}\n{"query": \n')
    (tmp_path / "bad.yaml").write_text("num_negative: 3\n")
    shutil.copytree(collection_path, tmp_path / "unjudged", ignore=shutil.ignore_patterns("*.tsv"))
    write_collection_with_white_space_in_an_id(tmp_path / "spaced")
    filled = [text.format(tmp=tmp_path, collection=collection_path) for text in arguments]
    common = [] if "--model" in filled else ["--model", str(tiny_model_path)]
    common += [] if "--output" in filled else ["--output", str(tmp_path / "out")]
    result = invoke(*common, *filled)
    assert result.exit_code == 1, result.output
    assert message in " ".join(result.output.split())
    assert "Traceback" not in result.output
    assert not (tmp_path / "out").exists()


def write_collection_with_white_space_in_an_id(folder: Path) -> None:
    (folder / "qrels").mkdir(parents=True)
    (folder / "corpus.jsonl").write_text("".join(f'{{"_id": "d {i}", "text": "document {i}"}}\n' for i in (1, 2, 3)))
    (folder / "queries.jsonl").write_text('{"_id": "q1", "text": "a"}\n{"_id": "q2", "text": "b"}\n')
    (folder / "qrels" / "train.tsv").write_text("query-id\tcorpus-id\tscore\nq2\td 2\t1\n")
    (folder / "qrels" / "dev.tsv").write_text("query-id\tcorpus-id\tscore\nq1\td 1\t1\n")


def test_training_rows_without_a_split_hold_some_queries_out(
    collection_path: Path, tiny_model_path: Path, tmp_path: Path
) -> None:
    mine_hard_negatives(
        SentenceTransformer(str(tiny_model_path)),
        Collection.load(str(collection_path), split="train"),
        num_negatives=2,
        prefer_known_queries=False,  # so that few negatives of a row are another row's positives
        output_file=tmp_path / "rows.jsonl",
        show_progress_bar=False,
    )
    report = stages.run(
        settings_of(tiny_model_path, tmp_path / "rows.jsonl", tmp_path / "out", experts=0, epochs=1, num_negatives=2)
    )
    counts = report["collections"]
    (train,), (held_out,) = counts["train"].values(), counts["evaluate"].values()
    assert held_out["queries"] == round(0.1 * (train["queries"] + held_out["queries"]))
    # What the rows name comes first; a negative of one row that is a positive of another is replaced.
    negatives = report["mining"].popitem()[1]["negatives"]
    assert negatives["judged"] > 0.9 * sum(negatives.values())
    # A dense model needs nothing of st_clp to be opened.
    assert type(SentenceTransformer(str(tmp_path / "out"))[0]).__name__ == "Transformer"


def test_two_collections_train_together_and_each_is_reported(
    tiny_model_path: Path, collection_path: Path, other_collection_path: Path, tmp_path: Path
) -> None:
    other = other_collection_path
    settings = settings_of(tiny_model_path, collection_path, tmp_path / "out", epochs=1, mini_batch_size=16)
    settings.collection.append(str(other))
    report = stages.run(settings)
    assert set(report["scores"]["after"]) == {f"{collection_path}/dev", f"{other}/dev"}
    assert sum(report["training"]["rows"].values()) == 240


def test_a_base_that_is_a_mixture_trains_its_experts_and_stays_one(
    tiny_model_path: Path, collection_path: Path, tmp_path: Path
) -> None:
    upcycle(SentenceTransformer(str(tiny_model_path), device="cpu")).save(str(tmp_path / "mixture"))
    short = ["--sentence-queries", "0", "--epochs", "0.5", "--num-negatives", "1", "--no-bf16"]
    said = {}
    for name, base in (("dense", tiny_model_path), ("moe", tmp_path / "mixture")):
        output = tmp_path / name
        result = invoke("--collection", str(collection_path), "--model", str(base), "--output", str(output), *short)
        assert result.exit_code == 0, result.output
        said[name] = " ".join(result.output.split()), (output / "README.md").read_text()
    assert "intermediate: " in said["dense"][0]
    assert 'open it with SentenceTransformer("' in said["dense"][0]
    assert "no mixture of experts" in said["dense"][1]
    assert "Open it with `SentenceTransformer(path)`" in said["dense"][1]
    SentenceTransformer(str(tmp_path / "dense"))  # without st_clp's classes
    assert "moe: " in said["moe"][0]
    assert 'open it with st_clp.load("' in said["moe"][0]
    assert "the mixture of experts that the base model is" in said["moe"][1]
    assert "(`moe`)" in said["moe"][1]
    assert "Open it with `st_clp.load(path)`" in said["moe"][1]
    base = load(tmp_path / "mixture").state_dict()
    changed = {name for name, weight in load(tmp_path / "moe").state_dict().items() if not weight.equal(base[name])}
    assert any(".experts." in name for name in changed)
    assert all(".experts." in name or ".gate." in name for name in changed)


def test_a_full_disk_ends_in_advice_whoever_meets_it(
    tiny_model_path: Path, collection_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # What safetensors raises is no OSError; only a real full disk makes it raise, so its own error stands in for one.
    def no_space(self: SentenceTransformer, *arguments: object, **options: object) -> None:
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    arguments = ["--collection", str(collection_path), "--model", str(tiny_model_path), "--experts", "0"]
    arguments += ["--num-negatives", "1", "--epochs", "1", "--output", str(tmp_path / "out")]
    with monkeypatch.context() as patch:
        patch.setattr(SentenceTransformer, "save", no_space)
        stopped = invoke(*arguments, "--training-arg", "save_strategy=no")
    assert stopped.exit_code == 1
    assert "No space left on the disk; make room" in " ".join(stopped.output.split())
    assert "--resume" in stopped.output
    assert invoke("--output", str(tmp_path / "out"), "--resume").exit_code == 0


def test_a_warning_of_ours_is_seen_once(collection_path: Path, tiny_model_path: Path, tmp_path: Path) -> None:
    """Several stages read the same collection; each of its faults is said, and said once."""
    collection = shutil.copytree(collection_path, tmp_path / "collection")
    for split in ("train", "dev"):
        with open(collection / "qrels" / f"{split}.tsv", "a", encoding="utf-8") as file:
            file.write("absent\td1\t1\n")
    command = [sys.executable, "-m", "st_clp", "run", "--model", tiny_model_path, "--output", tmp_path / "out"]
    command += ["--collection", collection, "--epochs", "1", "--num-negatives", "1"]
    done = subprocess.run([*map(str, command)], capture_output=True, text=True, check=True)
    lines = [line for line in done.stderr.splitlines() if "left out 1 judgments of a query" in line]
    assert sorted(line.partition(": left out")[0].rpartition("/")[2] for line in lines) == ["dev", "train"]
