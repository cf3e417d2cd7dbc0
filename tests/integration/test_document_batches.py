"""Runs by default from a small collection: queries made of its sentences, in batches of near documents."""

from __future__ import annotations

import dataclasses
import json
import re
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from sentence_transformers import SentenceTransformer, SentenceTransformerTrainer
from typer.testing import CliRunner

from st_clp import cli
from st_clp.losses import DocumentBatchSampler
from st_clp.mining.rows import read_rows
from st_clp.queries.own_text import is_made
from st_clp.run import splits, stages, training_stage
from st_clp.run.ablation import ablate, read_variants
from tests.toy import settings_of

BY_DEFAULT: dict[str, Any] = {"sentence_queries": None, "batch_size": None, "epochs": None, "experts": 0}


def test_a_run_by_default_gains_and_encodes_a_document_once_for_its_queries(
    tiny_model_path: Path, collection_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    batches: list[tuple[int, int]] = []
    texts: list[set[str]] = []
    own = DocumentBatchSampler.__iter__

    def watched(self: DocumentBatchSampler) -> Any:
        found = list(own(self))
        batches.extend((len(batch), len({self._positives[row] for row in batch})) for batch in found)
        texts.append({self._anchors[row] for batch in found for row in batch})
        return iter(found)

    settings = settings_of(tiny_model_path, collection_path, tmp_path / "out", **BY_DEFAULT)
    forecast = {stage.name: stage.work for stage in stages.forecast_run(settings).stages}
    monkeypatch.setattr(DocumentBatchSampler, "__iter__", watched)
    report = stages.run(settings)
    training = report["training"]
    rows = sum(training["rows"].values())
    made = next(iter(report["collections"]["train"].values()))["made_of_sentences"]
    assert training["batches"] == "documents"
    assert made > 60
    asked = rows - made
    assert 20 < asked < 128  # they come once more, by themselves
    assert training["steps"] == 4 * (-(-rows // 128) + 1)
    assert f"{training['steps']} steps of" in forecast["train"]
    assert f"about {rows:,} rows, 128 a batch" in forecast["train"]
    assert len(batches) >= training["steps"]
    people = set(splits.load_training_collections(settings)[0].queries.values())
    assert [bool(found <= people) for found in texts[-8:]] == [False] * 4 + [True] * 4
    steps = [entry["step"] for entry in training["history"]]
    assert steps == sorted(set(steps))
    assert steps[-1] == training["steps"]
    (name,) = report["scores"]["before"]
    assert report["scores"]["after"][name]["ndcg@10"] > report["scores"]["before"][name]["ndcg@10"]
    card = (tmp_path / "out" / "README.md").read_text()
    assert "batch size 128" in card
    assert "Epochs 4" in card
    assert "- Batches: documents that are near one another" in card
    assert f"{made} queries made of their sentences" in card


def test_queries_are_made_up_to_a_number_and_none_for_batches_of_rows(
    tiny_model_path: Path, collection_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = settings_of(tiny_model_path, collection_path, tmp_path / "out", **BY_DEFAULT)
    (small,) = splits.load_collections(settings).train
    (none,) = splits.load_collections(dataclasses.replace(settings, sentence_queries=0)).train
    with monkeypatch.context() as patched:
        patched.setattr(splits, "MOST_SENTENCES", len(none.queries) + 1)
        (large,) = splits.load_collections(settings).train
        patched.setattr(splits, "MOST_SENTENCES", len(none.queries))
        (much_asked,) = splits.load_collections(settings).train
        (asked,) = splits.load_collections(dataclasses.replace(settings, sentence_queries=7)).train
    made = Counter(doc for query, found in large.judgments.items() if is_made(query) for doc in found)
    assert 0 < made.total() <= len(none.queries) + 1
    assert len(made) <= len(none.queries) // 4 + 1 < sum(1 for _ in small.corpus)
    (of_rows,) = splits.load_collections(dataclasses.replace(settings, batches="rows")).train
    (refreshed,) = splits.load_collections(dataclasses.replace(settings, refresh_every="epoch")).train
    (held,) = splits.load_collections(dataclasses.replace(settings, penalty_weight=0.3)).train
    assert of_rows.queries == refreshed.queries == held.queries == much_asked.queries == none.queries
    assert len(small.queries) > len(asked.queries) == len(none.queries) + 7
    assert splits.settle_batches(settings, none.queries).batches == "rows"


@pytest.mark.parametrize("last", [False, True])  # part of the training, in which it is stopped
def test_a_resumed_training_has_the_batches_of_one_that_was_not_stopped(
    tiny_model_path: Path, collection_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, last: bool
) -> None:
    given = ["run", "--model", str(tiny_model_path), "--collection", str(collection_path), "--no-bf16", "--epochs", "2"]
    given += ["--learning-rate", "3e-3", "--num-negatives", "2", "--range-max", "20", "--batch-size", "64"]
    assert CliRunner().invoke(cli.app, [*given, "--output", str(tmp_path / "whole")]).exit_code == 0
    report = json.loads((tmp_path / "whole" / "report.json").read_text())
    own = SentenceTransformerTrainer.training_step
    steps: list[int] = []

    def interrupted(self: Any, *arguments: Any, **kwargs: Any) -> Any:
        steps.append(self.state.global_step)
        if len(steps) == (report["training"]["steps"] if last else 7):
            raise KeyboardInterrupt
        return own(self, *arguments, **kwargs)

    with monkeypatch.context() as patched:
        patched.setattr(SentenceTransformerTrainer, "training_step", interrupted)
        assert CliRunner().invoke(cli.app, [*given, "--output", str(tmp_path / "stopped")]).exit_code == 130
    # A checkpoint names the sampler and holds none of the texts that it goes by.
    kept = [file.read_bytes() for file in (tmp_path / "stopped").rglob("training_args.bin")]
    assert kept
    assert all(b"_NearDocuments" in found and b"river" not in found for found in kept)
    left: list[None] = []

    def counted(self: Any, *arguments: Any, **kwargs: Any) -> Any:
        left.append(None)
        return own(self, *arguments, **kwargs)

    with monkeypatch.context() as patched:
        patched.setattr(SentenceTransformerTrainer, "training_step", counted)
        resumed = CliRunner().invoke(cli.app, ["run", "--output", str(tmp_path / "stopped"), "--resume"])
    assert resumed.exit_code == 0, resumed.output
    assert len(left) <= report["training"]["steps"] - len(steps) + 2  # what came after the last checkpoint
    assert "going on from checkpoint" in resumed.output
    again = json.loads((tmp_path / "stopped" / "report.json").read_text())
    assert again["training"]["steps"] == report["training"]["steps"]
    assert [(e["step"], e["loss"]) for e in again["training"]["history"]] == [
        (e["step"], e["loss"]) for e in report["training"]["history"]
    ]
    cards = [(tmp_path / name / "README.md").read_text() for name in ("whole", "stopped")]
    losses = [re.findall(r"^\| [\d.]+ +\| \d+ +\| [\d.]+ +\|$", card, re.MULTILINE) for card in cards]
    assert len(losses[0]) > 3
    assert losses[0] == losses[1]
    whole, stopped = (
        SentenceTransformer(str(tmp_path / name), device="cpu").state_dict() for name in ("whole", "stopped")
    )
    assert all(bool((whole[name] == stopped[name]).all()) for name in whole)


@pytest.mark.parametrize(
    ("mined", "trained"),
    [({}, {"refresh_every": 4}), ({}, {"batches": "rows"}), ({"batches": "rows"}, {"batches": "auto"})],
)
def test_what_is_mined_is_what_is_trained_on_and_counted_whatever_a_resumed_run_changes(
    mined: dict[str, Any],
    trained: dict[str, Any],
    tiny_model_path: Path,
    collection_path: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    settings = settings_of(tiny_model_path, collection_path, tmp_path / "out", **{**BY_DEFAULT, **mined, "epochs": 1})

    def stop(*arguments: Any) -> Any:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(stages.TrainingStage, "run", stop)
        with pytest.raises(KeyboardInterrupt):
            stages.run(settings)
    report = stages.run(dataclasses.replace(settings, **trained), resume=True)
    (file,) = (tmp_path / "out" / "run" / "mined").glob("*.jsonl")
    rows = read_rows(file)
    made = {row.query_id for row in rows if is_made(row.query_id)}
    (described,) = report["collections"]["train"].values()
    assert bool(made) == (not mined)
    assert described["made_of_sentences"] >= len(made)
    assert (described["made_of_sentences"] == 0) == (not made)
    assert report["training"]["batches"] == "rows"
    assert report["training"]["steps"] == -(-len(rows) // 16)
    used = [refresh for refresh in report["training"]["refreshes"] if refresh["status"] == "used"]
    assert bool(used) == ("refresh_every" in trained)
    for refresh in used:
        (account,) = refresh["collections"].values()
        assert account["kept"] == 0


def test_variants_that_make_queries_and_such_that_make_none_mine_apart(
    tiny_model_path: Path, collection_path: Path, tmp_path: Path
) -> None:
    given = settings_of(tiny_model_path, collection_path, tmp_path / "out", **BY_DEFAULT, training_arg={})
    settings = dataclasses.replace(given, learning_rate=None)
    (tmp_path / "variants.yaml").write_text("made: {epochs: 0.5}\nrows: {batches: rows, epochs: 0.5}\n")
    ablate(settings, read_variants(tmp_path / "variants.yaml", settings), seeds=1, learning_rates=[3e-3])
    mined = [read_rows(file) for file in (tmp_path / "out" / "mined").rglob("*.jsonl")]
    assert sorted(any(is_made(row.query_id) for row in rows) for rows in mined) == [False, True]


def test_an_ablation_trains_its_variants_in_them(tiny_model_path: Path, collection_path: Path, tmp_path: Path) -> None:
    given = settings_of(
        tiny_model_path, collection_path, tmp_path / "out", **{**BY_DEFAULT, "sentence_queries": 90}, training_arg={}
    )
    settings = dataclasses.replace(given, learning_rate=None)
    (tmp_path / "variants.yaml").write_text("rows: {batches: rows, epochs: 1}\ndocuments: {epochs: 1}\n")
    ablate(settings, read_variants(tmp_path / "variants.yaml", settings), seeds=1, learning_rates=[3e-3])
    cells = {
        name: json.loads((tmp_path / "out" / "variants" / name / "seed-42" / "cell.json").read_text())
        for name in ("rows", "documents")
    }
    (mined,) = (tmp_path / "out" / "mined").rglob("*.jsonl")  # both mine alike
    of_queries = [row.query_id for row in read_rows(mined)]
    rows = len(of_queries) - 12  # held out
    assert 0 < rows - sum(map(is_made, of_queries)) < 128
    assert cells["documents"]["steps"] == -(-rows // 128) + 1
    assert cells["rows"]["steps"] == -(-rows // 16)


def test_a_training_on_a_processor_hands_back_now_and_then(
    tiny_model_path: Path, collection_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    times: list[None] = []
    monkeypatch.setattr(training_stage, "hand_back_freed_memory", lambda: times.append(None))
    monkeypatch.setattr(training_stage, "HAND_BACK_EVERY", 3)
    settings = settings_of(tiny_model_path, collection_path, tmp_path / "out", experts=0, epochs=1)
    report = stages.run(settings)
    assert report["training"]["steps"] >= 3
    assert len(times) == report["training"]["steps"] // 3 + 1  # and in the end
