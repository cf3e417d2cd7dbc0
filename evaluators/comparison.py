"""Compare evaluations, with tests of significance.

Differences are paired by query. The p-value is that of a randomisation test, which swaps the two scores of each query
at random (Smucker, Allan and Carterette, 2007, A Comparison of Statistical Significance Tests for Information Retrieval
Evaluation), the interval a bootstrap over queries, both by scipy. Over several collections each counts the same, and
the p-values of single collections are adjusted by Holm's method.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from evaluators.evaluation import UNKNOWN_PRECISION, CollectionResult, Evaluation, EvaluationError, pooled_label
from evaluators.metrics import Metric, mean_scores

if TYPE_CHECKING:
    import pandas


RESAMPLES = 10_000
MEMORY = 4_000_000  # resampled values held at once
CONFIDENCE = 0.95
OVERALL = "mean"


@dataclass(frozen=True)
class QueryChange:
    """A query's score in both evaluations."""

    query_id: str
    before: float
    after: float

    @property
    def difference(self) -> float:
        """The gain."""
        return self.after - self.before


@dataclass(frozen=True)
class Difference:
    """The difference of two evaluations on one collection, or overall.

    Attributes:
        key: The collection, or ``"mean"``.
        queries: The number of compared queries.
        before, after: The mean scores.
        low, high: The 95 % interval of the difference.
        p: Of the randomisation test, two-sided.
        p_adjusted: The same by Holm's method over the collections; for the mean, ``p``.
        wins, ties, losses: The number of queries that gained, stayed and lost.
    """

    key: str
    queries: int
    before: float
    after: float
    low: float
    high: float
    p: float
    p_adjusted: float
    wins: int
    ties: int
    losses: int

    @property
    def difference(self) -> float:
        """The mean gain."""
        return self.after - self.before

    @property
    def is_mean(self) -> bool:
        """Whether this is the mean over collections."""
        return self.key == OVERALL


@dataclass(frozen=True)
class Comparison:
    """Two evaluations side by side.

    Attributes:
        before, after: The names of the models.
        metric: The compared metric.
        pooled: Whether the figures are over pools, not whole corpora.
        precisions: The precisions of both models; see :attr:`Evaluation.precision`.
        differences: One for each collection, and last, if there are several, their mean.
        changes: Collection key to every query's change, most gained first.
    """

    before: str
    after: str
    metric: str
    pooled: bool
    differences: list[Difference]
    changes: dict[str, list[QueryChange]]
    precisions: tuple[str | None, str | None] = (None, None)

    @property
    def precision_note(self) -> str | None:
        """A note on a comparison across precisions; None if both are known to be the same."""
        before, after = self.precisions
        if before is None or after is None or (before == after and UNKNOWN_PRECISION not in before):
            return None
        return (
            f"precision of the models' computation: {before} before, {after} after. A difference in the third digit "
            "can come from that alone; evaluate both with the same --encode-dtype"
        )

    def to_dict(self, *, queries: int | None = None) -> dict[str, Any]:
        """For JSON; with at most so many of each collection's queries that gained most and that lost most."""
        return {
            "before": self.before,
            "after": self.after,
            "metric": self.metric,
            "pooled": self.pooled,
            "precisions": {"before": self.precisions[0], "after": self.precisions[1], "note": self.precision_note},
            "differences": [{**asdict(found), "difference": found.difference} for found in self.differences],
            "changes": {
                key: [{**asdict(c), "difference": c.difference} for c in most_changed(changes, queries)]
                for key, changes in self.changes.items()
            },
        }


def most_changed(changes: Sequence[QueryChange], number: int | None) -> list[QueryChange]:
    """The queries that gained most and then those that lost most, at most ``number`` each; None for all."""
    if number is None:
        return list(changes)
    gained = [change for change in changes[:number] if change.difference > 0]
    lost = [change for change in changes[::-1][:number] if change.difference < 0]
    return gained + lost


