"""Weights between a base model's and those that training made of them.

A mean of both is often better than either, on what was trained on and on everything else: weight-space ensembling
(Wortsman et al. 2022, arXiv:2109.01903), model soups (Wortsman et al. 2022, arXiv:2203.05482), and for text embeddings
LM-Cocktail (Xiao et al. 2023, arXiv:2311.13534).
"""

from __future__ import annotations

import logging
import random
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from sentence_transformers import SentenceTransformer
from torch import Tensor, nn

from evaluators import CollectionEvaluator
from st_clp.data import Collection
from st_clp.mining.rows import TrainingRow
from st_clp.options import EvaluationOptions
from st_clp.queries.own_text import is_made

logger = logging.getLogger(__name__)

SHARES = (0.0, 0.25, 0.5, 0.75, 1.0)
HELD_OUT, MOST_HELD_OUT = 0.1, 100  # of each collection's training queries
DOCUMENTS = 4000  # that the queries held out are tried on
METRIC = "ndcg@10"
FAR_ABOVE = 0.1  # of nDCG@10: the gain from which on a base counts as weak
_EXPERT = re.compile(r"\.experts\.\d+\.")


def average(model: SentenceTransformer, base: SentenceTransformer, share: float) -> SentenceTransformer:
    """Put every weight of a fine-tuned model between the base's and its own, in place, and return the model.

    Args:
        model: The fine-tuned model; a mixture of experts too, each of whose experts is averaged with the dense weights
            that it came from.
        base: The model that it was made of; it stays as it is.
        share: How much of the fine-tuned weights: 0 gives the base's, 1 leaves all as it is.

    Raises:
        ValueError: The share is not from 0 to 1, or a weight of the model has no counterpart in the base.
    """
    WeightAverage(model, base).set(share)
    return model


class WeightAverage:
    """A model whose weights can be set to any mean of its trained and a base's weights.

    Args:
        model: The fine-tuned model.
        base: The model that it was made of.

    Raises:
        ValueError: A weight of the model has no counterpart in the base.
    """

    def __init__(self, model: nn.Module, base: nn.Module) -> None:
        theirs = dict(base.named_parameters())
        self._changed: list[tuple[nn.Parameter, Tensor, Tensor]] = []
        for name, parameter in model.named_parameters():
            counterpart = theirs.get(name, theirs.get(_EXPERT.sub(".", name)))
            if counterpart is None and name.endswith(".gate.weight"):
                continue  # a router: where all experts are the dense layer, it does not matter what it says
            if counterpart is None or counterpart.shape != parameter.shape:
                raise ValueError(
                    f"the weight {name} has no counterpart in the base, or one of another shape: give the model that "
                    "this one was made of"
                )
            before = counterpart.detach().to(device=parameter.device, dtype=parameter.dtype)
            if not torch.equal(before, parameter.detach()):
                self._changed.append((parameter, before, parameter.detach().clone()))

    @torch.no_grad()
    def set(self, share: float) -> None:
        """Set this share of the trained weights, from 0 to 1; both ends are exact to the bit."""
        if not 0 <= share <= 1:
            raise ValueError(f"share must be from 0 to 1, got {share}")
        for parameter, before, after in self._changed:
            if share in (0, 1):
                parameter.copy_(after if share else before)
            else:
                parameter.copy_(torch.lerp(before.float(), after.float(), share))


@dataclass(frozen=True)
class ChosenShare:
    """A share and why.

    Attributes:
        share: How much of the trained weights.
        scores: Share to the mean nDCG@10 on the queries held out; empty where the share was given.
        queries: How many these were.
        alike: The shares whose scores these queries cannot tell from the best.
    """

    share: float
    scores: Mapping[float, float]
    queries: int
    alike: tuple[float, ...] = ()

    def __str__(self) -> str:
        if not self.scores:
            return f"averaged with the base: {self.share:.0%} of the weights are the trained ones"
        found = ", ".join(f"{share:.0%} {score:.4f}" for share, score in self.scores.items())
        others = [f"{share:.0%}" for share in self.alike if share != self.share]
        alike = f"{', '.join(others)} cannot be told from it; " if others and self.share in self.alike else ""
        if self.share not in self.alike:
            alike = "other queries than these gain most by a mean of both; "
        kept = (
            "training gained nothing there, and the base's weights are kept"
            if self.share == 0
            else f"{alike}{self.share:.0%} is taken" + ("" if self.share == 1 else ", the rest is the base's")
        )
        return f"nDCG@10 on {self.queries} training queries held out, by share of the trained weights: {found}; {kept}"

    def to_dict(self) -> dict[str, Any]:
        """For a report."""
        scores = {f"{share:g}": round(score, 6) for share, score in self.scores.items()}
        return {"share": self.share, "scores": scores, "queries": self.queries, "alike": list(self.alike)}


def number_held_out(queries: int) -> int:
    """Of so many training queries of a collection, how many a share is chosen by."""
    return min(MOST_HELD_OUT, int(queries * HELD_OUT))


