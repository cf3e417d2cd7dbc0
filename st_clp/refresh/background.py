"""The training's end of the process that mines beside it."""

from __future__ import annotations

import contextlib
import json
import os
import pickle
import struct
import subprocess
import sys
import weakref
from pathlib import Path

from st_clp.refresh.generation import is_whole
from st_clp.refresh.worker import Job

_START = "from st_clp.refresh.worker import main; main()"
_TAIL = 2000  # characters of its log that a failure quotes


class BackgroundMiner:
    """Mines snapshots in a process of its own, one at a time.

    The process starts anew if it ended. It runs no code of the script that trains.

    Args:
        job: What stays the same over the refreshes.
        log: File for what the process prints.

    Raises:
        TypeError: The model, a collection or an option cannot be sent to another process.
    """

    def __init__(self, job: Job, log: Path) -> None:
        try:
            self._content = pickle.dumps(job)
        except Exception as error:  # pickle raises whatever the object's own methods raise
            raise TypeError(
                f"this model or collection cannot be sent to another process, which asynchronous refreshes need: "
                f"{error}. Refresh synchronously (asynchronous=False)"
            ) from error
        self._threads = job.threads
        self._log = log
        self._process: subprocess.Popen[bytes] | None = None
        self._folder: Path | None = None

    def start(self) -> None:
        """Start the process if there is none, so that it has read its libraries when it is wanted."""
        if self._process is not None and self._process.poll() is None:
            return
        self._log.parent.mkdir(parents=True, exist_ok=True)
        threads = str(self._threads)
        environment = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join(path for path in sys.path if path),
            "OMP_NUM_THREADS": threads,
            "MKL_NUM_THREADS": threads,
            "TOKENIZERS_PARALLELISM": "false" if self._threads == 1 else "true",
        }
        # In a process group that torchrun made, the child must not take itself for one of its processes.
        for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
            environment.pop(name, None)
        with open(self._log, "ab") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-c", _START], stdin=subprocess.PIPE, stdout=log, stderr=log, env=environment
            )
        weakref.finalize(self, _end, self._process)
        self._send(struct.pack("!Q", len(self._content)) + self._content)

    def mine(self, snapshot: Path, *, previous: Path, folder: Path) -> None:
        """Begin to mine a snapshot.

        Args:
            snapshot: The trained weights.
            previous: The generation in use.
            folder: Where to write the generation.
        """
        self.start()
        self._folder = folder
        command = {"snapshot": str(snapshot), "previous": str(previous), "folder": str(folder)}
        self._send(json.dumps(command).encode() + b"\n")

    def ready(self) -> bool:
        """Whether the generation is there.

        Raises:
            RuntimeError: The process ended without it; the message says how, with the end of its log.
        """
        process, folder = self._process, self._folder
        if process is None or folder is None:
            raise RuntimeError("nothing is being mined")
        status = process.poll()  # before looking: what it wrote last is then seen
        if is_whole(folder):
            return True
        if status is not None:
            raise RuntimeError(f"the mining process {_ending(status)}; the end of {self._log}:\n{self._last_words()}")
        return False

    def stop(self) -> None:
        """End the process."""
        if self._process is not None:
            _end(self._process)

    @property
    def pid(self) -> int | None:
        """The process's id; None where none was started."""
        return self._process.pid if self._process is not None else None

    def _send(self, content: bytes) -> None:
        stream = self._process.stdin if self._process is not None else None
        # A process that has ended already is found by ready().
        with contextlib.suppress(BrokenPipeError):
            if stream is not None:
                stream.write(content)
                stream.flush()

    def _last_words(self) -> str:
        try:
            return self._log.read_text(encoding="utf-8", errors="replace")[-_TAIL:].strip()
        except OSError as error:
            return f"(cannot be read: {error})"


def _ending(status: int) -> str:
    return f"was killed by signal {-status}" if status < 0 else f"ended with status {status}"


def _end(process: subprocess.Popen[bytes]) -> None:
    if process.poll() is None:
        process.kill()
        process.wait()
    if process.stdin is not None:
        with contextlib.suppress(OSError):
            process.stdin.close()
