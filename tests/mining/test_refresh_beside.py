"""Mining beside the training, in processes that are killed, and in trainings of two processes."""

from __future__ import annotations

import copy
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from sentence_transformers import SentenceTransformer
from transformers import TrainerCallback

from st_clp import train_only, upcycle
from st_clp.mining import MiningOptions, mine

SCRIPT = Path(__file__).parent / "refresh_run.py"
OPTIONS = MiningOptions(num_negatives=2, range_max=8)


def mining_processes() -> list[int]:
    """The processes of this one's that mine."""
    found = []
    for path in Path("/proc").glob("[0-9]*"):
        try:
            parent = int((path / "stat").read_text().rpartition(")")[2].split()[1])
            if parent == os.getpid() and "refresh.worker" in (path / "cmdline").read_text():
                found.append(int(path.name))
        except (OSError, ValueError):
            continue
    return found


def texts(collection: Any, model: SentenceTransformer) -> dict[str, list[str]]:
    """A query to its negatives by a model, as the tokenizer reads them."""
    rows = mine(model, collection, OPTIONS, dtype="model", show_progress_bar=False).rows
    read = {row.query: [row.query, *(negative.text for negative in row.negatives)] for row in rows}
    decode, encode = model.tokenizer.decode, model.tokenizer.encode
    plain = [[decode(encode(text), skip_special_tokens=True) for text in row] for row in read.values()]
    return {anchor: negatives for anchor, *negatives in plain}


@pytest.mark.skipif(not Path("/proc/self/stat").is_file(), reason="finds processes by /proc")
def test_mining_beside_uses_the_weights_it_began_with_and_a_killed_process_is_a_failed_refresh(
    tiny_model: SentenceTransformer, tmp_path: Path, refresh_run: ModuleType, caplog: pytest.LogCaptureFixture
) -> None:
    """A mixture of experts: begun at step 3, killed; at 6, used from 8; at 9, used from 11; at 12, too late to be used.

    Another model stands in for it from the first step on, so that what is mined differs from what training began with.
    """
    upcycle(tiny_model, num_experts=2)
    train_only(tiny_model, "moe")
    weights: dict[int, SentenceTransformer] = {}

    def remember(state: Any, model: SentenceTransformer) -> None:
        weights[state.global_step] = copy.deepcopy(model).eval()

    def kill(state: Any, model: Any) -> None:
        if state.global_step == 3:
            for pid in mining_processes():
                os.kill(pid, signal.SIGKILL)
        if state.global_step == 5:
            assert done_refreshes(state)[1]["status"] == "failed"  # the next one does not wait for the end

    def done_refreshes(state: Any) -> list[dict[str, Any]]:
        return state.stateful_callbacks["st_clp.refreshes"]

    def wait(state: Any, model: Any) -> None:
        due = [r for r in done_refreshes(state) if r["status"] == "mining" and r["due"] == state.global_step + 1]
        while due and mining_processes() and not refresh_run.whole(tmp_path, due[0]["step"]):
            time.sleep(0.02)

    done = refresh_run.train(
        tiny_model,
        tmp_path,
        asynchronous=True,
        lag=2,
        before=[refresh_run.make_callback(TrainerCallback, on_step_end=remember, on_step_begin=wait)],
        after=[refresh_run.make_callback(TrainerCallback, on_step_end=kill)],
        arguments={"num_train_epochs": 3.25},
    )
    found = [(r["step"], r["status"], r["used_from"]) for r in done.ance.refreshes]
    assert found == [(0, "first", 0), (3, "failed", None), (6, "used", 8), (9, "used", 11)]
    assert "was killed by signal 9" in done.ance.refreshes[1]["error"]
    assert "the refresh of step 3 failed, and training goes on with the negatives of step 0" in caplog.text
    collection = refresh_run.make_collection()
    for first, last, step in ((8, 11, 6), (11, 13, 9)):
        expected = texts(collection, weights[step])
        for batch in done.batches[first:last]:
            for anchor, _, *row in zip(*batch, strict=True):
                assert row[:2] == expected[anchor]
    ages = [e["refresh_age"] for e in done.trainer.state.log_history if "refresh_age" in e]
    assert ages == [2, 2]
    assert mining_processes() == []
    assert not list((tmp_path / "ance" / "snapshots").glob("step-*"))


