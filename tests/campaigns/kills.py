"""Kills mining, evaluation, query generation and training at random moments, and goes on: does anything get lost?

Each trial gives a command, kills its process group with SIGKILL, gives the command again (``run``: with ``--resume``)
and kills it again, several times, and in the end lets it finish. Half of the kills come at moments that are spread over
the time that the command takes undisturbed; the others come right before a file operation (a write that begins, a
rename, a removal) that is drawn from all those which the undisturbed command makes. In the end the output folder must
hold what the undisturbed command's holds, byte for byte (JSON without its times; stores of queries by their contents),
no file beside; every go must have ended well or by the kill; and no query may have been paid for twice that was not in
flight when a process was killed.
"""

from __future__ import annotations

import multiprocessing
import random
import re
import shutil
import sys
from collections import Counter
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any

from comparing import differences, leftovers
from endpoint import Endpoint
from materials import larger_collection, small_collection, tiny_model
from processes import Ending, FileOperations, command, run_forked

MOST_KILLS = 10  # before a trial is let finish
REQUESTS_AT_A_TIME = 4  # what a kill may make to be asked for once more
FAULTS = ("differences", "leftovers", "refusals", "queries paid twice")


SHARES = {
    "mine": 1.0,
    "mine with queries by an endpoint": 1.0,
    "evaluate": 1.0,
    "generate queries": 1.0,
    "run with refreshing": 2.0,
    "run on two collections with queries by an endpoint": 1.5,
}
"""The scenarios, and how many of all kills each gets, relative to the others."""


def arguments(scenario: str, materials: Path, output: Path, url: str) -> list[str]:
    """What is given to ``st-clp``: always a tiny model and small collections.

    Args:
        scenario: One of ``SHARES``.
        materials: A folder with the model and the collections.
        output: Where the command shall write.
        url: Of the endpoint that writes queries.
    """
    model, small, large = (str(materials / name) for name in ("tiny/model", "small", "large"))
    written = ["--output", str(output)]
    asked = ["--query-base-url", url, "--query-concurrency", str(REQUESTS_AT_A_TIME)]
    sources = ["--negative-queries", "judgments,openai:tiny", "--no-prefer-known-queries"]
    mined = ["--num-negatives", "2", "--range-max", "20", "--sampling-strategy", "random", "--encode-dtype", "model"]
    trained = ["--batch-size", "16", "--learning-rate", "3e-3", "--scale", "20", "--no-bf16"]
    run = ["run", "--model", model, "--collection", small, *written, *mined, *trained]
    return {
        "mine": ["mine", "--model", model, "--collection", large, *written, *mined],
        "mine with queries by an endpoint": [
            *("mine", "--model", model, "--collection", small, *written, *mined, *sources, *asked),
        ],
        "evaluate": ["evaluate", model, "--collection", large, "--collection", small, *written],
        "generate queries": [
            *("queries", "--collection", small, "--negative-queries", "openai:tiny", *asked),
            *("--query-store", str(output / "queries.sqlite")),
        ],
        "run with refreshing": [*run, "--epochs", "2", "--refresh-every", "5", "--experts", "2"],
        "run on two collections with queries by an endpoint": [
            *(*run, "--epochs", "1", "--collection", str(materials / "other"), *sources, *asked),
            *("--mini-batch-size", "8"),
        ],
    }[scenario]