def compare(before: Evaluation, after: Evaluation, metric: str | None = None, *, seed: int = 0) -> Comparison:
    """Compare two evaluations of the same queries.

    Args:
        before: The evaluation to compare with.
        after: The other one.
        metric: The metric, such as ``"ndcg@10"``. None: the first evaluation's primary metric.
        seed: The seed of the resampling.

    Raises:
        EvaluationError: Collections, queries or judgments differ, only one of them is over a pool, or one lacks the
            metric; the message says what differs.
        ValueError: The metric is unknown.
    """
    metric = before.metrics[0] if metric is None else Metric.parse(metric).name
    require_same(before, after, metric)
    samples: dict[str, np.ndarray] = {}
    changes: dict[str, list[QueryChange]] = {}
    for key in before.results:
        old, new = before.query_scores[key], after.query_scores[key]
        found = [QueryChange(query_id, old[query_id][metric], new[query_id][metric]) for query_id in old]
        samples[key] = np.array([change.difference for change in found])
        changes[key] = sorted(found, key=lambda change: (-change.difference, change.query_id))
    ps = {key: p_value([sample], seed) for key, sample in samples.items()}
    adjusted = holm(ps)
    differences = [_difference(key, [changes[key]], [samples[key]], ps[key], adjusted[key], seed) for key in samples]
    if len(samples) > 1:
        p = p_value(list(samples.values()), seed)
        differences.append(_difference(OVERALL, list(changes.values()), list(samples.values()), p, p, seed))
    precisions = before.precision, after.precision
    return Comparison(before.model, after.model, metric, before.pooled, differences, changes, precisions)


