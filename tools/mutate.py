"""Change one line of the core at a time and see whether that folder's tests notice: ``make mutate``.

    python tools/mutate.py                      # all of tools/mutations.txt
    python tools/mutate.py --only losses --only 12 --jobs 2

Each change is made in a copy of the tree, never in the tree itself. What the tests need is imported once, and each
change is tried in a child of that process, which imports the changed copy. The tests run until the first failure, which
is named; one that takes too long counts as noticed, and is marked. Where a change survives, the status is 1.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import shutil
import signal
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
COPIED = ("st_clp", "evaluators", "tests", "benchmarks", "setup.cfg", "pyproject.toml", "README.md", "constraints.txt")
TESTS = {"st_clp/losses": "tests/losses", "st_clp/moe": "tests/moe", "st_clp/mining": "tests/mining",
         "evaluators": "tests/evaluators", "st_clp/queries/own_text": "tests/queries/test_own_text.py",
         "st_clp/run/splits": "tests/test_settings.py",
         "st_clp/run": "tests/integration/test_sentence_queries.py"}  # fmt: skip
# They start processes and take longest; what is left after the others is tried with them too.
SLOW = ("test_processes.py", "test_refresh_beside.py", "test_page_in_browser.py", "test_specialization.py")


@dataclass(frozen=True)
class Mutation:
    """A line and what takes its place.

    Attributes:
        number: Its place in the list, from 1.
        file: Where the line is, from the root.
        old, new: The line and its replacement, without indentation.
    """

    number: int
    file: str
    old: str
    new: str

    @property
    def tests(self) -> str:
        """The folder of the tests that should notice."""
        return next(tests for part, tests in TESTS.items() if self.file.startswith(part))

    def apply(self, root: Path) -> None:
        """Change the file below ``root``.

        Raises:
            SystemExit: The line is not there exactly once: the list is out of date.
        """
        path = root / self.file
        lines = path.read_text(encoding="utf-8").split("\n")
        found = [number for number, line in enumerate(lines) if line.strip() == self.old]
        if len(found) != 1:
            raise SystemExit(
                f"mutation {self.number}: {self.file} has the line {len(found)} times, not once: {self.old}"
            )
        line = lines[found[0]]
        lines[found[0]] = line[: len(line) - len(line.lstrip())] + self.new
        path.write_text("\n".join(lines), encoding="utf-8")


def read_mutations(path: Path) -> list[Mutation]:
    """Read a list: a line with the file, one with the old text and one with the new, and an empty line between."""
    found = []
    for block in path.read_text(encoding="utf-8").split("\n\n"):
        lines = [line for line in block.strip().split("\n") if line and not line.startswith("#")]
        if lines:
            file, old, new = lines
            found.append(Mutation(len(found) + 1, file, old.removeprefix("- ").strip(), new.removeprefix("+ ").strip()))
    return found


def copy_tree(target: Path) -> None:
    """Copy what the tests need to ``target``."""
    for name in COPIED:
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, target / name, ignore=shutil.ignore_patterns("__pycache__", ".*"))
        elif source.exists():
            shutil.copy(source, target / name)


def run_tests(copy: Path, arguments: list[str]) -> int:
    """Run pytest in the copy, in this process, which must be a child of its own; pytest's status."""
    os.chdir(copy)
    sys.path.insert(0, str(copy))
    os.environ["PYTHONPATH"] = str(copy)  # for the processes that tests start
    log = os.open(str(copy / "log.txt"), os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    import pytest

    return int(pytest.main(["-x", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", *arguments]))


def in_child(copy: Path, arguments: list[str], seconds: float) -> str:
    """``"noticed"``, ``"survived"``, ``"timeout"`` or ``"broken"`` of the tests with these arguments."""
    child = os.fork()
    if child == 0:
        os.setsid()
        status = 70
        with contextlib.suppress(BaseException):
            status = run_tests(copy, arguments)
        os._exit(status)
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return {0: "survived", 1: "noticed", 2: "noticed"}.get(os.waitstatus_to_exitcode(status), "broken")
        time.sleep(0.2)
    os.killpg(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return "timeout"


def try_mutation(mutation: Mutation, seconds: float) -> str:
    """What the tests say of one change, and the first that fails."""
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder)
        copy_tree(copy)
        mutation.apply(copy)
        slow = [f"{mutation.tests}/{name}" for name in SLOW if (copy / mutation.tests / name).exists()]
        verdict = in_child(copy, [mutation.tests, *(f"--ignore={path}" for path in slow)], seconds)
        if verdict == "survived" and slow:
            verdict = in_child(copy, slow, seconds)
        log = (copy / "log.txt").read_text(encoding="utf-8", errors="replace")
        if verdict == "broken":
            print(log[-2000:])
        failed = [line.split(" ")[1] for line in log.splitlines() if line.startswith(("FAILED ", "ERROR "))]
        return " ".join([verdict, *failed[:1]])


def import_once() -> None:
    """Import what takes long, so that each child has it already. Nothing of ours: that is what changes."""
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    import datasets
    import faiss
    import hypothesis
    import pytrec_eval
    import sentence_transformers
    import torch
    import transformers

    _ = (datasets, faiss, hypothesis, pytrec_eval, sentence_transformers, transformers)
    torch.set_num_threads(1)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--list", type=Path, default=ROOT / "tools" / "mutations.txt", help="the changes")
    parser.add_argument("--only", action="append", default=[], help="a number, or a part of a file's name")
    parser.add_argument("--jobs", type=int, default=1, help="changes that are tried at a time")
    parser.add_argument("--seconds", type=float, default=600, help="what the tests of one may take")
    arguments = parser.parse_args()
    chosen = [
        mutation
        for mutation in read_mutations(arguments.list)
        if not arguments.only or any(o == str(mutation.number) or o in mutation.file for o in arguments.only)
    ]
    for mutation in chosen:  # before the first hour is spent
        with tempfile.TemporaryDirectory() as folder:
            (Path(folder) / mutation.file).parent.mkdir(parents=True)
            shutil.copy(ROOT / mutation.file, Path(folder) / mutation.file)
            mutation.apply(Path(folder))
    import_once()
    verdicts = run_all(chosen, arguments.jobs, arguments.seconds)
    unnoticed = [mutation for mutation in chosen if verdicts[mutation.number] in ("survived", "broken")]
    print(f"{len(chosen) - len(unnoticed)} of {len(chosen)} changes were noticed")
    return 1 if unnoticed else 0


def run_all(mutations: list[Mutation], jobs: int, seconds: float) -> dict[int, str]:
    """Try the changes, some at a time, each in a child of its own; number to verdict."""
    verdicts: dict[int, str] = {}
    running: dict[int, tuple[Mutation, int]] = {}
    waiting = list(mutations)
    while waiting or running:
        while waiting and len(running) < jobs:
            mutation = waiting.pop(0)
            ours, theirs = os.pipe()
            child = os.fork()
            if child == 0:
                os.write(theirs, try_mutation(mutation, seconds).encode())
                os._exit(0)
            os.close(theirs)
            running[child] = (mutation, ours)
        child, _ = os.wait()
        mutation, ours = running.pop(child)
        verdict, _, test = (os.read(ours, 500).decode() or "broken").partition(" ")
        os.close(ours)
        verdicts[mutation.number] = verdict
        print(f"{mutation.number:>3} {verdict:<9} {mutation.file}: {mutation.new}  {test}".rstrip(), flush=True)
    return verdicts


if __name__ == "__main__":
    sys.exit(main())
