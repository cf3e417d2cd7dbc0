"""Queries of negatives: for a hard negative of one query, a query that this document does answer."""

from __future__ import annotations

import hashlib
import random
from collections import defaultdict

from st_clp.data import Collection


class JudgedQueries:
    """Queries of documents, as the training judgments know them.

    Args:
        collection: Its judgments say which query each document answers; its ``known_queries`` add to them.
        seed: Where a document answers several queries, which is taken depends on the seed and the row.
    """

    def __init__(self, collection: Collection, *, seed: int = 0) -> None:
        self._collection = collection
        self._seed = seed
        self._positives = {query_id: set(doc_ids) for query_id, doc_ids in collection.positives().items()}
        self._queries_of: dict[str, list[str]] = defaultdict(list)
        for query_id, doc_ids in self._positives.items():
            for doc_id in doc_ids:
                self._queries_of[doc_id].append(query_id)

    def knows(self, negative_id: str, *, query_id: str) -> bool:
        """Whether a row of this query would find a query for this negative, whichever positive the row has."""
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
        texts = self._collection.queries
        own_text = texts[query_id]
        # Queries that the row's positive answers are no other queries, by id or by text.
        near = {texts[other] for other in self._queries_of.get(positive_id, ())} | {own_text}
        known = [text for text in self._collection.known_queries.get(negative_id, ()) if text not in near]
        judged = [texts[other] for other in self._queries_of.get(negative_id, ()) if texts[other] not in near]
        candidates = list(dict.fromkeys([*known, *judged]))
        if len(candidates) > number:
            # The seed is the row's own, so that a row gets the same query wherever it stands.
            key = f"{self._seed}\0{query_id}\0{positive_id}\0{negative_id}".encode()
            chooser = random.Random(hashlib.blake2b(key, digest_size=8).digest())
            # A query that was written for this negative comes before one that the judgments know.
            candidates = [*chooser.sample(known, len(known)), *chooser.sample(judged, len(judged))]
        return list(dict.fromkeys(candidates))[:number]
