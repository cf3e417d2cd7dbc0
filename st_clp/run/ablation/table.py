"""The table of an ablation: scores over seeds, with intervals and tests of their differences."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass

import numpy as np

from evaluators.comparison import CONFIDENCE, OVERALL, holm, p_value, require_same
from evaluators.evaluation import Evaluation
from st_clp.run.ablation.variants import BASE
from st_clp.terminal import duration, size

METRIC = "ndcg@10"
REFERENCE = "ance"  # what variants are tested against, besides the base
RESAMPLES = 2000


@dataclass(frozen=True)
class Cell:
    """A variant trained with one seed; with the seconds of training and the GPU's peak memory."""

    learning_rate: float
    share: float
    held_out: float | None
    steps: int
    seconds: float
    peak_memory: int | None


@dataclass(frozen=True)
class Gain:
    """The gain of one row over another on a collection, or on the mean of all.

    Attributes:
        difference: The mean over seeds and queries.
        low, high: Its 95 % bootstrap interval, over queries and seeds.
        p: Of a paired randomisation test of the queries' means over seeds, two-sided.
        p_adjusted: The same by Holm's method over the collections; of the mean, ``p``.
    """

    difference: float
    low: float
    high: float
    p: float
    p_adjusted: float


@dataclass(frozen=True)
class Row:
    """A variant.

    Attributes:
        name: Its name.
        scores: Collection to its nDCG@10, the mean over seeds.
        spread: Collection to the standard deviation over seeds; 0 with one seed.
        cells: One for each seed; none for the base.
        over_base, over_reference: Collection, or ``"mean"`` for that over all that were trained on, to the gain; empty
            for the row itself.
        unseen: The gains over the base on collections that were not trained on, and on their mean.
    """

    name: str
    scores: Mapping[str, float]
    spread: Mapping[str, float]
    cells: Sequence[Cell]
    over_base: Mapping[str, Gain]
    over_reference: Mapping[str, Gain]
    unseen: Mapping[str, Gain]


@dataclass(frozen=True)
class AblationTable:
    """All rows, the base first.

    Attributes:
        rows: The rows.
        collections: The collections that were trained on, by the evaluations' names.
        reference: The row that all are compared with besides the base; None if there is none.
    """

    rows: Sequence[Row]
    collections: Sequence[str]
    reference: str | None

    def lines(self) -> list[dict[str, str]]:
        """The table as text: for each row, heading to cell."""
        return [self._line(row) for row in self.rows]

    def _line(self, row: Row) -> dict[str, str]:
        line = {"variant": row.name}
        for name in self.collections:
            spread = f" ± {100 * row.spread[name]:.1f}" if len(row.cells) > 1 else ""
            line[name] = f"{100 * row.scores[name]:.2f}{spread}"
        line["mean"] = f"{100 * np.mean([row.scores[name] for name in self.collections]):.2f}"
        line["over base"] = _gain(row.over_base)
        if self.reference is not None:
            line[f"over {self.reference}"] = _gain(row.over_reference)
        if any(other.unseen for other in self.rows):
            line["unseen over base"] = _gain(row.unseen)
        rates = sorted({f"{cell.learning_rate:g}" for cell in row.cells})
        line["learning rate"] = ", ".join(rates)
        shares = sorted({f"{cell.share:g}" for cell in row.cells if cell.share != 1})
        if any(cell.share != 1 for other in self.rows for cell in other.cells):
            line["share"] = ", ".join(shares)
        line["training"] = duration(float(np.mean([cell.seconds for cell in row.cells]))) if row.cells else ""
        if any(cell.peak_memory for other in self.rows for cell in other.cells):
            line["memory"] = size(max(cell.peak_memory or 0 for cell in row.cells)) if row.cells else ""
        return line

    def markdown(self) -> str:
        """The table in Markdown, with a legend."""
        lines = self.lines()
        head = list(lines[0])
        rows = [head, ["---"] * len(head), *([line[name] for name in head] for line in lines)]
        table = "\n".join(f"| {' | '.join(row)} |" for row in rows)
        return f"{table}\n\n{self.legend()}\n"

    def legend(self) -> str:
        """The legend."""
        seeds = max((len(row.cells) for row in self.rows), default=0)
        return (
            f"nDCG@10 in points, the mean over {seeds} seeds (± their standard deviation); differences with their 95 % "
            "interval over queries and seeds, and the p-value of a paired randomisation test. Learning rates were "
            "chosen on training queries held out, among the same for every row."
        )

    def json(self) -> str:
        """Everything, as JSON."""
        content = {
            "metric": METRIC,
            "collections": list(self.collections),
            "reference": self.reference,
            "rows": [asdict(row) for row in self.rows],
        }
        return json.dumps(content, indent=1, ensure_ascii=False)

    def latex(self) -> str:
        """The table in LaTeX, with booktabs rules."""
        import pandas

        frame = pandas.DataFrame(self.lines())
        return f"% {self.legend()}\n" + frame.to_latex(index=False, escape=True)


