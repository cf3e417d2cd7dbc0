"""Retrieval metrics by trec_eval's definitions, computed by pytrec_eval, for each query and on average.

The pytrec_eval call is the one that ``beir.retrieval.evaluation.EvaluateRetrieval.evaluate`` makes. That function keeps
no scores of single queries and rounds its means to five digits, and later comparisons need both in full, so the means
are taken here; rounded to five digits they are beir's.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence
from statistics import fmean
from typing import NamedTuple

from st_clp.data.checks import require_scorable_ids
from st_clp.extras import import_package
from st_clp.options import DEFAULT_METRICS

# Our names to trec_eval's measures. All but the last are cut at k by trec_eval itself.
TREC_MEASURES = {"ndcg": "ndcg_cut", "recall": "recall", "map": "map_cut", "precision": "P", "mrr": "recip_rank"}
ALIASES = {"p": "precision"}

Judgments = Mapping[str, Mapping[str, int]]
QueryScores = dict[str, dict[str, float]]


class Metric(NamedTuple):
    """A metric and its cut-off, such as nDCG@10.

    - ``ndcg``: gains are the grades themselves, discounted by log2(rank + 1) (Järvelin and Kekäläinen, 2002).
    - ``recall``: relevant documents among the first k, out of all relevant ones.
    - ``map``: average precision over the first k, divided by the number of all relevant documents.
    - ``precision``: relevant documents among the first k, divided by k.
    - ``mrr``: 1 / rank of the first relevant document if that is within the first k, otherwise 0. It is trec_eval's
      recip_rank cut at k, so that ties are ordered as for the other metrics; ``beir``'s own ``mrr`` leaves them in the
      order of the run's dictionary.

    Relevant means a grade above 0. Documents with equal scores are ordered by descending document id, as in trec_eval.
    """

    family: str
    k: int

    @property
    def name(self) -> str:
        """The name, such as ``"ndcg@10"``."""
        return f"{self.family}@{self.k}"

    @classmethod
    def parse(cls, text: str) -> Metric:
        """Read ``"ndcg@10"``; capitals do not matter.

        Raises:
            ValueError: An unknown metric, no cut-off, or one below 1.
        """
        family, _, cut = text.strip().lower().partition("@")
        family = ALIASES.get(family, family)
        if family not in TREC_MEASURES:
            known = ", ".join(f"{name}@k" for name in TREC_MEASURES)
            raise ValueError(f"unknown metric {text!r}; known are {known}, such as ndcg@10")
        try:
            k = int(cut)
        except ValueError:
            raise ValueError(f"the metric {text!r} needs a whole number after the @, such as {family}@10") from None
        if k < 1:
            raise ValueError(f"the metric {text!r} has a cut-off below 1; the first rank is 1")
        return cls(family, k)

    @property
    def trec_measure(self) -> str:
        """The name of pytrec_eval's measure."""
        measure = TREC_MEASURES[self.family]
        return measure if self.family == "mrr" else f"{measure}.{self.k}"

    def read(self, scores: Mapping[str, float]) -> float:
        """Read this metric from pytrec_eval's scores of one query."""
        value = scores[self.trec_measure.replace(".", "_")]
        # recip_rank is 1 / rank exactly as the division gives it, so the comparison is one of ranks.
        return 0.0 if self.family == "mrr" and value < 1 / self.k else value


def parse_metrics(names: Iterable[str]) -> tuple[Metric, ...]:
    """Parse metric names, in order, without duplicates.

    Raises:
        ValueError: No metric, or one that :meth:`Metric.parse` refuses.
    """
    if isinstance(names, str):
        raise ValueError(f"metrics must be a list of names, got the text {names!r}; write [{names!r}]")
    metrics = tuple(dict.fromkeys(Metric.parse(name) for name in names))
    if not metrics:
        raise ValueError(f"name at least one metric, such as {DEFAULT_METRICS[0]}")
    return metrics


def score_queries(
    judgments: Judgments, run: Mapping[str, Mapping[str, float]], metrics: Sequence[Metric]
) -> QueryScores:
    """Compute the metrics of every judged query.

    Args:
        judgments: Query id to {document id: grade}.
        run: Query id to {document id: score}; the order does not matter.
        metrics: What to compute.

    Returns:
        Query id to {metric name: value}, for every query that has judgments. A query without a relevant document
        scores 0, as in trec_eval; one that the run does not answer scores 0, as with trec_eval's option ``-c``.

    Raises:
        CollectionError: An id holds half a character or a null character, which pytrec_eval cannot take.
    """
    pytrec_eval = import_package("pytrec_eval", "evaluating", "beir")
    require_scorable_ids(itertools.chain(judgments, run), "query")
    require_scorable_ids(itertools.chain.from_iterable([*judgments.values(), *run.values()]), "document")
    evaluator = pytrec_eval.RelevanceEvaluator(judgments, {metric.trec_measure for metric in metrics})
    found = evaluator.evaluate(run)
    return {
        query_id: {metric.name: metric.read(found[query_id]) if query_id in found else 0.0 for metric in metrics}
        for query_id, grades in judgments.items()
        if grades
    }


def mean_scores(scores: Iterable[Mapping[str, float]]) -> dict[str, float]:
    """The mean of each metric over queries, or over collections."""
    rows = list(scores)
    return {name: fmean(row[name] for row in rows) for name in rows[0]}
