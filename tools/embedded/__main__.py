"""Writes the data file of the embedded collection: ``python -m tools.embedded`` from the project's folder."""

from __future__ import annotations

import gzip
import json
from importlib.metadata import version
from pathlib import Path

from tools.embedded import make_collections

FILE = Path(__file__).resolve().parents[2] / "st_clp" / "data" / "embedded.json.gz"


def main() -> None:
    """Write the file, the same bytes for one version of Babel."""
    about = (
        f"Facts and names from Unicode CLDR as in Babel {version('babel')}, under the Unicode licence beside this "
        "file; sentences and questions by the authors of st_clp. Made by tools/embedded."
    )
    content = json.dumps({"about": about, "collections": make_collections()}, ensure_ascii=False, separators=(",", ":"))
    FILE.write_bytes(gzip.compress(content.encode(), mtime=0))
    print(f"{FILE}: {FILE.stat().st_size:,} bytes, {len(content.encode()):,} before compression")


main()