def hold_out(rows: Sequence[TrainingRow], seed: int) -> tuple[list[TrainingRow], list[TrainingRow]]:
    """(the rows to train on, those of the queries to choose a share by).

    A tenth of the queries is held out, 100 at most; none where there are fewer than ten. Queries made of sentences are
    trained on in any case: the others are those that users ask.
    """
    queries = sorted({row.query_id for row in rows if not is_made(row.query_id)})
    held = set(random.Random(seed).sample(queries, number_held_out(len(queries))))
    return [row for row in rows if row.query_id not in held], [row for row in rows if row.query_id in held]


def choose_share(
    model: SentenceTransformer,
    averaging: WeightAverage,
    held_out: Mapping[str, Sequence[TrainingRow]],
    trained_on: Mapping[str, Sequence[TrainingRow]],
    options: EvaluationOptions,
) -> ChosenShare:
    """Try shares on rows that were not trained on, and set the model to the one that :func:`best_share` names.

    Each query ranks some thousand documents: the positives and negatives of its collection's rows, so that it takes a
    small part of an evaluation. Those of rows that were trained on are among them, because a query's own negatives are
    what the base ranks too high, and by them alone any change would look like a gain. A share of 0 is tried too: the
    result is never worse there than the base.

    Args:
        model: The fine-tuned model.
        averaging: Its weights and the base's.
        held_out: Collection name to the rows that were not trained on.
        trained_on: The same for the others.
        options: How to encode.
    """
    evaluators = evaluators_of(held_out, trained_on, options)
    queries = sum(len(evaluator.collection.queries) for evaluator in evaluators)
    if not evaluators:
        logger.warning("too few training queries to hold any out: the mean of base and trained weights is taken")
        averaging.set(0.5)
        return ChosenShare(0.5, {}, 0)
    found: dict[float, list[np.ndarray]] = {}
    for share in SHARES:
        averaging.set(share)
        for evaluator in evaluators:
            evaluator.evaluate(model)
        found[share] = [np.array([each[METRIC] for each in one.query_scores.values()]) for one in evaluators]
    share, alike = best_share(found)
    averaging.set(share)
    return ChosenShare(share, {share: _mean(scores) for share, scores in found.items()}, queries, alike)


def best_share(found: Mapping[float, Sequence[np.ndarray]]) -> tuple[float, tuple[float, ...]]:
    """(the share to take, the shares that the scores cannot tell from the best).

    No share below the base's score is taken. Of the others, the nearest to a half: queries that were held out ask for
    the same documents as those trained on, and so find more of the trained weights good than other queries do. Where
    all trained weights are far above the base, 0.1 and more, the nearest to three quarters, of the shares that are
    alike the best: those whose mean lies within one standard error of the paired difference (the rule of one standard
    error: Breiman et al. 1984, Classification and Regression Trees). ``benchmarks/recipe.md`` has the trainings that
    this is taken from.

    Args:
        found: Share to the scores of each collection's queries, the same queries for each share.
    """
    means = {share: _mean(scores) for share, scores in found.items()}
    best = max(means, key=lambda share: (means[share], -abs(share - 0.5)))
    alike = tuple(
        share
        for share in found
        if means[best] - means[share] <= _standard_error(found[best], found[share]) and means[share] >= means[0.0]
    )
    if means[1.0] - means[0.0] >= FAR_ABOVE:
        return min(alike, key=lambda share: (abs(share - 0.75), -means[share])), alike
    above = [share for share in found if means[share] >= means[0.0]]
    return min(above, key=lambda share: (abs(share - 0.5), -means[share])), alike


def _mean(scores: Sequence[np.ndarray]) -> float:
    """The mean over collections, each of which counts the same."""
    return float(np.mean([one.mean() for one in scores]))


def _standard_error(scores: Sequence[np.ndarray], others: Sequence[np.ndarray]) -> float:
    """Of the difference of two means over collections, by the paired differences of their queries."""
    each = [(one - other).var(ddof=1) / len(one) for one, other in zip(scores, others, strict=True) if len(one) > 1]
    return float(np.sqrt(sum(each))) / len(scores)


def evaluators_of(
    held_out: Mapping[str, Sequence[TrainingRow]],
    trained_on: Mapping[str, Sequence[TrainingRow]],
    options: EvaluationOptions,
) -> list[CollectionEvaluator]:
    """Evaluators by nDCG@10 of the rows that were held out, one for each collection that has some."""
    return [
        CollectionEvaluator(_some_documents(name, rows, trained_on[name]), name, [METRIC], options=options)
        for name, rows in held_out.items()
        if rows
    ]


def _some_documents(name: str, rows: Sequence[TrainingRow], others: Sequence[TrainingRow]) -> Collection:
    """The queries of ``rows`` over all documents in them, and over as many of the others' as there is room for."""
    documents = _documents(rows)
    more = [pair for pair in _documents(others).items() if pair[0] not in documents]
    documents |= random.Random(0).sample(more, min(len(more), max(0, DOCUMENTS - len(documents))))
    judgments: dict[str, dict[str, int]] = {}
    for row in rows:
        judgments.setdefault(row.query_id, {})[row.positive_id] = 1
    return Collection.from_dict(documents, {row.query_id: row.query for row in rows}, judgments, name=name)


def _documents(rows: Sequence[TrainingRow]) -> dict[str, str]:
    positives = {row.positive_id: row.positive for row in rows}
    return positives | {negative.doc_id: negative.text for row in rows for negative in row.negatives}
