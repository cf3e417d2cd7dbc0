"""The statistics of a mining run: what became of every query and every negative."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from st_clp.mining.rows import TrainingRow
from st_clp.queries.chain import UNCOUNTED, QueriesAccount
from st_clp.terminal import new_figure, save_figure

SOURCES = {
    "judged": "judged not relevant",
    "ranking": "ranked and let through by the filters",
    "relaxed": "refused by a filter, and kept for want of others",
    "random": "drawn at random, for want of others",
}
QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)
BINS = 40


@dataclass(frozen=True)
class Distribution:
    """The distribution of some scores.

    Attributes:
        count: How many.
        mean: Their mean.
        quantiles: The 5th, 25th, 50th, 75th and 95th percentile.
        edges: The edges of the bins, one more than there are bins.
        counts: How many fall in each bin.
    """

    count: int
    mean: float
    quantiles: list[float]
    edges: list[float]
    counts: list[int]

    @classmethod
    def of(cls, values: Sequence[float], low: float, high: float) -> Distribution | None:
        """The distribution of some values in bins from ``low`` to ``high``; None of none."""
        if not values:
            return None
        counts, edges = np.histogram(values, bins=BINS, range=(low, high if high > low else low + 1e-6))
        quantiles = np.quantile(values, QUANTILES)
        return cls(len(values), float(np.mean(values)), quantiles.tolist(), edges.tolist(), counts.tolist())


@dataclass
class MiningAccount:
    """What became of every query and every negative.

    Attributes:
        collection: The collection's name.
        queries: Queries with judgments.
        queries_without_positive: Queries without a relevant document: they give no row.
        queries_not_drawn: Queries beyond ``max_queries``.
        queries_dropped: Queries with too few negatives that ``on_shortage="drop"`` left out.
        rows: Training rows, one for each query and relevant document.
        rows_relaxed: Rows with a negative that a filter refused, or a random one.
        rows_short: Rows with fewer negatives than were asked for.
        negatives: How the rows' negatives were chosen, source to count.
        filtered: Candidates that were refused or left out, reason to count.
        left_out: What reading the collection left out, cause to count.
        with_query: Negatives for which a query is known.
        query_sources: Those negatives by where their first query comes from, source to count.
        documents_without_query: Documents for which a generating source found no query, by ``"source: cause"``.
        queries_barred: Negatives whose only known queries are the row's own query or ones that its positive answers.
        query_round_trip: How many generated queries were checked, how many found their document, and what became of the
            others.
        query_usage: What generating has cost in this call: tokens, money, requests.
        mean_positive_score: Mean similarity of queries and positives.
        mean_negative_score: Mean similarity of queries and ranked negatives; None without any.
        mean_rank: Mean rank of the ranked negatives, from 0; None without any.
        scores: The distributions of the queries' similarities to their ``"positives"``, and to their negatives by
            source.
        search: For an approximate search, the index, its recall and the number of queries that it was measured on.
        seconds: Time spent, stage to seconds.
    """

    collection: str
    queries: int
    queries_without_positive: int
    queries_not_drawn: int = 0
    queries_dropped: int = 0
    rows: int = 0
    rows_relaxed: int = 0
    rows_short: int = 0
    negatives: dict[str, int] = field(default_factory=dict)
    filtered: dict[str, int] = field(default_factory=dict)
    left_out: dict[str, int] = field(default_factory=dict)
    with_query: int = 0
    query_sources: dict[str, int] = field(default_factory=dict)
    documents_without_query: dict[str, int] = field(default_factory=dict)
    queries_barred: int = 0
    query_round_trip: dict[str, int] = field(default_factory=dict)
    query_usage: dict[str, float] = field(default_factory=dict)
    mean_positive_score: float | None = None
    mean_negative_score: float | None = None
    mean_rank: float | None = None
    scores: dict[str, Distribution] = field(default_factory=dict)
    search: dict[str, Any] | None = None
    seconds: dict[str, float] = field(default_factory=dict)

    def add_rows(self, rows: Sequence[TrainingRow], num_negatives: int) -> None:
        """Count the rows that were made."""
        negatives = [negative for row in rows for negative in row.negatives]
        self.rows = len(rows)
        self.rows_relaxed = sum(any(n.source in ("relaxed", "random") for n in row.negatives) for row in rows)
        self.rows_short = sum(len(row.negatives) < num_negatives for row in rows)
        self.negatives = dict(Counter(negative.source for negative in negatives))
        self.with_query = sum(bool(negative.queries) for negative in negatives)
        self.query_sources = dict(Counter(n.query_sources[0] for n in negatives if n.queries))
        self.mean_positive_score = _mean([row.positive_score for row in rows])
        self.mean_negative_score = _mean([n.score for n in negatives if n.score is not None])
        self.mean_rank = _mean([n.rank for n in negatives if n.rank is not None])
        groups = {"positives": [row.positive_score for row in rows]}
        for source in SOURCES:
            groups[source] = [n.score for n in negatives if n.source == source and n.score is not None]
        every = [score for group in groups.values() for score in group] or [0.0]
        found = {name: Distribution.of(group, min(every), max(every)) for name, group in groups.items()}
        self.scores = {name: distribution for name, distribution in found.items() if distribution is not None}

    def add_queries(self, queries: QueriesAccount) -> None:
        """Count what became of the queries of negatives."""
        self.documents_without_query = dict(queries.without)
        self.queries_barred = queries.barred
        self.query_round_trip = dict(queries.round_trip)
        if queries.usage.tokens_at_most:
            self.query_usage = asdict(queries.usage)

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)

    def __str__(self) -> str:
        return "\n".join([self._head(), *(f"  {line}" for line in [*self._queries(), *self._negatives()])])

    def _head(self) -> str:
        total = sum(self.negatives.values())
        return f"{self.collection}: {self.rows:,} rows from {self.queries:,} queries, {total:,} negatives"

    def _queries(self) -> list[str]:
        lines = {
            "queries have no relevant document and give no row": self.queries_without_positive,
            "queries were not drawn (max_queries)": self.queries_not_drawn,
            "queries were dropped for want of negatives (on_shortage)": self.queries_dropped,
            "rows have fewer negatives than asked for (on_shortage)": self.rows_short,
            "rows have a negative that was kept or drawn for want of others": self.rows_relaxed,
        }
        return [f"{number:>9,}  {what}" for what, number in lines.items() if number] + [
            f"{number:>9,}  left out: {cause}" for cause, number in self.left_out.items()
        ]

    def _negatives(self) -> list[str]:
        total = sum(self.negatives.values())
        lines = [
            f"{self.negatives[source]:>9,}  negatives {meaning}"
            for source, meaning in SOURCES.items()
            if self.negatives.get(source)
        ]
        lines += [f"{number:>9,}  candidates passed over: {reason}" for reason, number in self.filtered.items()]
        if total:
            lines.append(f"{self.with_query:>9,}  negatives ({self.with_query / total:.0%}) have a query of their own")
            lines += self._query_lines()
        if self.mean_rank is not None:
            lines.append(f"{self.mean_rank:>9.1f}  mean rank of the ranked negatives")
        if self.scores:
            lines.append(f"{'similarity to the query':<24}" + "".join(f"{q:>8.0%}" for q in QUANTILES) + "    mean")
            lines += [
                f"{'  ' + name:<24}" + "".join(f"{value:8.3f}" for value in [*found.quantiles, found.mean])
                for name, found in self.scores.items()
            ]
        if self.search is not None:
            lines.append(
                f"{self.search['recall']:>9.3f}  recall of {self.search['index']} against exact search, "
                f"over {self.search['recall_queries']} queries"
            )
        return lines

    def _query_lines(self) -> list[str]:
        if set(self.query_sources) <= {"judgments"} and not self.documents_without_query:
            return []
        lines = [f"{number:>9,}    of them from {source}" for source, number in self.query_sources.items()]
        lines += [
            f"{number:>9,}  documents without a query, {cause}"
            for cause, number in self.documents_without_query.items()
        ]
        if self.queries_barred:
            lines.append(f"{self.queries_barred:>9,}  times a source knew only the row's own query, or its positive's")
        lines += [
            f"{number:>9,}  generated queries {what} (round trip)" for what, number in self.query_round_trip.items()
        ]
        if self.query_usage:
            tokens = int(self.query_usage["prompt_tokens"] + self.query_usage["completion_tokens"])
            uncounted = int(self.query_usage.get("uncounted_tokens", 0))
            most = "at most " if uncounted else ""
            cost = f", at a cost of {most}{self.query_usage['cost']:.4f}" if self.query_usage["cost"] else ""
            lines.append(f"{tokens:>9,}  tokens read and written for queries{cost}")
            if uncounted:
                lines.append(f"{uncounted:>9,}  {UNCOUNTED}")
        return lines

    def plot(self, path: str | os.PathLike[str]) -> None:
        """Plot the distributions of the similarities of positives and negatives to a file.

        Args:
            path: Where to; its ending (``.png``, ``.svg``, ``.pdf``) says what kind of picture.

        Raises:
            ModuleNotFoundError: matplotlib is not installed; the message says how to.
            ValueError: There are no rows.
        """
        if not self.scores:
            raise ValueError(f"{self.collection}: there are no rows to plot")
        figure = new_figure(8, 4.5)
        axes = figure.add_subplot()
        for name, found in self.scores.items():
            label = name if name == "positives" else f"negatives: {SOURCES[name]}"
            share = np.array(found.counts) / found.count
            axes.stairs(share, found.edges, label=f"{label} ({found.count:,})", fill=True, alpha=0.35)
            axes.stairs(share, found.edges, color="black", alpha=0.4, linewidth=0.6)
        axes.set_xlabel("similarity to the query")
        axes.set_ylabel("share")
        axes.set_title(f"{self.collection}: {self.rows:,} rows")
        figure.legend(loc="outside lower center", frameon=False)
        save_figure(figure, path)


def _mean(values: Sequence[float]) -> float | None:
    return sum(values) / len(values) if values else None
