"""Choose a query's negatives from its ranking."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from st_clp.data import Collection, CollectionError
from st_clp.mining.filters import Candidate, refusal
from st_clp.mining.ranking import Ranking
from st_clp.options import JudgedNegatives, MiningOptions
from st_clp.queries import JudgedQueries


@dataclass(frozen=True)
class Choice:
    """A document chosen as a negative; ``source`` as in :class:`st_clp.mining.rows.Negative`."""

    doc_id: str
    rank: int | None
    score: float | None
    source: str

    @classmethod
    def of(cls, candidate: Candidate, source: str) -> Choice:
        """The choice of a ranked candidate."""
        return cls(candidate.doc_id, candidate.rank, candidate.score, source)


class Chooser:
    """Chooses each query's negatives.

    Args:
        collection: The judgments.
        corpus_ids: All documents, for random ones.
        options: What to choose, as in :func:`st_clp.mining.mine_hard_negatives`.
        prefer: Says which documents are taken first; None for no preference.

    Attributes:
        options: What to choose.
        refused: Query id to the candidates that the filters refused, reason to count.
        skipped: Query id to the candidates that ``range_min`` skipped.
        short: The queries for which the filters left fewer candidates than negatives are wanted.
    """

    def __init__(
        self,
        collection: Collection,
        corpus_ids: Sequence[str],
        options: MiningOptions,
        *,
        prefer: JudgedQueries | None = None,
    ) -> None:
        self._collection = collection
        self._corpus_ids = corpus_ids
        self.options = options
        self._number = options.num_negatives
        self._judged_negatives: JudgedNegatives = options.judged_negatives or (
            "first" if collection.judged_negatives else "rank"
        )
        self._prefer = prefer
        self.refused: dict[str, Counter[str]] = {}
        self.skipped: dict[str, set[str]] = {}
        self.short: set[str] = set()

    def choose(self, query_id: str, ranking: Ranking) -> list[Choice]:
        """A query's negatives: ``num_negatives`` of them, unless ``on_shortage`` allows fewer.

        They are taken in this order: documents judged not relevant (where they come first), candidates that pass the
        filters, and then what ``on_shortage`` says.

        Raises:
            CollectionError: The corpus has too few other documents.
        """
        # Seeded by the query, so that its negatives do not depend on the other queries.
        generator = random.Random(f"{self.options.seed}\0{query_id}")
        candidates = ranking.candidates(query_id)
        judged = {doc_id for doc_id, grade in self._collection.judgments[query_id].items() if grade <= 0}
        judged -= ranking.excluded(query_id)
        chosen: list[Choice] = []
        if self._judged_negatives == "first":
            chosen = _judged_first(candidates, judged)[: self._number]
        taken = {choice.doc_id for choice in chosen}
        lowest_positive = min(ranking.positive_scores[query_id].values())
        left = [candidate for candidate in candidates if candidate.doc_id not in taken]
        passed, refused = self._sift(query_id, left, judged, lowest_positive, by_score=ranking.by_score)
        missing = self._number - len(chosen)
        passed = self._order(query_id, passed, max(0, missing), generator)
        chosen = [*chosen, *(Choice.of(candidate, "ranking") for candidate in passed)][: self._number]
        self.short.discard(query_id)
        if len(chosen) < self._number:
            self.short.add(query_id)
            chosen = self._make_up(query_id, chosen, refused, candidates, ranking, generator)
        return chosen

    def _make_up(
        self,
        query_id: str,
        chosen: list[Choice],
        refused: list[Candidate],
        candidates: list[Candidate],
        ranking: Ranking,
        generator: random.Random,
    ) -> list[Choice]:
        """Apply ``on_shortage`` to a query with too few negatives."""
        if self.options.on_shortage in ("fewer", "drop"):
            return chosen
        relaxed = [Choice.of(candidate, "relaxed") for candidate in refused]
        if self.options.on_shortage == "relax":
            chosen = [*chosen, *relaxed][: self._number]
        if len(chosen) < self._number:
            chosen = [*chosen, *self._fill(query_id, chosen, refused, candidates, ranking, generator)]
        return chosen

    def _order(self, query_id: str, passed: list[Candidate], number: int, generator: random.Random) -> list[Candidate]:
        """The candidates in the order in which they are taken: with a known query first, where that is preferred."""
        known: list[Candidate] = []
        if self._prefer is not None:
            known = [c for c in passed if self._prefer.knows(c.doc_id, query_id=query_id)]
        taken = {candidate.doc_id for candidate in known}
        others = [candidate for candidate in passed if candidate.doc_id not in taken]
        if self.options.sampling_strategy == "random":
            known = _draw(known, number, generator)
            others = _draw(others, number - len(known), generator)
        return known + others

    def _sift(
        self, query_id: str, candidates: list[Candidate], judged: set[str], positive_score: float, *, by_score: bool
    ) -> tuple[list[Candidate], list[Candidate]]:
        """Split into (candidates that may be negatives, best first; refused ones within range, nearest miss first)."""
        options = self.options
        passed: list[Candidate] = []
        refused: list[tuple[float, Candidate]] = []
        reasons: Counter[str] = Counter()
        # A margin guards against unjudged answers; judged documents do not need it.
        trusted = judged if self._judged_negatives != "ignore" else set()
        for candidate in candidates:
            if candidate.rank >= options.range_max:
                continue
            found = None if candidate.doc_id in trusted else refusal(candidate, positive_score, options)
            if found is None:
                passed.append(candidate)
            else:
                reasons[found.reason] += 1
                refused.append((found.excess, candidate))
        if by_score:
            passed.sort(key=lambda candidate: (-candidate.score, candidate.rank))
        # As in sentence-transformers, what is skipped is the best of what passes.
        if options.range_min and passed:
            reasons["among the best range_min"] = min(options.range_min, len(passed))
        self.skipped[query_id] = {candidate.doc_id for candidate in passed[: options.range_min]}
        self.refused[query_id] = reasons
        # The nearest miss is least likely to be what the filter guards against; among equals take the deepest.
        refused.sort(key=lambda pair: (pair[0], -pair[1].rank))
        return passed[options.range_min :], [candidate for _, candidate in refused]

    def _fill(
        self,
        query_id: str,
        chosen: list[Choice],
        refused: list[Candidate],
        candidates: list[Candidate],
        ranking: Ranking,
        generator: random.Random,
    ) -> list[Choice]:
        """Fill up with random documents, or with other candidates if the corpus has nothing else."""
        missing = self._number - len(chosen)
        taken = {choice.doc_id for choice in chosen}
        taboo = taken | ranking.excluded(query_id) | {candidate.doc_id for candidate in candidates}
        sample = generator.sample(self._corpus_ids, min(len(self._corpus_ids), missing + len(taboo)))
        filled = [Choice(doc_id, None, None, "random") for doc_id in sample if doc_id not in taboo][:missing]
        left = [candidate for candidate in refused if candidate.doc_id not in taken]
        seen = taken | {candidate.doc_id for candidate in left}
        left += [candidate for candidate in reversed(candidates) if candidate.doc_id not in seen]
        filled += [Choice.of(candidate, "relaxed") for candidate in left[: missing - len(filled)]]
        if len(filled) < missing:
            raise CollectionError(
                f"{self._collection.corpus_name}: the corpus has {len(self._corpus_ids)} documents, too few for "
                f"{self._number} negatives of query {query_id!r} ({len(ranking.excluded(query_id))} of them answer it, "
                "repeat it or have no text); ask for fewer (num_negatives), or let such queries have fewer "
                "(on_shortage='fewer')"
            )
        return filled


def _draw(candidates: list[Candidate], number: int, generator: random.Random) -> list[Candidate]:
    """Draw so many of the candidates at random (at most all), best first."""
    if len(candidates) <= number:
        return candidates
    return sorted(generator.sample(candidates, number), key=lambda candidate: candidate.rank)


def _judged_first(candidates: list[Candidate], judged: set[str]) -> list[Choice]:
    """Documents judged not relevant: the ranked ones by rank, then the others by id."""
    ranked = [Choice.of(candidate, "judged") for candidate in candidates if candidate.doc_id in judged]
    others = sorted(judged - {choice.doc_id for choice in ranked})
    return ranked + [Choice(doc_id, None, None, "judged") for doc_id in others]
