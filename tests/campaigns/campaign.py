"""Kills the commands at random moments, and gives them bad input.

    python tests/campaigns/campaign.py --summary campaign.json

``kills.py`` and ``bad_input.py`` say what is looked for.
"""

from __future__ import annotations

import argparse
import json
import platform
import re
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import processes
from bad_input import CASES, run_bad_input
from kills import FAULTS, run_kills

VERSIONS = ("sentence-transformers", "transformers", "torch")


def main(argv: list[str] | None = None) -> int:
    """The command line; 1 where anything was found."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=200, help="how many processes to kill, at least [200]")
    parser.add_argument("--seed", type=int, default=0, help="of the moments of the kills [0]")
    parser.add_argument("--jobs", type=int, default=2, help="commands to kill at a time [2]")
    parser.add_argument("--no-bad-input", action="store_true", help="kill alone")
    parser.add_argument("--only", default="", help="a regular expression that the names must match [all]")
    parser.add_argument("--say", action="store_true", help="show what is said to each kind of bad input")
    parser.add_argument("--folder", type=Path, help="where to work; kept [a temporary folder]")
    parser.add_argument("--summary", type=Path, help="the JSON file to write")
    options = parser.parse_args(argv)
    started = time.monotonic()
    processes.prepare()
    found: dict[str, Any] = {
        "versions": {"python": platform.python_version(), **{name: version(name) for name in VERSIONS}},
    }
    with tempfile.TemporaryDirectory(prefix="st-clp-campaign-") as temporary:
        Path(temporary).chmod(0o755)  # some cases are another user's
        folder = (options.folder or Path(temporary)).resolve()
        if not options.no_bad_input:
            cases = [case for case in CASES if re.search(options.only, case.name)]
            found["bad input"] = run_bad_input(folder / "bad-input", cases, say=options.say)
        if options.kills:
            found["kills"] = run_kills(
                folder / "kills", kills=options.kills, seed=options.seed, jobs=options.jobs, only=options.only
            )
    found["seconds"] = round(time.monotonic() - started)
    if options.summary:
        options.summary.write_text(json.dumps(found, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    print(json.dumps(found, indent=1, ensure_ascii=False))
    print(summary_line(found))
    return int(any(part.get("found") for part in found.values() if isinstance(part, dict)))


def summary_line(found: dict[str, Any]) -> str:
    """The counts, on a line."""
    kills, bad = found.get("kills", {}), found.get("bad input", {})
    counts = {name: kills[name] for name in ("kills", *FAULTS) if kills}
    counts |= {f"{name} (bad input)" if name == "leftovers" else name: n for name, n in bad.items() if name != "found"}
    return ", ".join(f"{name}: {count}" for name, count in counts.items())


if __name__ == "__main__":
    sys.exit(main())
