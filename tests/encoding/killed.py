"""Mines in processes that are killed and gone on with, and once undisturbed: killed.py MODEL FOLDER TIMES.

Prints, as JSON, after how many of the kills there was work half done, and how many texts each of two processes encoded
that began on one folder at the same moment.
"""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import threading
import time
import traceback
from pathlib import Path

import torch
from sentence_transformers import SentenceTransformer
from tqdm import tqdm

from st_clp import Collection, mine_hard_negatives

DOCUMENTS, QUERIES = 2500, 300


def make_collection() -> Collection:
    documents = {f"d{i}": f"the river of {i} and the lake {i * 7 % 13} " * (1 + i % 2) for i in range(DOCUMENTS)}
    queries = {f"q{i}": f"which river is {i}?" for i in range(QUERIES)}
    return Collection.from_dict(documents, queries, {f"q{i}": {f"d{i * 3}": 1} for i in range(QUERIES)})


def mine(model: SentenceTransformer, collection: Collection, folder: Path) -> None:
    mine_hard_negatives(
        model,
        collection,
        relative_margin=0.01,
        sampling_strategy="random",
        dtype="model",
        store_dir=folder / "store",
        output_file=folder / "rows.jsonl",
        show_progress_bar=False,
        verbose=False,
    )


def begin(model: SentenceTransformer, collection: Collection, folder: Path) -> int:
    """Mine in a child process; its id. How many texts it encodes goes to a file."""
    child = os.fork()
    if child == 0:
        # All children share tqdm's own lock: one that is killed with it in hand would stop the others.
        tqdm.set_lock(threading.RLock())
        encoded: list[str] = []
        original = model.preprocess

        def preprocess(texts: list[str], **options: object) -> dict:
            encoded.extend(texts)
            return original(texts, **options)

        model.preprocess = preprocess  # type: ignore[method-assign]
        status = 1
        try:
            mine(model, collection, folder)
            (folder / f"encoded {os.getpid()}").write_text(str(len(encoded)))
            status = 0
        except Exception:
            traceback.print_exc()
        finally:
            sys.stderr.flush()
            os._exit(status)
    return child


def finish(*children: int) -> None:
    for child in children:
        if os.waitpid(child, 0)[1]:
            raise SystemExit("a process that nobody killed ended with an error")


def main() -> None:
    model_path, folder, times = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3])
    torch.set_num_threads(1)
    model, collection = SentenceTransformer(model_path, device="cpu"), make_collection()
    started = time.perf_counter()
    finish(begin(model, collection, folder / "undisturbed"))
    alone = time.perf_counter() - started
    generator = random.Random(0)
    half_done = 0
    for number in range(times):
        path = folder / f"killed {number}"
        child = begin(model, collection, path)
        time.sleep(generator.uniform(0, alone))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        half_done += path.exists() and not (path / "rows.jsonl").exists()
        finish(begin(model, collection, path))
    finish(*[begin(model, collection, folder / "together") for _ in range(2)])
    encoded = sorted(int(file.read_text()) for file in (folder / "together").glob("encoded *"))
    print(json.dumps({"half_done": half_done, "encoded_together": encoded, "alone": alone}))


if __name__ == "__main__":
    main()
