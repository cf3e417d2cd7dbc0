"""The background mining process. It reads its tasks from standard input, and ends when that is closed.

So it never outlives the training, however that ends; and if it ends by itself, its refresh has failed. It imports its
libraries only after it listens, because the training process waits until the whole model is handed over.
"""

from __future__ import annotations

import json
import os
import pickle
import struct
import sys
import threading
from dataclasses import dataclass
from pathlib import Path
from queue import Queue
from typing import Any

NICENESS = 10  # it takes the processor's time that training leaves


@dataclass
class Job:
    """What stays the same over the refreshes.

    Attributes:
        model: The model without weights.
        frozen: The file with the weights that do not train.
        collections: Collection name to collection.
        options: What to mine.
        mining: Further arguments of ``mine``.
        device: What to mine on.
        threads: How many threads to use on a processor.
        stores: Folder for the embeddings.
    """

    model: Any
    frozen: Path
    collections: dict[str, Any]
    options: Any
    mining: dict[str, Any]
    device: str
    threads: int
    stores: Path


def main() -> None:
    """Read a job, then mine each snapshot named by a line of JSON."""
    stream = sys.stdin.buffer
    # Read at once, unpickle later: the training waits for the first and not for the second.
    (length,) = struct.unpack("!Q", stream.read(8))
    content = stream.read(length)
    commands: Queue[bytes] = Queue()

    def listen() -> None:
        for line in iter(stream.readline, b""):
            commands.put(line)
        os._exit(0)  # the training process has ended

    threading.Thread(target=listen, daemon=True).start()
    if hasattr(os, "nice"):
        os.nice(NICENESS)
    import torch

    # The pipe is the training process's own: no one else can write to it.
    job: Job = pickle.loads(content)
    torch.set_num_threads(job.threads)
    while True:
        _mine(job, {name: Path(path) for name, path in json.loads(commands.get()).items()})


def _mine(job: Job, command: dict[str, Path]) -> None:
    from st_clp.refresh.generations import mine_generation
    from st_clp.refresh.snapshot import fill

    fill(job.model, job.frozen, command["snapshot"])
    mine_generation(
        job.model.to(job.device),
        job.collections,
        job.options,
        job.mining,
        previous=command["previous"],
        folder=command["folder"],
        stores=job.stores,
    )
