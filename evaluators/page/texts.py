"""The texts of queries and documents that the page shows, read from the collections that evaluations name."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from evaluators.comparison import QueryChange
from evaluators.evaluation import CollectionResult, Evaluation
from evaluators.runs import Run, ranked
from st_clp.data import Collection, CollectionError

TEXT = 600  # characters of a document
JUDGED = 3  # relevant documents of a query


@dataclass(frozen=True)
class ShownDocument:
    """A document on the page; ``text`` is None if the collection could not be read."""

    doc_id: str
    text: str | None
    grade: int | None


@dataclass(frozen=True)
class ShownChange:
    """A changed query: its text, relevant documents, and each model's first documents."""

    change: QueryChange
    query: str | None
    judged: list[ShownDocument]
    first_before: ShownDocument | None
    first_after: ShownDocument | None


class TextReader:
    """Reads collections when their texts are needed.

    Args:
        read: Whether to read anything; otherwise ids are shown instead of texts.

    Attributes:
        unread: Collection to why it could not be read.
    """

    def __init__(self, *, read: bool) -> None:
        self._read = read
        self._collections: dict[tuple[str, str | None], Collection | None] = {}
        self._runs: dict[tuple[str, str], Run] = {}
        self.unread: dict[str, str] = {}

    def show(
        self, before: Evaluation, after: Evaluation, key: str, changes: Sequence[QueryChange]
    ) -> list[ShownChange]:
        """The changes with their texts.

        Raises:
            ValueError, OSError: A run file is broken or missing.
        """
        if not changes:
            return []
        runs = self._run(before, key), self._run(after, key)
        firsts = [[_first(run.get(change.query_id, {})) for run in runs] for change in changes]
        collection = self._collection(before.results[key])
        judged = [_relevant(collection, change.query_id) for change in changes]
        wanted = {doc_id for pair in firsts for doc_id in pair if doc_id} | {d for ids in judged for d in ids}
        documents = collection.get_documents(wanted) if collection else {}

        def shown(doc_id: str, query_id: str) -> ShownDocument:
            text = " ".join(documents[doc_id].text.split()) if doc_id in documents else None
            grade = collection.judgments.get(query_id, {}).get(doc_id) if collection else None
            return ShownDocument(doc_id, text if text is None or len(text) <= TEXT else text[:TEXT] + "…", grade)

        return [
            ShownChange(
                change,
                collection.queries.get(change.query_id) if collection else None,
                [shown(doc_id, change.query_id) for doc_id in relevant],
                *(shown(doc_id, change.query_id) if doc_id else None for doc_id in pair),
            )
            for change, relevant, pair in zip(changes, judged, firsts, strict=True)
        ]

    def _run(self, evaluation: Evaluation, key: str) -> Run:
        where = (str(evaluation.path), key)
        if where not in self._runs:
            self._runs[where] = evaluation.run(key)
        return self._runs[where]

    def _collection(self, result: CollectionResult) -> Collection | None:
        where = (result.source, result.split)
        if not self._read:
            return None
        if where not in self._collections:
            try:
                self._collections[where] = _load(*where)
            except (CollectionError, OSError, ValueError) as error:
                self._collections[where] = None
                self.unread[result.source] = str(error)
        return self._collections[where]


def _load(source: str, split: str | None) -> Collection:
    """Load a collection by its name, which may or may not end in its split."""
    base, _, last = source.rpartition("/")
    if last and last in Collection.splits(base):
        return Collection.load(base, split=last)
    return Collection.load(source, split=split if split in Collection.splits(source) else None)


def _first(documents: Mapping[str, float]) -> str | None:
    return ranked(documents)[0][0] if documents else None


def _relevant(collection: Collection | None, query_id: str) -> list[str]:
    grades = collection.judgments.get(query_id, {}) if collection else {}
    return [doc_id for doc_id in sorted(grades, key=lambda doc_id: -grades[doc_id]) if grades[doc_id] > 0][:JUDGED]
