"""A small training with refreshed negatives that writes down its batches; loaded by conftest.py, and run as a script.

``refresh_run.py JOB`` reads a JSON file: ``"runs"``, each the arguments of a :func:`train`, ``"processes"`` where it is
to be several gloo processes, and ``"kill_at"`` where the process is to kill itself at the beginning of that step. Each
process writes the batches and refreshes of each run as JSON to ``OUTPUT/process-RANK.json``.
"""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

SAVING = {"save_strategy": "steps", "save_steps": 5}
WORDS = "river lake mountain city country money bank language people capital red blue green old new big small".split()


@dataclasses.dataclass
class Trained:
    """What a training was."""

    batches: list[list[list[str]]]  # step by step, column by column, the texts; the labels last
    ance: Any
    trainer: Any
    model: Any


def make_collection(seed: int = 0, documents: int = 24, queries: int = 16) -> Any:
    """Query i is answered by document i; documents beyond that are asked for by no query."""
    from st_clp import Collection

    a, b = 5 + 2 * seed, 3 + 4 * seed
    texts = {f"d{i}": f"the {WORDS[i % 17]} of {WORDS[(i * a + 1) % 17]} {i} {seed}" for i in range(documents)}
    asked = {f"q{i}": f"which {WORDS[i % 17]} is {WORDS[(i * b) % 17]} {i}?" for i in range(queries)}
    return Collection.from_dict(
        texts, asked, {f"q{i}": {f"d{i}": 1} for i in range(queries)}, name=f"toy {seed}", corpus_name=f"toy {seed}"
    )


def make_callback(callback: Any, **methods: Callable[..., None]) -> Any:
    """A TrainerCallback with these methods, which are given the Trainer's state and model."""

    def method(work: Callable[..., None]) -> Callable[..., None]:
        return lambda self, args, state, control, model=None, **kwargs: work(state, model)

    return type("Probe", (callback,), {name: method(work) for name, work in methods.items()})()


def patience(ance: Any, folder: Path, callback: Any) -> Any:
    """Training so slow that what is mined beside it is always there in time."""

    def wait(state: Any, model: Any) -> None:
        deadline = time.monotonic() + 100
        for refresh in ance.refreshes:
            while refresh["status"] == "mining" and not whole(folder, refresh["step"]):
                if time.monotonic() > deadline:
                    logs = [path.read_text() for path in (folder / "ance").rglob("*.log")]
                    raise TimeoutError(f"the refresh of step {refresh['step']} is not there: {logs}")
                time.sleep(0.02)

    return make_callback(callback, on_step_begin=wait)


def whole(folder: Path, step: int) -> bool:
    return (folder / "ance" / "negatives" / f"step-{step:08d}" / "account.json").is_file()


