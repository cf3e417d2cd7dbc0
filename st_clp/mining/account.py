"""The account of a mining run: what became of every query and every negative."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from st_clp.mining.rows import TrainingRow

SOURCES = {
    "judged": "judged not relevant",
    "ranking": "ranked by the model",
    "filtered": "kept against a margin, score limit or range_min, for want of others",
    "random": "drawn at random, for want of others",
}


@dataclass
class MiningAccount:
    """What became of every query and every negative.

    Attributes:
        collection: The collection's name.
        queries: Queries with judgments.
        queries_without_positive: Queries without a relevant document: they give no row.
        rows: Training rows, one for each query and relevant document.
        negatives: How the rows' negatives were chosen, source to count.
        filtered: Candidates that the filters refused, reason to count.
        with_query: Negatives for which a query is known.
        mean_positive_score: Mean similarity of queries and positives.
        mean_negative_score: Mean similarity of queries and ranked negatives; None without any.
        mean_rank: Mean rank of the ranked negatives, from 0; None without any.
        seconds: Time spent, stage to seconds.
    """

    collection: str
    queries: int
    queries_without_positive: int
    rows: int = 0
    negatives: dict[str, int] = field(default_factory=dict)
    filtered: dict[str, int] = field(default_factory=dict)
    with_query: int = 0
    mean_positive_score: float | None = None
    mean_negative_score: float | None = None
    mean_rank: float | None = None
    seconds: dict[str, float] = field(default_factory=dict)

    def add_rows(self, rows: Sequence[TrainingRow]) -> None:
        """Count the rows that were made."""
        negatives = [negative for row in rows for negative in row.negatives]
        self.rows = len(rows)
        self.negatives = dict(Counter(negative.source for negative in negatives))
        self.with_query = sum(bool(negative.queries) for negative in negatives)
        self.mean_positive_score = _mean([row.positive_score for row in rows])
        self.mean_negative_score = _mean([n.score for n in negatives if n.score is not None])
        self.mean_rank = _mean([n.rank for n in negatives if n.rank is not None])

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)

    def __str__(self) -> str:
        total = sum(self.negatives.values())
        lines = [f"{self.collection}: {self.rows:,} rows from {self.queries:,} queries, {total:,} negatives"]
        if self.queries_without_positive:
            lines.append(f"  {self.queries_without_positive:,} queries have no relevant document and give no row")
        for source, meaning in SOURCES.items():
            if number := self.negatives.get(source):
                lines.append(f"  {number:,} {meaning}")
        for reason, number in self.filtered.items():
            lines.append(f"  {number:,} candidates passed over: {reason}")
        if total:
            lines.append(f"  {self.with_query:,} ({self.with_query / total:.0%}) have a query of their own")
        if self.mean_negative_score is not None and self.mean_positive_score is not None:
            lines.append(
                f"  mean similarity to the query: positives {self.mean_positive_score:.3f}, "
                f"ranked negatives {self.mean_negative_score:.3f} (mean rank {self.mean_rank:.1f})"
            )
        return "\n".join(lines)


def _mean(values: Sequence[float]) -> float | None:
    return sum(values) / len(values) if values else None
