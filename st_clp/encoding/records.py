"""What an embedding store says of itself: its manifest and the record of its shards.

``shards.py`` says what the files are.
"""

from __future__ import annotations

import json
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from st_clp.files import parse_object, read_json, require_field, write_json

logger = logging.getLogger(__name__)

MANIFEST, EMBEDDINGS, IDS, KEYS, SHARDS = "manifest.json", "embeddings.bin", "ids.jsonl", "keys.bin", "shards.jsonl"
LOCK = ".lock"  # what the name of the file beside a store ends in that is locked while it is made
FORMAT = 3
UNSEALED_FORMAT = 2
ENCODING = ("model", "task", "computed_in", "dtype", "dim")  # what must agree for an embedding to be used again


class StoreError(ValueError):
    """A store's files say what cannot be; the message names the file and what to do."""


REMEDY = "what made the store makes it anew; `st-clp store rm` removes it"


@dataclass(frozen=True)
class Shard:
    """A run of rows: how many, how long their ids are in bytes, and a checksum over ids, keys and embeddings.

    ``sealed`` tells whether it covers what the embeddings are of as well.
    """

    rows: int
    id_bytes: int
    checksum: str
    sealed: bool = True


def write_manifest(folder: Path, manifest: dict[str, Any]) -> None:
    """Write a manifest so that it appears whole or not at all."""
    write_json(folder / MANIFEST, {"format": FORMAT, **manifest})


def read_manifest(folder: Path) -> dict[str, Any] | None:
    """The manifest in a folder; None where there is none, or one of a format that this version does not know.

    Raises:
        StoreError: It cannot be read, or says what cannot be.
    """
    file = folder / MANIFEST
    try:
        manifest = read_json(file, error=StoreError, remedy=REMEDY)
    except (FileNotFoundError, NotADirectoryError):
        return None
    if manifest.get("format") not in (FORMAT, UNSEALED_FORMAT):
        return None

    def field(name: str, kind: type, **limits: float) -> Any:
        return require_field(manifest, name, kind, str(file), error=StoreError, remedy=REMEDY, **limits)

    for name in ("model", "task", "computed_in", "corpus", "corpus_fingerprint"):
        field(name, str)
    if field("dtype", str) not in ("float16", "float32"):
        raise StoreError(f"{file}: 'dtype' must be float16 or float32, not {manifest['dtype']!r:.60}; {REMEDY}")
    field("dim", int, least=1, most=1 << 24)
    if "documents" in manifest:
        field("documents", int, least=1)
    return manifest


def usable_manifest(folder: Path) -> dict[str, Any] | None:
    """The manifest in a folder; None where there is none or it cannot be read, which is said."""
    try:
        return read_manifest(folder)
    except StoreError as error:
        logger.warning("%s; it is encoded anew", str(error).removesuffix(f"; {REMEDY}"))
        return None


def read_shards(folder: Path) -> list[Shard]:
    """The shards that are recorded, up to the first line that cannot be read or says what cannot be."""
    found: list[Shard] = []
    try:
        lines = (folder / SHARDS).read_bytes().splitlines()
    except OSError:
        return found
    for number, line in enumerate(lines, start=1):
        where = f"{folder / SHARDS}, line {number}"
        try:
            values = parse_object(line, where, error=StoreError)
            rows = require_field(values, "rows", int, where, error=StoreError, least=1)
            id_bytes = require_field(values, "id_bytes", int, where, error=StoreError, least=1)
            kind = "sealed" if "sealed" in values else "checksum"
            checksum = require_field(values, kind, str, where, error=StoreError)
        except StoreError:
            break
        found.append(Shard(rows, id_bytes, checksum, kind == "sealed"))
    return found


def record_line(shard: Shard) -> bytes:
    """A shard's line in the record."""
    kind = "sealed" if shard.sealed else "checksum"
    return json.dumps({"rows": shard.rows, "id_bytes": shard.id_bytes, kind: shard.checksum}).encode() + b"\n"
