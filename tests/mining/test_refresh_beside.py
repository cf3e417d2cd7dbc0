"""Mining beside the training, in processes that are killed, and in trainings of two processes."""

from __future__ import annotations

import copy
import json
import os
import signal
import subprocess
import time
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from sentence_transformers import SentenceTransformer
from transformers import TrainerCallback

from st_clp import upcycle
from st_clp.mining import MiningOptions, mine
from tests.fresh import run_fresh_script

SCRIPT = Path(__file__).parent / "refresh_run.py"
OPTIONS = MiningOptions(num_negatives=2, range_max=8)


def mining_processes() -> list[int]:
    """The living processes of this one's that mine."""
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


JOB: dict[str, Any] = {"every": 4, "asynchronous": True, "arguments": {"num_train_epochs": 5}}


@pytest.fixture(scope="module")
def experts_path(tiny_model_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A mixture of experts, of which the experts and routers alone will train."""
    model = SentenceTransformer(str(tiny_model_path), device="cpu")
    upcycle(model, num_experts=2)
    path = tmp_path_factory.mktemp("experts") / "model"
    model.save(str(path))
    return path


@pytest.fixture(scope="module")
def whole(
    experts_path: Path, tmp_path_factory: pytest.TempPathFactory, refresh_run: ModuleType
) -> tuple[Any, dict[int, SentenceTransformer], Path]:
    """A run of 20 steps, the models after each, and its folder: begun at 4, used from 8; at 8, and its process killed;
    at 12, used from 16; at 16, it would be due when training ends."""
    output = tmp_path_factory.mktemp("whole")
    weights: dict[int, SentenceTransformer] = {}

    def remember(state: Any, model: SentenceTransformer) -> None:
        weights[state.global_step] = copy.deepcopy(model).eval()

    def kill(state: Any, model: Any) -> None:
        if state.global_step == 8:
            for pid in mining_processes():
                os.kill(pid, signal.SIGKILL)
                os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)  # it ends some time after, and these steps are short

    def wait(state: Any, model: Any) -> None:
        """Training so slow that what is not killed is there in time."""
        mined = [r for r in state.stateful_callbacks["st_clp.refreshes"] if r["status"] == "mining" and r["step"] != 8]
        while mined and not refresh_run.whole(output, mined[0]["step"]):
            time.sleep(0.02)

    done = refresh_run.train(
        experts_path,
        output,
        before=[refresh_run.make_callback(TrainerCallback, on_step_end=remember, on_step_begin=wait)],
        after=[refresh_run.make_callback(TrainerCallback, on_step_end=kill)],
        **{**JOB, "arguments": {**JOB["arguments"], **refresh_run.SAVING}},
    )
    return done, weights, output


@pytest.mark.skipif(not Path("/proc/self/stat").is_file(), reason="finds processes by /proc")
def test_mining_beside_uses_the_weights_it_began_with_and_a_killed_process_is_a_failed_refresh(
    whole: tuple[Any, dict[int, SentenceTransformer], Path], refresh_run: ModuleType
) -> None:
    done, weights, output = whole
    found = [(r["step"], r["status"], r["used_from"]) for r in done.ance.refreshes]
    assert found == [(0, "first", 0), (4, "used", 8), (8, "failed", None), (12, "used", 16)]
    assert "was killed by signal 9" in done.ance.refreshes[2]["error"]
    expected = {step: texts(refresh_run.make_collection(), weights[step]) for step in (4, 12)}
    assert expected[4] != expected[12]
    for first, last, step in ((8, 16, 4), (16, 20, 12)):
        for batch in done.batches[first:last]:
            for anchor, _, *row in zip(*batch, strict=True):
                assert row[:2] == expected[step][anchor]
    history = done.trainer.state.log_history
    assert [e["refresh_age"] for e in history if "refresh_age" in e] == [4, 4]
    assert [e["step"] for e in history if "refresh_failed" in e] == [12]
    assert mining_processes() == []
    assert not list((output / "ance" / "snapshots").glob("step-*"))


def run_script(tmp_path: Path, name: str, **job: Any) -> subprocess.CompletedProcess[str]:
    file = tmp_path / f"{name}.json"
    file.write_text(json.dumps(job))
    return run_fresh_script(SCRIPT, file, check=False)


def test_a_run_killed_in_the_middle_of_a_refresh_goes_on_with_the_same_batches(
    experts_path: Path, tmp_path: Path, refresh_run: ModuleType, whole: tuple[Any, Any, Path]
) -> None:
    """Begun at step 4, saved at 5, killed before 7, due at 8."""
    output = tmp_path / "killed"
    job = {**JOB, "arguments": {**JOB["arguments"], **refresh_run.SAVING}}
    run = {"model": str(experts_path), "output": str(output), **job}
    killed = run_script(tmp_path, "killed", runs=[run], kill_at=7)
    assert killed.returncode == -signal.SIGKILL, killed.stderr[-3000:]
    journal = json.loads((output / "ance" / "refreshes.json").read_text())
    assert [(r["step"], r["status"]) for r in journal] == [(0, "first"), (4, "mining")]
    assert not refresh_run.whole(output, 4)  # the mining process ended with the run
    resumed = refresh_run.train(experts_path, output, resume=True, **job)
    assert resumed.batches[:7] == whole[0].batches[5:12]
    assert whole[0].batches[8:12] != refresh_run.train(experts_path, tmp_path / "none", every=None).batches[8:12]
    assert (resumed.ance.refreshes[1]["step"], resumed.ance.refreshes[1]["used_from"]) == (4, 8)


def test_two_processes_use_the_same_negatives(tiny_model_path: Path, tmp_path: Path) -> None:
    common = {"model": str(tiny_model_path), "every": 2, "arguments": {"per_device_train_batch_size": 2}}
    lags = {"here": 0, "beside": 1}
    runs = [
        {**common, "output": str(tmp_path / "here")},
        {**common, "output": str(tmp_path / "beside"), "asynchronous": True, "lag": 1, "patient": True},
    ]
    done = run_script(tmp_path, "job", runs=runs, processes=2)
    assert done.returncode == 0, done.stderr[-4000:]
    for name, lag in lags.items():
        output = tmp_path / name
        first, second = (json.loads((output / f"process-{rank}.json").read_text()) for rank in (0, 1))
        assert first["refreshes"] == second["refreshes"]
        assert [(r["step"], r["used_from"]) for r in first["refreshes"][1:]] == [(s, s + lag) for s in (2, 4, 6, 8, 10)]
        # Each query stands in one of the two alone; its negatives are those of the generation in both.
        for rank, batches in enumerate((first["batches"], second["batches"])):
            for number, batch in enumerate(batches):
                expected = negatives_in(output, max(0, (number - lag) // 2 * 2), tiny_model_path)
                for anchor, _, *row in zip(*batch, strict=True):
                    assert row[:2] == expected[anchor], (name, rank, number)
        assert all(not set(a[0]) & set(b[0]) for a, b in zip(first["batches"], second["batches"], strict=True))


def negatives_in(output: Path, step: int, model_path: Path) -> dict[str, list[str]]:
    from st_clp.refresh.generations import Generation

    tokenizer = SentenceTransformer(str(model_path), device="cpu").tokenizer
    generation = Generation(output / "ance" / "negatives" / f"step-{step:08d}", 1)
    found = {}
    for number in range(len(generation)):
        row = generation.row(number)
        read = [row["anchor"], row["negative_1"], row["negative_2"]]
        anchor, *negatives = (tokenizer.decode(tokenizer.encode(t), skip_special_tokens=True) for t in read)
        found[anchor] = negatives
    return found