def train(
    model: Any,
    output: Path,
    *,
    seeds: Sequence[int] = (0,),
    options: dict[str, Any] | None = None,
    first_options: dict[str, Any] | None = None,
    every: int | str | None = 3,
    patient: bool = False,
    before: Sequence[Any] = (),
    after: Sequence[Any] = (),
    resume: bool | str = False,
    arguments: dict[str, Any] | None = None,
    close: bool = True,
    reported: bool = False,
    **refresh: Any,
) -> Trained:
    """Train, with 4 rows in a batch, for 3 epochs of 4 steps and more where there are more collections."""
    import torch
    from datasets import DatasetDict
    from sentence_transformers import SentenceTransformerTrainer, SentenceTransformerTrainingArguments
    from transformers import TrainerCallback

    from st_clp import AnceCallback, CLPLoss, load, train_only
    from st_clp.mining import DETAIL_COLUMNS, MiningOptions, mine
    from st_clp.mining.rows import to_dataset
    from st_clp.moe import is_moe

    torch.set_num_threads(1)
    if isinstance(model, (str, Path)):
        model = load(model, device="cpu")
        if is_moe(model):
            train_only(model, "moe")
    mining = MiningOptions(**{"num_negatives": 2, "range_max": 8, **(options or {})})
    collections = {f"toy {seed}": make_collection(seed) for seed in seeds}
    rows = {}
    for name, collection in collections.items():
        # What training begins with comes from another model, so that the first refresh changes it.
        first = dataclasses.replace(mining, **(first_options or {}))
        found = mine(first_model(model), collection, first, dtype="model", show_progress_bar=False).rows
        rows[name] = to_dataset(found, num_negatives=2, queries_per_negative=mining.queries_per_negative, details=True)
    batches: list[list[list[str]]] = []

    class Recording(CLPLoss):
        def forward(self, features: Any, labels: Any = None) -> Any:
            if self.training:
                decode = model.tokenizer.batch_decode
                batch = [decode(column["input_ids"], skip_special_tokens=True) for column in features]
                batches.append([*batch, [] if labels is None else [json.dumps(row) for row in labels.tolist()]])
            return super().forward(features, labels)

    ance = None
    if every is not None:
        single = len(seeds) == 1
        ance = AnceCallback(
            next(iter(collections.values())) if single else collections,
            next(iter(rows.values())) if single else rows,
            every=every,
            options=mining,
            dtype="model",
            **refresh,
        )
        dataset = ance.train_dataset
    else:
        plain = {name: found.remove_columns(DETAIL_COLUMNS) for name, found in rows.items()}
        dataset = next(iter(plain.values())) if len(plain) == 1 else DatasetDict(plain)
    callbacks = [*before, *([ance] if ance is not None else []), *after]
    if patient:
        callbacks.insert(0, patience(ance, output, TrainerCallback))
    trainer = SentenceTransformerTrainer(
        model=model,
        args=SentenceTransformerTrainingArguments(
            **{
                "output_dir": str(output),
                "num_train_epochs": 3,
                "per_device_train_batch_size": 4,
                "learning_rate": 3e-3,
                "use_cpu": True,
                "seed": 5,
                "save_strategy": "no",
                "logging_steps": 2,
                "report_to": "none",
                "disable_tqdm": True,
                **(arguments or {}),
            }
        ),
        train_dataset=dataset,
        loss=Recording(model, scale=20, queries_per_negative=mining.queries_per_negative),
        callbacks=callbacks,
    )
    if ance is not None and reported:
        ance.log = trainer.log
    try:
        trainer.train(resume_from_checkpoint=resume or None)
    finally:
        if ance is not None and close:
            ance.close()
    return Trained(batches, ance, trainer, model)


def first_model(model: Any) -> Any:
    """The model with its weights stirred."""
    import copy

    import torch

    other = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(1)
    for parameter in other.parameters():
        parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator)
    return other


def work(rank: int, job: dict[str, Any], rendezvous: str | None) -> None:
    import torch
    from transformers import TrainerCallback

    processes, kill_at = job.pop("processes", 1), job.pop("kill_at", None)
    if processes > 1:
        os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(processes))
        os.environ.update(MASTER_ADDR="localhost", MASTER_PORT="0", ACCELERATE_USE_CPU="true")
        torch.distributed.init_process_group(
            "gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=processes
        )

    def kill(state: Any, model: Any) -> None:
        if state.global_step + 1 == kill_at:
            os.kill(os.getpid(), signal.SIGKILL)

    for run in job["runs"]:
        output = Path(run.pop("output"))
        done = train(run.pop("model"), output, after=[make_callback(TrainerCallback, on_step_begin=kill)], **run)
        result = {"batches": done.batches, "refreshes": done.ance.refreshes}
        (output / f"process-{rank}.json").write_text(json.dumps(result))
    if processes > 1:
        torch.distributed.barrier()  # neither closes its connections while the other still uses them
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    content = json.loads(Path(sys.argv[1]).read_text())
    if content.get("processes", 1) == 1:
        work(0, content, None)
    else:
        import torch

        meeting = str(Path(sys.argv[1]).with_suffix(".rendezvous"))
        torch.multiprocessing.start_processes(
            work, (content, meeting), nprocs=content["processes"], start_method="fork"
        )
