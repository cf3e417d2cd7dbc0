"""``embedded/ko`` (fa, hi, en): the small collection that comes with st_clp, for the demo and for tests.

It holds true statements about territories, currencies and languages, from Unicode CLDR; ``tools/embedded`` makes its
file. Its texts are plain: good for a demonstration, not for comparing methods. No document answers questions of both
splits, in every language.
"""

from __future__ import annotations

import gzip
import json
import sys
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

from st_clp.data.checks import CollectionError
from st_clp.data.collection import Collection
from st_clp.data.corpus import Corpus, MemoryCorpus
from st_clp.data.registry import register_source

PREFIX = "embedded/"
LANGUAGES = ("ko", "fa", "hi", "en")
SPLITS = ("dev", "train")
FILE = Path(__file__).parents[1] / "embedded.json.gz"


def recognises(source: str) -> bool:
    parts = source.split("/")
    return parts[0] == PREFIX[:-1] and len(parts) in (2, 3) and parts[1] in LANGUAGES


def known_names() -> list[str]:
    return [f"{PREFIX}{language}" for language in LANGUAGES]


def splits(source: str) -> list[str]:
    return list(SPLITS) if source.count("/") == 1 else []


def load(source: str, *, split: str | None, text_fields: Sequence[str] | None) -> Collection:
    _, language, *rest = source.split("/")
    split = split or (rest[0] if rest else None)
    if split not in SPLITS:
        raise CollectionError(f"{source}: name the split to read: {', '.join(SPLITS)}")
    fields = tuple(text_fields or ("title", "text"))
    if not set(fields) <= {"title", "text"}:
        raise CollectionError(f"{source}: its documents have the fields title and text, not {', '.join(fields)}")
    content = _collections()[language]
    documents = {
        doc_id: " ".join({"title": title, "text": text}[name] for name in fields)
        for doc_id, (title, text) in content["documents"].items()
    }
    titles = {doc_id: title for doc_id, (title, _) in content["documents"].items()}
    return Collection.checked(
        MemoryCorpus(f"{PREFIX}{language}", documents, titles),
        content["queries"][split],
        content["judgments"][split],
        name=f"{PREFIX}{language}/{split}",
        language=language,
        split=split,
    )


def documents(source: str, *, text_fields: Sequence[str] | None) -> Corpus:
    return load("/".join(source.split("/")[:2]), split=SPLITS[0], text_fields=text_fields).corpus


@lru_cache(maxsize=1)
def _collections() -> dict[str, Any]:
    return json.loads(gzip.decompress(FILE.read_bytes()))["collections"]


register_source(sys.modules[__name__])
