"""Runs that train on queries made of their documents' sentences too."""

from __future__ import annotations

import dataclasses
import json
import logging
from pathlib import Path

import pytest

from st_clp.data import Collection
from st_clp.mining.rows import read_rows
from st_clp.queries.own_text import is_made
from st_clp.run import stages
from st_clp.run.ablation import ablate, read_variants
from tests.toy import settings_of


def test_a_run_trains_on_them_and_chooses_its_share_by_those_that_are_asked(
    tiny_model_path: Path, collection_path: Path, tmp_path: Path
) -> None:
    output = tmp_path / "out"
    settings = settings_of(
        tiny_model_path, collection_path, output, epochs=1, sentence_queries=40, average_with_base="auto"
    )
    forecast = {stage.name: stage.work for stage in stages.forecast_run(settings).stages}
    report = stages.run(settings)
    name = f"{collection_path}/train"
    described = report["collections"]["train"][name]
    made = described["made_of_sentences"]
    assert 35 <= made <= 40  # some of so few words stand in two documents
    assert described["queries"] == 120 + made
    assert report["training"]["averaged"]["queries"] == 12  # a tenth of the 120
    assert sum(report["training"]["rows"].values()) == 120 - 12 + made
    assert f"about {120 - 12 + made} rows" in forecast["train"]
    (mined,) = (output / "run" / "mined").glob("*.jsonl")
    rows = [row for row in read_rows(mined) if is_made(row.query_id)]
    texts = {
        document.doc_id: document.text for document in Collection.load(str(collection_path), split="train").documents()
    }
    assert len(rows) == made
    assert all(set(row.query.split()) <= set(texts[row.positive_id].replace(".", "").split()) for row in rows)


def test_fewer_than_asked_for_are_said(
    tiny_model_path: Path, collection_path: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    settings = settings_of(tiny_model_path, collection_path, tmp_path / "out", sentence_queries=100_000)
    with caplog.at_level(logging.WARNING):
        stages.forecast_run(settings)
    assert "queries could be made of its documents' sentences, of 100000 that are asked for" in caplog.text


def test_variants_of_an_ablation_may_differ_in_them(
    tiny_model_path: Path, collection_path: Path, tmp_path: Path
) -> None:
    base = settings_of(tiny_model_path, collection_path, tmp_path / "out", epochs=1, experts=0, training_arg={})
    settings = dataclasses.replace(base, learning_rate=None)
    (tmp_path / "variants.yaml").write_text("asked: {}\nsentences: {sentence_queries: 40}\n")
    ablate(settings, read_variants(tmp_path / "variants.yaml", settings), seeds=1, learning_rates=[3e-3])
    files = (tmp_path / "out" / "mined").rglob("*.jsonl")
    made = [sum(is_made(row.query_id) for row in read_rows(file)) for file in files]
    assert min(made) == 0
    assert max(made) >= 35
    steps = {
        name: json.loads((tmp_path / "out" / "variants" / name / "seed-42" / "cell.json").read_text())["steps"]
        for name in ("asked", "sentences")
    }
    assert steps["sentences"] > steps["asked"]
