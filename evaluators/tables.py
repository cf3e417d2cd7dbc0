"""Evaluations and comparisons as tables: for the terminal, LaTeX, CSV and JSON."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

from evaluators.comparison import OVERALL, Comparison
from evaluators.evaluation import Evaluation, pooled_label
from evaluators.metrics import mean_scores

if TYPE_CHECKING:
    import pandas

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
    """Comparisons as LaTeX, CSV or JSON; in JSON with the queries that changed most."""
    if kind == "json":
        content = [comparison.to_dict(queries=QUERIES_SHOWN) for comparison in comparisons]
        return json.dumps(content, indent=1, ensure_ascii=False)
    frame = comparison_table(comparisons)
    if kind == "csv":
        return frame.to_csv(index=False)
    notes = "".join(f"% {found.after}: {found.precision_note}\n" for found in comparisons if found.precision_note)
    return notes + to_latex(frame.drop(columns=["precision before", "precision after"]), index=False)
