"""Run as a script by test_processes.py: the losses in two gloo processes, half the batch in each.

``two_processes.py CASES OUT`` reads what to compute from a torch file and writes loss and gradients of each case.
"""

from __future__ import annotations

import os
import sys
import tempfile
from typing import Any

import torch
import torch.distributed as dist
from sentence_transformers import SentenceTransformer
from torch.nn.parallel import DistributedDataParallel

import st_clp.losses

PROCESSES = 2


def compute(job: dict[str, Any], case: dict[str, Any], rank: int) -> dict[str, Any]:
    model = SentenceTransformer(job["model"], device="cpu").double().train()
    model[0].auto_model.pooler = None  # DDP waits for parameters that nothing uses
    if case.get("guided"):
        case["settings"]["guide"] = SentenceTransformer(job["guide"], device="cpu").double()
    loss = getattr(st_clp.losses, case["loss"])(model, gather_across_devices=True, **case["settings"])
    # As sentence-transformers' training arguments set it: a loss runs several forward passes before one backward pass.
    loss.model = DistributedDataParallel(model, broadcast_buffers=False)
    columns, labels = job["columns"][: case["columns"]], case["labels"]
    size = len(columns[0]) // PROCESSES
    mine = slice(rank * size, (rank + 1) * size)
    features = [model.preprocess(column[mine]) for column in columns]
    value = loss(features, None if labels is None else labels[mine])
    value.backward()
    mean = value.detach().clone()
    dist.all_reduce(mean)
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return {"loss": mean / PROCESSES, "gradients": gradients}


def work(rank: int, rendezvous: str, cases: str, out: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=PROCESSES)
    job = torch.load(cases, weights_only=True)
    results = [compute(job, case, rank) for case in job["cases"]]
    if rank == 0:
        torch.save(results, out)
    dist.barrier()  # neither closes its connections while the other still uses them
    dist.destroy_process_group()


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        arguments = os.path.join(folder, "rendezvous"), *sys.argv[1:3]
        torch.multiprocessing.start_processes(work, arguments, nprocs=PROCESSES, start_method="fork")