def run_script(tmp_path: Path, name: str, **job: Any) -> subprocess.CompletedProcess[str]:
    file = tmp_path / f"{name}.json"
    file.write_text(json.dumps(job))
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    return subprocess.run(
        [sys.executable, str(SCRIPT), str(file)], capture_output=True, text=True, timeout=240, env=environment
    )


def test_a_run_killed_in_the_middle_of_a_refresh_goes_on_with_the_same_batches(
    tiny_model_path: Path, tmp_path: Path, refresh_run: ModuleType
) -> None:
    """Begun at step 4, saved at 5, killed before 7, due at 8."""
    job = {"every": 4, "asynchronous": True, "patient": True, "arguments": refresh_run.SAVING}
    killed = run_script(
        tmp_path, "killed", model=str(tiny_model_path), output=str(tmp_path / "killed"), kill_at=7, **job
    )
    assert killed.returncode == -signal.SIGKILL, killed.stderr[-3000:]
    journal = json.loads((tmp_path / "killed" / "ance" / "refreshes.json").read_text())
    assert [(r["step"], r["status"]) for r in journal] == [(0, "first"), (4, "mining")]
    # What was mined already is mined again, from the snapshot that is there.
    for part in (tmp_path / "killed" / "ance" / "negatives").glob("step-00000004*/account.json"):
        part.unlink()
    job["patient"] = False
    resumed = refresh_run.train(tiny_model_path, tmp_path / "killed", resume=True, **job)
    whole = refresh_run.train(tiny_model_path, tmp_path / "whole", **{**job, "patient": True})
    assert [(r["step"], r["used_from"]) for r in whole.ance.refreshes] == [(0, 0), (4, 8)]
    assert whole.batches[8:] != refresh_run.train(tiny_model_path, tmp_path / "none", every=None).batches[8:]
    assert resumed.batches == whole.batches[5:]
    assert [(r["step"], r["used_from"]) for r in resumed.ance.refreshes] == [(0, 0), (4, 8)]


@pytest.mark.parametrize("asynchronous", [False, True])
def test_two_processes_use_the_same_negatives(
    asynchronous: bool, tiny_model_path: Path, tmp_path: Path, refresh_run: ModuleType
) -> None:
    output = tmp_path / "out"
    done = run_script(
        tmp_path,
        "job",
        model=str(tiny_model_path),
        output=str(output),
        processes=2,
        asynchronous=asynchronous,
        every=2,
        lag=1 if asynchronous else None,
        patient=True,
        arguments={"per_device_train_batch_size": 2},
    )
    assert done.returncode == 0, done.stderr[-4000:]
    first, second = (json.loads((output / f"process-{rank}.json").read_text()) for rank in (0, 1))
    assert first["refreshes"] == second["refreshes"]
    lag = 1 if asynchronous else 0
    steps = [r["step"] for r in first["refreshes"]]
    assert [r["used_from"] for r in first["refreshes"]] == [0, *(step + lag for step in steps[1:])]
    assert steps == [0, 2, 4, 6, 8, 10]
    # Each query stands in one of the two alone; its negatives are those of the generation in both.
    for rank, batches in enumerate((first["batches"], second["batches"])):
        for number, batch in enumerate(batches):
            step = max(s for s in steps if s == 0 or s + lag <= number)
            expected = negatives_in(output, step, tiny_model_path)
            for anchor, _, *row in zip(*batch, strict=True):
                assert row[:2] == expected[anchor], (rank, number)
    assert all(not set(a[0]) & set(b[0]) for a, b in zip(first["batches"], second["batches"], strict=True))


def negatives_in(output: Path, step: int, model_path: Path) -> dict[str, list[str]]:
    from st_clp.mining.refresh.generation import Generation

    tokenizer = SentenceTransformer(str(model_path), device="cpu").tokenizer
    generation = Generation(output / "ance" / "negatives" / f"step-{step:08d}", 1)
    found = {}
    for number in range(len(generation)):
        row = generation.row(number)
        read = [row["anchor"], row["negative_1"], row["negative_2"]]
        anchor, *negatives = (tokenizer.decode(tokenizer.encode(t), skip_special_tokens=True) for t in read)
        found[anchor] = negatives
    return found