def p_value(samples: Sequence[np.ndarray], seed: int) -> float:
    """The two-sided p-value of the mean difference under random swaps of each query's two scores.

    Args:
        samples: The differences of each collection's queries. Each collection has the same weight.
        seed: The seed of the swaps; with few queries all of them are tried.
    """
    from scipy.stats import permutation_test

    weighted = np.concatenate([sample / (len(sample) * len(samples)) for sample in samples])
    weighted = weighted[weighted != 0]  # a tie is the same whichever way it is swapped
    if len(weighted) < 2:
        return 1.0  # one difference is as large either way
    found = permutation_test(
        (weighted,),
        # Sums that differ only by rounding count as equal; for tiny differences scipy's tolerance is too small.
        lambda values, axis: np.round(np.sum(values, axis=axis), 12),
        permutation_type="samples",
        n_resamples=RESAMPLES - 1,
        vectorized=True,
        batch=max(1, MEMORY // len(weighted)),
        rng=np.random.default_rng(seed),
    )
    return float(found.pvalue)


def interval(samples: Sequence[np.ndarray], seed: int) -> tuple[float, float]:
    """The 95 % bootstrap interval of the mean over collections of their mean over queries.

    Args:
        samples: The values of each collection's queries, which are resampled within it.
        seed: The random seed.
    """
    generator = np.random.default_rng(seed)
    means = np.zeros(RESAMPLES)
    for sample in samples:
        if (sample == sample[0]).all():
            means += sample[0] / len(samples)
            continue
        means += _resampled_means(sample, generator) / len(samples)
    tail = (1 - CONFIDENCE) / 2
    low, high = np.quantile(means, [tail, 1 - tail])
    return float(low), float(high)


def _resampled_means(sample: np.ndarray, generator: np.random.Generator) -> np.ndarray:
    """Means of bootstrap samples, by scipy."""
    from scipy.stats import bootstrap

    found = bootstrap(
        (sample,),
        np.mean,
        n_resamples=RESAMPLES,
        vectorized=True,
        batch=max(1, MEMORY // len(sample)),
        method="percentile",
        rng=generator,
    )
    return np.asarray(found.bootstrap_distribution)


def holm(ps: dict[str, float]) -> dict[str, float]:
    """Holm's adjustment (1979) of p-values, which controls the family-wise error rate."""
    adjusted: dict[str, float] = {}
    largest = 0.0
    for rank, key in enumerate(sorted(ps, key=lambda key: ps[key])):
        largest = max(largest, min(1.0, ps[key] * (len(ps) - rank)))
        adjusted[key] = largest
    return adjusted


def _difference(
    key: str,
    changes: Sequence[Sequence[QueryChange]],
    samples: Sequence[np.ndarray],
    p: float,
    p_adjusted: float,
    seed: int,
) -> Difference:
    low, high = interval(samples, seed)
    every = np.concatenate(samples)
    return Difference(
        key=key,
        queries=len(every),
        before=float(np.mean([np.mean([change.before for change in part]) for part in changes])),
        after=float(np.mean([np.mean([change.after for change in part]) for part in changes])),
        low=low,
        high=high,
        p=p,
        p_adjusted=p_adjusted,
        wins=int((every > 0).sum()),
        ties=int((every == 0).sum()),
        losses=int((every < 0).sum()),
    )


def require_same(before: Evaluation, after: Evaluation, metric: str) -> None:
    """Require evaluations of the same collections, queries and judgments.

    Raises:
        EvaluationError: Collections, queries, judgments or documents differ, or one lacks the metric.
    """
    for evaluation in (before, after):
        if metric not in evaluation.metrics:
            raise EvaluationError(
                f"{evaluation.path} has no {metric}; it has {', '.join(evaluation.metrics)}. Evaluate with "
                f"--metric {metric}, or compare by another"
            )
    if before.results.keys() != after.results.keys():
        only = [
            f"{one.path} has {', '.join(sorted(one.results.keys() - other.results.keys()))}"
            for one, other in ((before, after), (after, before))
            if one.results.keys() - other.results.keys()
        ]
        raise EvaluationError(f"the collections differ: only {' and only '.join(only)}")
    for key, old in before.results.items():
        new = after.results[key]
        if reason := _in_what_they_differ(old, new, before, after, key):
            raise EvaluationError(f"{key} cannot be compared: {reason}")


def _in_what_they_differ(
    old: CollectionResult, new: CollectionResult, before: Evaluation, after: Evaluation, key: str
) -> str | None:
    if (old.pooled is None) != (new.pooled is None) or old.pooled != new.pooled:
        described = [
            f"{one.path} is over {result.pooled or 'the whole corpus'}" for one, result in ((before, old), (after, new))
        ]
        return f"{' and '.join(described)}; figures over a pool are only comparable with those over the same pool"
    first, second = before.query_scores[key].keys(), after.query_scores[key].keys()
    if first != second:
        missing = sorted(first - second)[:3] + sorted(second - first)[:3]
        return (
            f"{len(first - second)} queries are only in {before.path} and {len(second - first)} only in {after.path}, "
            f"such as {', '.join(missing)}"
        )
    if old.judgments != new.judgments:
        return f"the queries are the same, but not their judgments ({old.source} and {new.source})"
    if None not in (old.documents, new.documents) and old.documents != new.documents:
        return f"one searched {old.documents:,} documents and the other {new.documents:,}"
    return None


Format = Literal["table", "latex", "csv", "json"]
FORMATS: tuple[Format, ...] = ("table", "latex", "csv", "json")
QUERIES_SHOWN = 10


def scores_table(evaluation: Evaluation) -> pandas.DataFrame:
    """A row for each collection and, of several, one for their mean; a column for each metric."""
    import pandas

    rows = {result.label: result.scores for result in evaluation.results.values()}
    if len(rows) > 1:
        rows = {pooled_label(OVERALL) if evaluation.pooled else OVERALL: mean_scores(rows.values()), **rows}
    frame = pandas.DataFrame(rows).T
    frame.index.name = "collection"
    return frame


def comparison_table(comparisons: Sequence[Comparison]) -> pandas.DataFrame:
    """A row for each collection and for the mean, of each comparison."""
    import pandas

    rows = [
        {
            "before": comparison.before,
            "after": comparison.after,
            "collection": pooled_label(found.key) if comparison.pooled else found.key,
            "queries": found.queries,
            f"{comparison.metric} before": found.before,
            f"{comparison.metric} after": found.after,
            "difference": found.difference,
            "95% low": found.low,
            "95% high": found.high,
            "p": found.p,
            "p (Holm)": found.p_adjusted,
            "wins": found.wins,
            "ties": found.ties,
            "losses": found.losses,
            "precision before": comparison.precisions[0],
            "precision after": comparison.precisions[1],
        }
        for comparison in comparisons
        for found in comparison.differences
    ]
    return pandas.DataFrame(rows)


def to_latex(frame: pandas.DataFrame, *, index: bool) -> str:
    """As a LaTeX table with booktabs rules."""
    return frame.to_latex(index=index, float_format="%.4f", escape=True)


def comparisons_text(comparisons: Sequence[Comparison], kind: Format) -> str:
    """Comparisons as LaTeX, CSV or JSON (with the queries that changed most)."""
    if kind == "json":
        content = [comparison.to_dict(queries=QUERIES_SHOWN) for comparison in comparisons]
        return json.dumps(content, indent=1, ensure_ascii=False)
    frame = comparison_table(comparisons)
    if kind == "csv":
        return frame.to_csv(index=False)
    notes = "".join(f"% {found.after}: {found.precision_note}\n" for found in comparisons if found.precision_note)
    return notes + to_latex(frame.drop(columns=["precision before", "precision after"]), index=False)
