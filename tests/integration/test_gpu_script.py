"""The script that measures a GPU runs, and says where a result is not what it should be."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.fresh import run_fresh_script

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "gpu.py"


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(SCRIPT), *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=500, env=environment, check=False)


def test_it_runs_at_sizes_at_which_nothing_is_measured() -> None:
    found = run("--device", "cpu", "--small")
    assert found.returncode == 0, found.stderr[-2000:]
    assert found.stdout.count("as the processor") == 4
    assert "equal to the bit" in found.stdout
    assert "DIFFER" not in found.stdout
    for line in ("bge-m3's size", "MiniLM's width", "intermediate, compiled", "2 experts, CLPLoss"):
        assert f"| {line}" in found.stdout or f"| 1 negatives, {line}" in found.stdout, found.stdout


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_without_a_device_it_says_what_can_be_done() -> None:
    found = run_fresh_script(SCRIPT, check=False)
    assert found.returncode == 1
    assert "--device cpu --small" in found.stderr


@pytest.mark.gpu
def test_on_a_card_everything_is_as_on_the_processor() -> None:
    found = run("--only", "checks")
    assert found.returncode == 0, found.stderr[-2000:]
    assert "DIFFER" not in found.stdout
