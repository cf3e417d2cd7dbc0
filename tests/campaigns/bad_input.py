"""Gives the commands bad input of many kinds: does each end with a message that helps, and leave nothing behind?

Each case runs in a process of its own. It must end with its exit status (1 for an error, 0 where the input is odd but
good), print its message and no traceback, in time, and leave no unfinished file and, where it was refused, no output
folder.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import bad_collections
import bad_endpoints
import bad_folders
import bad_settings
from cases import Case, Materials, Place
from comparing import leftovers
from endpoint import Endpoint
from processes import KEY, command, run_forked
from tqdm import tqdm

CASES: list[Case] = [*bad_collections.CASES, *bad_settings.CASES, *bad_folders.CASES, *bad_endpoints.CASES]
LONGEST = 30.0  # seconds: whatever takes longer hangs
NEVER = ("Traceback (most recent call last)", KEY)


def try_case(case: Case, folder: Path, materials: Materials) -> dict[str, Any]:
    """How a case ended: its faults and what it has left, both empty if all is well."""
    place = Place(folder / "case", materials)
    place.folder.mkdir(parents=True)
    work = case.build(place)
    ending = run_forked(
        work if callable(work) else command(work),
        folder / "log",
        longest=LONGEST,
        environment=case.environment,
        encoding=case.encoding,
        setup=case.setup,
    )
    said = " ".join(re.sub("[│╭╮╰╯─]", " ", ending.output).split())
    faults = []
    if ending.hung:
        faults.append("hangs")
    elif ending.code != case.code:
        faults.append(f"ends with {ending.code}, not {case.code}")
    if not re.search(case.message, said, re.DOTALL):
        faults.append(f"does not say {case.message!r}")
    faults += [f"says {text!r}" for text in (*NEVER, *case.never) if text in said]
    left = leftovers(place.folder)
    if case.code and not case.leaves and place.out.exists():
        left.append("out")
    return {"case": case.name, "faults": faults, "left": left, "said": said[-800:]}


def run_bad_input(folder: Path, cases: Sequence[Case] = CASES, *, say: bool = False) -> dict[str, Any]:
    """Try cases; counts, and what was found.

    Args:
        folder: Where to work.
        cases: Which.
        say: Show what every case prints.
    """
    found = []
    with Endpoint(answers=bad_endpoints.ANSWERS) as endpoint:
        materials = Materials(folder / "materials", endpoint)
        for number, case in enumerate(tqdm(cases, desc="Bad input", unit=" kinds", mininterval=1)):
            result = try_case(case, folder / str(number), materials)
            if result["faults"] or result["left"]:
                found.append(result)
            if say:
                tqdm.write(f"{case.name}: {result['said']}")
    return {
        "kinds of bad input": len(cases),
        "unclear messages": sum(bool(result["faults"]) for result in found),
        "leftovers": sum(bool(result["left"]) for result in found),
        "found": found,
    }