def make_table(
    evaluations: Mapping[str, Sequence[Evaluation]],
    cells: Mapping[str, Sequence[Cell]],
    *,
    unseen: Sequence[str] = (),
    seed: int = 0,
) -> AblationTable:
    """Make the table from evaluations.

    Args:
        evaluations: Row to its evaluations, one for each seed; a single one for the base, which comes first.
        cells: Row to the cell of each of these.
        unseen: The collections that were not trained on.
        seed: The seed of the resampling.

    Raises:
        EvaluationError: Evaluations have different queries, judgments or documents.
    """
    (base,) = evaluations[BASE]
    for found in evaluations.values():
        for other in found:
            if other is not base:
                require_same(base, other, METRIC)
    scores = {name: [_scores(found) for found in several] for name, several in evaluations.items()}
    trained_on = [name for name in base.results if name not in unseen]
    reference = REFERENCE if REFERENCE in evaluations else None
    rows = []
    for name, own in scores.items():
        means = {key: [float(found[key].mean()) for found in own] for key in base.results}
        gains = {
            "over_base": {} if name == BASE else _gains(own, scores[BASE], trained_on, seed),
            "over_reference": {}
            if reference is None or name == reference
            else _gains(own, scores[reference], trained_on, seed),
            "unseen": {} if name == BASE or not unseen else _gains(own, scores[BASE], list(unseen), seed),
        }
        spread = {key: float(np.std(found, ddof=1)) if len(found) > 1 else 0.0 for key, found in means.items()}
        average = {key: float(np.mean(found)) for key, found in means.items()}
        rows.append(Row(name, average, spread, list(cells.get(name, ())), **gains))
    return AblationTable(rows, trained_on, reference)


def _scores(found: Evaluation) -> dict[str, np.ndarray]:
    """Collection to (queries,), in the order of their ids."""
    return {
        key: np.array([queries[query_id][METRIC] for query_id in sorted(queries)])
        for key, queries in found.query_scores.items()
    }


def _gains(
    own: Sequence[Mapping[str, np.ndarray]],
    other: Sequence[Mapping[str, np.ndarray]],
    collections: Sequence[str],
    seed: int,
) -> dict[str, Gain]:
    """The gains of one row over another, by collection and for ``"mean"``."""
    pairs = max(len(own), len(other))
    # Seeds are paired; the base, which was not trained, is paired with each of them.
    differences = {
        key: np.stack([own[place % len(own)][key] - other[place % len(other)][key] for place in range(pairs)])
        for key in collections
    }
    means = {key: found.mean(axis=0) for key, found in differences.items()}
    ps = {key: p_value([found], seed) for key, found in means.items()}
    adjusted = holm(ps)
    gains = {
        key: Gain(float(found.mean()), *_interval([found], seed), ps[key], adjusted[key])
        for key, found in differences.items()
    }
    if len(collections) > 1:
        p = p_value(list(means.values()), seed)
        mean = float(np.mean([gain.difference for gain in gains.values()]))
        gains[OVERALL] = Gain(mean, *_interval(list(differences.values()), seed), p, p)
    return gains


def _interval(differences: Sequence[np.ndarray], seed: int) -> tuple[float, float]:
    """The 95 % bootstrap interval of the mean over collections, resampling queries and seeds.

    Args:
        differences: (seeds, queries) of each collection.
        seed: The random seed.
    """
    generator = np.random.default_rng(seed)
    seeds = len(differences[0])
    drawn = generator.multinomial(seeds, [1 / seeds] * seeds, size=RESAMPLES) / seeds
    means = np.zeros(RESAMPLES)
    for found in differences:
        queries = found.shape[1]
        weights = generator.multinomial(queries, [1 / queries] * queries, size=RESAMPLES) / queries
        means += ((weights @ found.T) * drawn).sum(axis=1) / len(differences)
    tail = (1 - CONFIDENCE) / 2
    low, high = np.quantile(means, [tail, 1 - tail])
    return float(low), float(high)


def _gain(gains: Mapping[str, Gain]) -> str:
    """The gain of the mean, or of the only collection, as text: ``"+1.23 [0.40, 2.10], p 0.012"``."""
    if not gains:
        return ""
    gain = gains.get(OVERALL) or next(iter(gains.values()))
    return f"{100 * gain.difference:+.2f} [{100 * gain.low:.2f}, {100 * gain.high:.2f}], p {_p(gain.p)}"


def _p(p: float) -> str:
    return "< 0.001" if p < 0.001 else f"{p:.3f}"