class Trials:
    """One scenario's trials, one after the other.

    Args:
        scenario: One of ``SHARES``.
        folder: For the materials and outputs.
        endpoint: What writes queries.
    """

    def __init__(self, scenario: str, folder: Path, endpoint: Endpoint) -> None:
        self.scenario, self.folder, self.endpoint = scenario, folder, endpoint
        # Every trial has the same output folder, and so has the undisturbed command: paths are in files.
        self.output = folder / "work" / "output"
        tiny_model(folder / "materials" / "tiny", dropout=0.1)
        small_collection(folder / "materials" / "small")
        small_collection(folder / "materials" / "other", seed=1)
        larger_collection(folder / "materials" / "large")
        self._clear()
        tally = folder / "tally"
        ending = self._go(tally=tally)
        if ending.code:
            raise RuntimeError(f"{scenario}: undisturbed, it ends with {ending.code}:\n{ending.output}")
        self.reference = self.output.rename(folder / "reference")
        self.seconds, self.operations, self.needed = ending.seconds, int(tally.read_text()), endpoint.requests

    def kill(self, generator: random.Random, most_kills: int) -> dict[str, Any]:
        """Kill and go on until it is done: what was found.

        Args:
            generator: Draws moments, operations, and how often to kill.
            most_kills: No more than this.
        """
        self._clear()
        found: dict[str, Any] = {"kills": Counter(), **{name: [] for name in FAULTS}}
        before = self.endpoint.requests
        limit = generator.randint(-(-most_kills // 2), most_kills)
        resume = False
        while True:
            kind, ending = "", None
            if found["kills"].total() == limit:
                ending = self._go(resume=resume)
            elif generator.random() < 0.5:
                kind = "before a file operation"
                ending = self._go(resume=resume, die_before=generator.randint(1, self.operations))
            else:
                kind = "at a moment"
                ending = self._go(resume=resume, kill_after=generator.uniform(0, self.seconds))
            if not ending.killed:
                break
            found["kills"][kind] += 1
            resume = True
        if ending.code:
            found["refusals"].append(f"status {ending.code}: {ending.output[-1500:]}")
            return found
        found["differences"] = differences(self.output, self.reference)
        found["leftovers"] = leftovers(self.output, self.reference)
        beyond = self.endpoint.requests - before - self.needed
        in_flight = REQUESTS_AT_A_TIME * found["kills"].total()
        if beyond > in_flight:
            found["queries paid twice"].append(f"{beyond} requests beyond the needed, {in_flight} in flight at kills")
        return found

    def _go(
        self,
        *,
        resume: bool = False,
        kill_after: float | None = None,
        die_before: int | None = None,
        tally: Path | None = None,
    ) -> Ending:
        argv = arguments(self.scenario, self.folder / "materials", self.output, self.endpoint.url)
        if resume and argv[0] == "run":
            argv.append("--resume")

        def work() -> None:
            operations = FileOperations(self.output, die_before=die_before).watch()
            try:
                command(argv)()
            finally:
                if tally is not None:
                    tally.write_text(str(operations.number))

        return run_forked(work, self.folder / "log", kill_after=kill_after)

    def _clear(self) -> None:
        shutil.rmtree(self.output.parent, ignore_errors=True)
        self.output.parent.mkdir(parents=True)


def _try_scenario(scenario: str, folder: Path, kills: int, seed: int) -> dict[str, Any]:
    """Trials until the scenario was killed so often: counts, and the faults with their trials' numbers."""
    folder.mkdir(parents=True)
    total: dict[str, Any] = {"trials": 0, "kills": Counter(), **dict.fromkeys(FAULTS, 0), "found": []}
    with Endpoint(latency=0.02) as endpoint:
        trials = Trials(scenario, folder, endpoint)
        while total["kills"].total() < kills:
            generator = random.Random(f"{seed} {scenario} {total['trials']}")
            found = trials.kill(generator, min(MOST_KILLS, kills - total["kills"].total()))
            total["kills"].update(found["kills"])
            for fault in FAULTS:
                total[fault] += len(found[fault])
                total["found"] += [f"{scenario}, trial {total['trials']}: {fault}: {what}" for what in found[fault]]
            total["trials"] += 1
            print(f"{scenario}: {total['kills'].total()} of {kills} kills", file=sys.stderr)
            if total["trials"] > 20 + 20 * kills:
                raise RuntimeError(f"{scenario} always ends before it is killed")
    return {**total, "seconds": round(trials.seconds, 1), "file operations": trials.operations}


def run_kills(folder: Path, *, kills: int, seed: int = 0, jobs: int = 2, only: str = "") -> dict[str, Any]:
    """Try all scenarios, several at a time; counts over all of them, by scenario, and what was found.

    Args:
        folder: Where to work.
        kills: How many processes to kill, at least.
        seed: Of moments and operations.
        jobs: Scenarios at a time.
        only: A regular expression that the names of the scenarios must match.
    """
    shares = {scenario: share for scenario, share in SHARES.items() if re.search(only, scenario)}
    by_scenario = {}
    with ProcessPoolExecutor(jobs, multiprocessing.get_context("fork")) as pool:
        futures = {
            pool.submit(
                _try_scenario,
                scenario,
                folder / scenario.replace(" ", "-"),
                -(-int(kills * share * 1000) // int(1000 * sum(shares.values()))),
                seed,
            ): scenario
            for scenario, share in sorted(shares.items(), key=lambda item: -item[1])  # the longest first
        }
        for future in as_completed(futures):
            by_scenario[futures[future]] = future.result()
    kinds: Counter[str] = sum((result["kills"] for result in by_scenario.values()), Counter())
    return {
        "kills": kinds.total(),
        **{fault: sum(result[fault] for result in by_scenario.values()) for fault in FAULTS},
        "kills by kind": dict(kinds),
        "found": [what for result in by_scenario.values() for what in result.pop("found")],
        "by scenario": by_scenario,
    }
