"""The round-trip check: does a generated query find its document again?"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from sentence_transformers import SentenceTransformer

from st_clp.declaring import shows, takes
from st_clp.encoding import EmbeddingStore, encode_queries
from st_clp.options import EncodingOptions, RoundTripAction
from st_clp.queries.interface import DocumentQueries
from st_clp.search import pair_scores, search_rows

FAILED = "does not find its document"
LOWER_WEIGHT = 0.5  # what the weight of a query is multiplied by that does not find its document
QUERIES_TOGETHER = 4096


@shows(encoding=EncodingOptions)
class RoundTrip:
    """Checks queries by the mining model: each must find its document among the k best of the corpus.

    After Alberti et al. (2019), Synthetic QA Corpora Generation with Roundtrip Consistency, arXiv:1906.05416, and Dai
    et al. (2023), Promptagator, arXiv:2209.11755, which keep a query that ranks its document first. With a weak model,
    a larger k or a lower weight loses less.

    Args:
        model: Encodes the queries; its similarity function is used.
        store: The embeddings of the corpus by the same model.
        k: The lowest rank at which the document may be, from 1.
        action: ``"drop"`` a query that fails, or give it half its ``"weight"``.
        encoding
    """

    @takes(encoding=EncodingOptions)
    def __init__(
        self,
        model: SentenceTransformer,
        store: EmbeddingStore,
        *,
        k: int = 10,
        action: RoundTripAction = "drop",
        encoding: EncodingOptions,
    ) -> None:
        self._model = model
        self._store = store
        self._k = min(k, len(store))
        self._action = action
        self._encoding = encoding

    def check(self, answers: Sequence[DocumentQueries]) -> tuple[list[DocumentQueries], Counter[str]]:
        """Return (the answers, with failing queries dropped or down-weighted; counts of each outcome)."""
        pairs = [(number, place) for number, answer in enumerate(answers) for place in range(len(answer.queries))]
        found = self._find([(answers[n].doc_id, answers[n].queries[place].text) for n, place in pairs])
        passed = {pair for pair, well in zip(pairs, found, strict=True) if well}
        counts = Counter({"checked": len(pairs), "found": len(passed)})
        checked = []
        for number, answer in enumerate(answers):
            queries = [
                query
                if (number, place) in passed
                else replace(query, weight=query.weight * (0.0 if self._action == "drop" else LOWER_WEIGHT))
                for place, query in enumerate(answer.queries)
            ]
            kept = tuple(query for query in queries if query.weight > 0)
            cause = FAILED if answer.queries and not kept else answer.cause
            checked.append(replace(answer, queries=kept, cause=cause))
        counts["dropped" if self._action == "drop" else "down-weighted"] = len(pairs) - len(passed)
        return checked, counts

    def _find(self, pairs: list[tuple[str, str]]) -> list[bool]:
        positions = self._store.positions({doc_id for doc_id, _ in pairs})
        found: list[bool] = []
        for begin in range(0, len(pairs), QUERIES_TOGETHER):
            some = pairs[begin : begin + QUERIES_TOGETHER]
            queries = encode_queries(self._model, [text for _, text in some], encoding=self._encoding)
            own = np.array([positions[doc_id] for doc_id, _ in some])
            scores, rows = search_rows(self._model, queries, self._store, self._k)
            # Another document with the same embedding may take its place.
            tied = pair_scores(self._model, queries, self._store.rows(own.tolist())) >= scores[:, -1]
            found += ((rows == own[:, None]).any(axis=1) | tied).tolist()
        return found
