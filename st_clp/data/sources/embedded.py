"""``embedded/ko`` (fa, hi, en): the small collection that comes with st_clp, for the demo and for tests."""

from __future__ import annotations

from collections.abc import Sequence

from st_clp.data.collection import Collection
from st_clp.data.corpus import MemoryCorpus
from st_clp.data.embedded import LANGUAGES, load_embedded
from st_clp.data.errors import CollectionError

PREFIX = "embedded/"
SPLITS = ("dev", "train")


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
    content = load_embedded(language)
    documents = {
        doc_id: " ".join({"title": title, "text": text}[name] for name in fields)
        for doc_id, (title, text) in content.documents.items()
    }
    return Collection.checked(
        MemoryCorpus(
            f"{PREFIX}{language}", documents, {doc_id: title for doc_id, (title, _) in content.documents.items()}
        ),
        content.queries[split],
        content.judgments[split],
        name=f"{PREFIX}{language}/{split}",
        language=language,
        split=split,
    )
