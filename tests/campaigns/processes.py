"""Runs a command of st-clp in a child process, which may be killed in the middle of it.

Importing everything takes about ten seconds, so the campaigns fork from a process that has imported it; a child then
calls ``st_clp.cli.main``, as the console script does.
"""

from __future__ import annotations

import contextlib
import io
import logging
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

KEY = "sk-a-key-of-the-campaigns-0123456789"
ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "TRANSFORMERS_OFFLINE": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "OMP_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
    "NO_COLOR": "1",
    "TERM": "dumb",
    "COLUMNS": "200",
    "OPENAI_API_KEY": KEY,
}


def prepare() -> None:
    """Import what the commands need, so that a forked child has it. To be called before anything is forked."""
    os.environ.update(ENVIRONMENT)
    import torch

    torch.set_num_threads(1)  # a pool of threads does not survive a fork
    import datasets
    import faiss
    import openai  # noqa: F401
    import scipy.stats  # noqa: F401
    import sentence_transformers  # noqa: F401

    import evaluators.comparison  # noqa: F401
    import st_clp.cli
    import st_clp.run.searching
    import st_clp.run.stages  # noqa: F401

    faiss.omp_set_num_threads(1)
    datasets.disable_progress_bars()


@dataclass(frozen=True)
class Ending:
    """How a child ended.

    Attributes:
        code: Its exit status; minus the signal's number where a signal ended it.
        output: What it printed, on either stream.
        seconds: How long it ran.
        hung: Whether it was ended because it ran too long.
    """

    code: int
    output: str
    seconds: float
    hung: bool

    @property
    def killed(self) -> bool:
        """Whether SIGKILL ended it, as was intended."""
        return self.code == -signal.SIGKILL and not self.hung


def command(argv: Sequence[str]) -> Callable[[], None]:
    """``st-clp`` with these arguments, as its entry point runs it."""

    def work() -> None:
        from st_clp import cli

        sys.argv = ["st-clp", *argv]
        cli.main()

    return work


def run_forked(
    work: Callable[[], Any],
    log: Path,
    *,
    kill_after: float | None = None,
    longest: float = 300.0,
    environment: Mapping[str, str] | None = None,
    encoding: str = "utf-8",
    setup: Callable[[], Any] | None = None,
) -> Ending:
    """Run something in a forked child, which leads a process group of its own.

    Args:
        work: What to run; the child's exit status is that of ``SystemExit``, 1 after another exception.
        log: The file for its output; what it holds is replaced.
        kill_after: Kill the group after so many seconds; None lets it come to its end.
        longest: Seconds that it may take otherwise.
        environment: Variables to set; those set to "" are removed.
        encoding: Of its output.
        setup: Called in the child before the work, to set limits or another user.
    """
    log.unlink(missing_ok=True)
    sys.stdout.flush()
    sys.stderr.flush()
    pid = os.fork()
    if not pid:
        _be_the_child(work, log, environment or {}, encoding, setup)
    with contextlib.suppress(PermissionError, ProcessLookupError):
        os.setpgid(pid, pid)  # here too, so that it leads its group before it is killed
    started = time.monotonic()
    until = started + (longest if kill_after is None else kill_after)
    ended, status = os.waitpid(pid, os.WNOHANG)
    while not ended and time.monotonic() < until:
        time.sleep(0.004)
        ended, status = os.waitpid(pid, os.WNOHANG)
    with contextlib.suppress(PermissionError, ProcessLookupError):
        os.killpg(pid, signal.SIGKILL)  # it, or what it has left running
    if not ended:
        _, status = os.waitpid(pid, 0)
    output = log.read_text(encoding="utf-8", errors="replace") if log.exists() else ""
    hung = not ended and kill_after is None
    return Ending(os.waitstatus_to_exitcode(status), output, time.monotonic() - started, hung)


def _be_the_child(
    work: Callable[[], Any],
    log: Path,
    environment: Mapping[str, str],
    encoding: str,
    setup: Callable[[], Any] | None,
) -> None:
    code = 1
    try:
        os.setpgid(0, 0)
        _redirect(log, encoding)
        os.environ.update(environment)
        for name in (name for name, value in environment.items() if not value):
            del os.environ[name]
        # The lock that tqdm has is shared by all children: one that is killed with it in hand would stop the others.
        tqdm.set_lock(threading.RLock())
        if setup is not None:
            setup()
        work()
        code = 0
    except SystemExit as ended:
        code = ended.code if isinstance(ended.code, int) else int(ended.code is not None)
        if isinstance(ended.code, str):
            print(ended.code, file=sys.stderr)
    except BaseException:
        traceback.print_exc()
    finally:
        with contextlib.suppress(BaseException):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code)


def _redirect(log: Path, encoding: str) -> None:
    """Standard streams as an interpreter makes them that has just started."""
    target = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
    for descriptor, source in ((0, os.open(os.devnull, os.O_RDONLY)), (1, target), (2, target)):
        os.dup2(source, descriptor)
    sys.stdin = io.TextIOWrapper(open(0, "rb", closefd=False), encoding="utf-8", errors="surrogateescape")  # noqa: SIM115
    sys.stdout = io.TextIOWrapper(open(1, "wb", closefd=False), encoding=encoding)  # noqa: SIM115
    error = open(2, "wb", closefd=False)  # noqa: SIM115
    sys.stderr = io.TextIOWrapper(error, encoding=encoding, errors="backslashreplace")
    for handler in logging.root.handlers[:]:
        logging.root.removeHandler(handler)


class FileOperations:
    """Counts what this process does to the files in a folder: opening to write, renaming, removing, making folders.

    Args:
        folder: Where operations count.
        die_before: The number of the operation, from 1, that the process shall not live to see; None lets it live.
    """

    EVENTS = frozenset(("os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.truncate", "os.link", "os.symlink"))

    def __init__(self, folder: Path, *, die_before: int | None = None) -> None:
        self._folder = str(folder)
        self._die_before = die_before
        self.number = 0

    def watch(self) -> FileOperations:
        """Begin. It cannot be ended: it is for a child."""
        sys.addaudithook(self._heed)
        return self

    def _heed(self, event: str, arguments: tuple[Any, ...]) -> None:
        if event == "open":
            if not isinstance(arguments[2], int) or not arguments[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
                return
        elif event not in self.EVENTS:
            return
        path = arguments[0]
        # A path within a folder that is open is how trees are removed.
        in_open_folder = event in ("os.remove", "os.rmdir") and arguments[1] >= 0
        if isinstance(path, (str, bytes, os.PathLike)) and (
            in_open_folder or os.fsdecode(path).startswith(self._folder)
        ):
            self.number += 1
            if self.number == self._die_before:
                os.killpg(os.getpgrp(), signal.SIGKILL)
