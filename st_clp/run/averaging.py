"""Average the weights of a fine-tuned model and its base.

The average is often better than either, on the trained task and on others: weight-space ensembling (Wortsman et al.
2022, arXiv:2109.01903), model soups (Wortsman et al. 2022, arXiv:2203.05482), and for text embeddings LM-Cocktail (Xiao
et al. 2023, arXiv:2311.13534).
"""

from __future__ import annotations

import logging
import random
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean as mean
from typing import Any

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
MOST = 0.75  # of the trained weights
KNOWS = 0.5  # nDCG@10 of a base that knows the language and the field somewhat
ALL_BUT = 0.95  # of the gain that three quarters of the weights must keep where it does not
_EXPERT = re.compile(r"\.experts\.\d+\.")


def average(model: SentenceTransformer, base: SentenceTransformer, share: float) -> SentenceTransformer:
    """Average the weights of a fine-tuned model with its base's, in place, and return the model.

    Args:
        model: The fine-tuned model; a mixture of experts too, each of whose experts is averaged with the dense weights
            that it came from.
        base: The model that it was fine-tuned from; it is not changed.
        share: The share of the fine-tuned weights: 0 gives the base's, 1 changes nothing.

    Raises:
        ValueError: The share is not from 0 to 1, or a weight of the model has no counterpart in the base.
    """
    WeightAverage(model, base).set(share)
    return model


class WeightAverage:
    """A model whose weights can be set to any average of its trained and its base's weights.

    Args:
        model: The fine-tuned model.
        base: The model that it was fine-tuned from.

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
    """The chosen share, and why.

    Attributes:
        share: The share of the trained weights.
        scores: Share to the mean nDCG@10 on the held-out queries; empty if the share was given.
        queries: The number of held-out queries.
    """

    share: float
    scores: Mapping[float, float]
    queries: int

    def __str__(self) -> str:
        if not self.scores:
            return f"averaged with the base: {self.share:.0%} of the weights are the trained ones"
        found = ", ".join(f"{share:.0%} {score:.4f}" for share, score in self.scores.items())
        if self.share == 0:
            kept = "training gained nothing there, so the base's weights are kept"
        else:
            better = "; queries for other documents gain more by it" if self._is_below_best() else ""
            kept = f"{self.share:.0%} is used" + ("" if self.share == 1 else f", the rest is the base's{better}")
        return f"nDCG@10 on {self.queries} held-out training queries, by share of the trained weights: {found}; {kept}"

    def _is_below_best(self) -> bool:
        return self.scores[self.share] < max(self.scores.values())

    def to_dict(self) -> dict[str, Any]:
        """For a report."""
        scores = {f"{share:g}": round(score, 6) for share, score in self.scores.items()}
        return {"share": self.share, "scores": scores, "queries": self.queries}


def number_held_out(queries: int) -> int:
    """The number of a collection's training queries that are held out to choose a share."""
    return min(MOST_HELD_OUT, int(queries * HELD_OUT))


def hold_out(rows: Sequence[TrainingRow], seed: int) -> tuple[list[TrainingRow], list[TrainingRow]]:
    """Split into (the rows to train on, the rows of queries held out to choose a share).

    A tenth of the queries is held out, 100 at most; none if there are fewer than ten. Queries made of sentences are
    always trained on: the others are what users ask.
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
    """Try shares on held-out rows, and set the model to the one that :func:`best_share` returns.

    Each query ranks some thousand documents, the positives and negatives of its collection's rows, which takes a small
    part of the time of an evaluation. Documents of rows that were trained on are among them: a query's own negatives
    are what the base ranks too high, so with them alone any change would look like a gain. A share of 0 is tried too,
    so on these queries the result is never worse than the base.

    Args:
        model: The fine-tuned model.
        averaging: Its weights and the base's.
        held_out: Collection name to the held-out rows.
        trained_on: The same for the rows that were trained on.
        options: How to encode.
    """
    evaluators = evaluators_of(held_out, trained_on, options)
    queries = sum(len(evaluator.collection.queries) for evaluator in evaluators)
    if not evaluators:
        logger.warning("too few training queries to hold any out: the mean of base and trained weights is taken")
        averaging.set(0.5)
        return ChosenShare(0.5, {}, 0)
    scores: dict[float, float] = {}

    def score(share: float) -> float:
        if share not in scores:
            averaging.set(share)
            # Every collection counts the same, however many of its queries were held out.
            scores[share] = mean(evaluator.evaluate(model)[METRIC] for evaluator in evaluators)
        return scores[share]

    share = best_share(score)
    averaging.set(share)
    return ChosenShare(share, dict(sorted(scores.items())), queries)


def best_share(score: Callable[[float], float]) -> float:
    """Choose the share to use; never one that scores below the base.

    Held-out queries ask for documents that were trained on, so they overrate the trained weights
    (``benchmarks/recipe.md``). From a good base, the share nearest to a half is used, among those that do not score
    below the base. Where training gains :data:`FAR_ABOVE` or more, the share that scores best is used, but three
    quarters in place of all trained weights, unless that costs more than a quarter of the gain (as it would on a
    straight line between the two), or a twentieth of it from a base that scores below :data:`KNOWS` and so has little
    to keep.

    Args:
        score: Returns the mean score of a share from 0 to 1 on the held-out queries. Each call costs an evaluation, so
            it is called for as few shares as possible.
    """

    def gain(share: float) -> float:
        return score(share) - score(0.0)

    if gain(1.0) >= FAR_ABOVE:
        best = max(SHARES, key=lambda share: (gain(share), -share))
        keeps = MOST if score(0.0) >= KNOWS else ALL_BUT
        return MOST if best > MOST and gain(MOST) >= keeps * gain(best) else best
    for alike in ((0.5,), (0.25, 0.75), (1.0,)):  # the nearest to a half first
        if fit := [share for share in alike if gain(share) >= 0]:
            return max(fit, key=gain)
    return 0.0


def evaluators_of(
    held_out: Mapping[str, Sequence[TrainingRow]],
    trained_on: Mapping[str, Sequence[TrainingRow]],
    options: EvaluationOptions,
) -> list[CollectionEvaluator]:
    """Evaluators by nDCG@10 of the held-out rows, one for each collection that has any."""
    return [
        CollectionEvaluator(_some_documents(name, rows, trained_on[name]), name, [METRIC], options=options)
        for name, rows in held_out.items()
        if rows
    ]


def _some_documents(name: str, rows: Sequence[TrainingRow], others: Sequence[TrainingRow]) -> Collection:
    """The queries of ``rows`` over all their documents, and as many of the others' as there is room for."""
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
