"""Queries from the training judgments."""

from __future__ import annotations

import hashlib
import random
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence

from st_clp.data import Collection, Document
from st_clp.queries.interface import JUDGMENTS, DocumentQueries, NegativeQuery, QuerySource
from st_clp.queries.wording import comparable


class JudgedQueries(QuerySource):
    """Queries of documents from the training judgments.

    Args:
        collection: Its judgments say which query each document answers; its ``known_queries`` add to them.
        seed: If a document answers several queries, seed and row decide which one is taken.
    """

    def __init__(self, collection: Collection, *, seed: int = 0) -> None:
        self.name = JUDGMENTS
        self._collection = collection
        self._seed = seed
        self._positives = {query_id: set(doc_ids) for query_id, doc_ids in collection.positives().items()}
        self._queries_of: dict[str, list[str]] = defaultdict(list)
        for query_id, doc_ids in self._positives.items():
            for doc_id in doc_ids:
                self._queries_of[doc_id].append(query_id)

    def generate(self, documents: Iterable[Document], *, language: str | None = None) -> Iterator[DocumentQueries]:
        """Yield all queries of each document, for any row."""
        for document in documents:
            texts = [*self._collection.known_queries.get(document.doc_id, ()), *self._judged(document.doc_id)]
            queries = tuple(self._marked(document.doc_id, text) for text in dict.fromkeys(texts))
            yield DocumentQueries(document.doc_id, queries)

    def knows(self, negative_id: str, *, query_id: str) -> bool:
        """Whether rows of this query find a query for this negative, whatever their positive is."""
        return all(
            self.find(negative_id, query_id=query_id, positive_id=positive_id)
            for positive_id in self._positives[query_id]
        )

    def find(self, negative_id: str, *, query_id: str, positive_id: str, number: int = 1) -> list[str]:
        """Up to ``number`` queries that the negative answers, in a seeded order.

        Never the row's own query, its text under another id, or a query that the row's own positive answers:
        holding the negative near such a query would hold it near this row's query.

        Args:
            negative_id: The negative's document id.
            query_id: The row's query.
            positive_id: The row's positive.
            number: How many queries to find at most.
        """
        # Queries that the row's positive answers are no other queries, by id or by text.
        near = {*self._judged(positive_id), self._collection.queries[query_id]}
        known = [text for text in self._collection.known_queries.get(negative_id, ()) if text not in near]
        judged = [text for text in self._judged(negative_id) if text not in near]
        candidates = list(dict.fromkeys([*known, *judged]))
        if len(candidates) > number:
            chooser = self._chooser(query_id, positive_id, negative_id)
            # A query that was written for this negative comes before one that the judgments know.
            candidates = [*chooser.sample(known, len(known)), *chooser.sample(judged, len(judged))]
        return list(dict.fromkeys(candidates))[:number]

    def find_marked(
        self, negative_id: str, *, query_id: str, positive_id: str, number: int = 1
    ) -> tuple[NegativeQuery, ...]:
        """As :meth:`find`, with source and weight."""
        found = self.find(negative_id, query_id=query_id, positive_id=positive_id, number=number)
        return tuple(self._marked(negative_id, text) for text in found)

    def choose(
        self,
        queries: Sequence[NegativeQuery],
        negative_id: str,
        *,
        query_id: str,
        positive_id: str,
        number: int = 1,
        near: Iterable[NegativeQuery] = (),
    ) -> tuple[NegativeQuery, ...]:
        """Up to ``number`` of a document's queries from elsewhere for one row, in a seeded order.

        As in :meth:`find` none is the row's own query or one that its positive is known to answer; here texts that
        differ in case, punctuation or spacing alone are the same. ``near`` holds further queries of the positive.
        """
        barred = {self._collection.queries[query_id], *(query.text for query in near)}
        barred |= {*self._judged(positive_id), *self._collection.known_queries.get(positive_id, ())}
        same = {comparable(text) for text in barred}
        fitting = [query for query in queries if comparable(query.text) not in same]
        if len(fitting) > number:
            fitting = self._chooser(query_id, positive_id, negative_id).sample(fitting, number)
        return tuple(fitting)

    def _judged(self, doc_id: str) -> list[str]:
        return [self._collection.queries[query_id] for query_id in self._queries_of.get(doc_id, ())]

    def _marked(self, doc_id: str, text: str) -> NegativeQuery:
        source, weight = self._collection.query_marks.get(doc_id, {}).get(text, (JUDGMENTS, 1.0))
        return NegativeQuery(text, source, weight)

    def _chooser(self, query_id: str, positive_id: str, negative_id: str) -> random.Random:
        # The seed is the row's own, so that a row gets the same query wherever it stands.
        key = f"{self._seed}\0{query_id}\0{positive_id}\0{negative_id}".encode()
        return random.Random(hashlib.blake2b(key, digest_size=8).digest())
