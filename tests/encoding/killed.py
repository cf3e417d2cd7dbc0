"""Builds a store again and again in processes that are killed, and once undisturbed: killed.py MODEL FOLDER TIMES."""

from __future__ import annotations

import os
import random
import signal
import sys
import time
from pathlib import Path

import torch
from sentence_transformers import SentenceTransformer

from st_clp import Collection
from st_clp.encoding import EmbeddingStore

DOCUMENTS = 4000


def build(model_path: str, path: Path) -> None:
    documents = {f"d{i}": f"the river of {i} and the lake {i * 7 % 13} " * (1 + i % 9) for i in range(DOCUMENTS)}
    collection = Collection.from_dict(documents, {"q": "which river"}, {"q": {"d0": 1}})
    model = SentenceTransformer(model_path, device="cpu")
    EmbeddingStore.build(model, collection, path, show_progress_bar=False)


def in_a_process(model_path: str, path: Path, killed_after: float | None) -> float:
    """Build in a child process; kill it after so many seconds. Returns how long it lived."""
    started = time.perf_counter()
    child = os.fork()
    if child == 0:
        build(model_path, path)
        os._exit(0)
    if killed_after is not None:
        time.sleep(killed_after)
        os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    if killed_after is None and status:
        raise SystemExit(f"the build ended with {status}")
    return time.perf_counter() - started


def main() -> None:
    model_path, folder, times = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3])
    torch.set_num_threads(1)
    alone = in_a_process(model_path, folder / "undisturbed", None)
    generator = random.Random(0)
    unfinished = 0
    for number in range(times):
        path = folder / f"killed {number % 4}"
        in_a_process(model_path, path, generator.uniform(0, alone))
        unfinished += path.with_name(path.name + ".partial").exists()
    for number in range(min(times, 4)):
        in_a_process(model_path, folder / f"killed {number}", None)
    print(unfinished)


if __name__ == "__main__":
    main()
