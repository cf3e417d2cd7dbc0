"""A few kills and a few kinds of bad input: do the campaigns run?"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

CAMPAIGN = Path(__file__).with_name("campaign.py")


def test_a_small_campaign_finds_nothing(tmp_path: Path) -> None:
    summary = tmp_path / "campaign.json"
    only = "^(generate queries$|a corpus line|a training row|a seed|endpoint: (no|a key))"
    given = ["--kills", "3", "--only", only, "--folder", str(tmp_path / "work"), "--summary", str(summary)]
    done = subprocess.run([sys.executable, str(CAMPAIGN), *given], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    found = json.loads(summary.read_text())
    assert found["kills"]["kills"] >= 3
    assert found["bad input"]["kinds of bad input"] >= 12
    assert found["kills"]["found"] == found["bad input"]["found"] == []
