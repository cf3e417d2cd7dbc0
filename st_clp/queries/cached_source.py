"""A generating source and a store: what is known is not generated again, what is generated is kept at once."""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterable, Iterator
from dataclasses import replace

from st_clp.data import Document
from st_clp.queries.interface import DocumentQueries, GeneratingSource, QuerySource
from st_clp.queries.query_store import Key, QueryStore, StoredAnswer

LOOKED_UP_TOGETHER = 1000
LOOK_AGAIN_SECONDS = 0.2


class CachedSource(QuerySource):
    """A generating source that asks the store first.

    Args:
        source: Generates what the store does not have.
        store: Keeps each answer as it comes.
    """

    def __init__(self, source: GeneratingSource, store: QueryStore) -> None:
        self.source = source
        self.store = store
        self.name = source.name
        self.weight = source.weight

    def generate(self, documents: Iterable[Document], *, language: str | None = None) -> Iterator[DocumentQueries]:
        """As :meth:`QuerySource.generate`; documents with one text are generated for once."""
        generator, prompt = self.source.fingerprint(), self.source.prompt(language)
        self.store.name(generator, self.source.describe(), prompt)
        same: dict[Key, list[Document]] = {}  # what is generated for, and who else has that text
        mine: set[Key] = set()
        elsewhere: dict[Key, None] = {}

        def answer(key: Key, stored: StoredAnswer) -> Iterator[DocumentQueries]:
            for document in same.pop(key):
                yield DocumentQueries(document.doc_id, self._mark(stored.queries), stored.cause)

        def claimed(keys: Iterable[Key]) -> Iterator[Document]:
            """The documents to generate for; each is claimed when the source has room for it."""
            for key in keys:
                if self.store.claim(key):
                    mine.add(key)
                    # Its key in place of its id: ids of several documents stand for one text.
                    yield same[key][0]._replace(doc_id=key.document)
                else:
                    elsewhere[key] = None

        def generated(keys: list[Key]) -> Iterator[DocumentQueries]:
            by_hash = {key.document: key for key in keys}
            for found in self.source.generate(claimed(keys), language=language):
                key = by_hash[found.doc_id]
                texts = tuple(query.text for query in found.queries)
                if found.final:
                    self.store.put(key, StoredAnswer(texts, found.cause, found.usage))
                else:
                    self.store.release([key])
                mine.discard(key)
                for number, document in enumerate(same.pop(key)):
                    usage = found.usage if number == 0 else type(found.usage)()
                    yield replace(found, doc_id=document.doc_id, queries=self._mark(texts), usage=usage)

        try:
            stream = iter(documents)
            unknown: list[Key] = []
            while some := list(itertools.islice(stream, LOOKED_UP_TOGETHER)):
                fresh = []
                for document in some:
                    key = Key.of(generator, prompt, document.text)
                    if key not in same:
                        fresh.append(key)
                    same.setdefault(key, []).append(document)
                known = self.store.get(fresh)
                unknown += [key for key in fresh if key not in known]
                for key, stored in known.items():
                    yield from answer(key, stored)
            while unknown:
                yield from generated(unknown)
                unknown = []
                # What other processes work on is waited for; where one died, its documents are taken over.
                while elsewhere and not unknown:
                    for key, stored in self.store.get(list(elsewhere)).items():
                        del elsewhere[key]
                        yield from answer(key, stored)
                    unknown = [key for key in elsewhere if self.store.claim(key)]
                    for key in unknown:
                        del elsewhere[key]
                        mine.add(key)
                    if elsewhere and not unknown:
                        time.sleep(LOOK_AGAIN_SECONDS)
        finally:
            self.store.release(list(mine))

    def missing(self, documents: Iterable[Document], language: str | None) -> tuple[list[Document], int]:
        """(one document for each text that the store has no answer for, how many documents it has an answer for)."""
        missing: dict[Key, Document] = {}
        known = 0
        for document, key, stored in self._look_up(documents, language):
            known += stored is not None
            if stored is None:
                missing.setdefault(key, document)
        return list(missing.values()), known

    def failed(self, documents: Iterable[Document], language: str | None) -> list[Document]:
        """The documents of which the store says that no good query was written."""
        looked_up = self._look_up(documents, language)
        return [document for document, _, stored in looked_up if stored is not None and not stored.queries]

    def _look_up(
        self, documents: Iterable[Document], language: str | None
    ) -> Iterator[tuple[Document, Key, StoredAnswer | None]]:
        generator, prompt = self.source.fingerprint(), self.source.prompt(language)
        stream = iter(documents)
        while some := list(itertools.islice(stream, LOOKED_UP_TOGETHER)):
            keys = [Key.of(generator, prompt, document.text) for document in some]
            found = self.store.get(keys)
            yield from ((document, key, found.get(key)) for document, key in zip(some, keys, strict=True))
