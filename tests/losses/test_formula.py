"""The loss against its formula, written out pair by pair, and against what has to follow from the formula."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss
from sentence_transformers.util import cos_sim, dot_score, euclidean_sim
from torch import Tensor

from st_clp.losses import CachedCLPLoss, CLPLoss

SCALE, PENALTY_WEIGHT = 3.0, 0.3
PENALTIES = ["cosine", "contrastive"]
few = settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@dataclass
class Rows:
    """A batch of text numbers: anchors, documents and negative queries never share one; documents may repeat."""

    table: Tensor
    anchors: list[int]
    documents: list[list[int]]  # for each row, the positive and then the negatives
    queries: list[list[int]]  # for each row, m for each negative
    weights: list[list[float]]
    m: int

    @property
    def columns(self) -> list[list[int]]:
        rows = [[a, *d, *q] for a, d, q in zip(self.anchors, self.documents, self.queries, strict=True)]
        return [list(column) for column in zip(*rows, strict=True)]

    @property
    def labels(self) -> Tensor:
        return torch.tensor(self.weights, dtype=torch.float64).reshape(len(self.anchors), -1)

    def take(self, rows: list[int]) -> Rows:
        fields = (self.anchors, self.documents, self.queries, self.weights)
        anchors, documents, queries, weights = ([field[row] for row in rows] for field in fields)
        return Rows(self.table, anchors, documents, queries, weights, self.m)


@st.composite
def batches(draw: st.DrawFn, negatives: int = 3, queries: int = 2, repeats: bool = True) -> Rows:
    size, n, m = draw(st.integers(1, 4)), draw(st.integers(1, negatives)), draw(st.integers(1, queries))
    count = size * (1 + n)
    documents = draw(st.lists(st.integers(0, count - 1), min_size=count, max_size=count)) if repeats else range(count)
    table = torch.randn(
        count + size * (1 + n * m), 4, generator=torch.Generator().manual_seed(draw(st.integers(0, 99)))
    )
    weight = st.sampled_from([0.0, 0.25, 0.7, 1.0])
    return Rows(
        table=table.double(),
        anchors=list(range(count, count + size)),
        documents=[list(documents[row * (1 + n) : (row + 1) * (1 + n)]) for row in range(size)],
        queries=[list(range(count + size + row * n * m, count + size + (row + 1) * n * m)) for row in range(size)],
        weights=[draw(st.lists(weight, min_size=n * m, max_size=n * m)) for _ in range(size)],
        m=m,
    )


def by_hand(rows: Rows, table: Tensor, *, in_batch: bool, penalty: str, similarity: Any) -> Tensor:
    """The loss as the documentation writes it, one pair of texts at a time."""

    def sim(a: int, b: int) -> Tensor:
        return similarity(table[a][None], table[b][None])[0, 0]

    def cosine(a: int, b: int) -> Tensor:
        return torch.dot(table[a], table[b]) / table[a].norm() / table[b].norm()

    def find(query: int, row: int, column: int) -> Tensor:
        """Cross-entropy of a query over documents[row][column] and every candidate with another text."""
        target = rows.documents[row][column]
        total = torch.exp(SCALE * sim(query, target))
        for other_row, documents in enumerate(rows.documents):
            for document in documents:
                if (in_batch or other_row == row) and document != target:
                    total = total + torch.exp(SCALE * sim(query, document))
        return torch.log(total) - SCALE * sim(query, target)

    contrastive = sum((find(anchor, row, 0) for row, anchor in enumerate(rows.anchors)), torch.tensor(0.0))
    held, weight_sum = torch.tensor(0.0, dtype=table.dtype), 0.0
    for row, queries in enumerate(rows.queries):
        for index, query in enumerate(queries):
            column = 1 + index // rows.m
            term = (
                find(query, row, column) if penalty == "contrastive" else 1 - cosine(query, rows.documents[row][column])
            )
            held = held + rows.weights[row][index] * term
            weight_sum += rows.weights[row][index]
    mean = held / weight_sum if weight_sum else torch.tensor(0.0)
    return (1 - PENALTY_WEIGHT) * contrastive / len(rows.anchors) + PENALTY_WEIGHT * mean


@pytest.mark.parametrize("loss_class", [CLPLoss, CachedCLPLoss])
@pytest.mark.parametrize("penalty", PENALTIES)
@given(rows=batches(), in_batch=st.booleans(), similarity=st.sampled_from([cos_sim, dot_score, euclidean_sim, "own"]))
@few
def test_equals_the_formula_pair_by_pair(
    rows: Rows,
    in_batch: bool,
    similarity: Any,
    penalty: str,
    loss_class: Any,
    lookup_model: Any,
    run_loss: Any,
    assert_close: Any,
) -> None:
    if similarity == "own":  # a function that sentence-transformers does not have

        def similarity(a: Tensor, b: Tensor) -> Tensor:
            return torch.tanh(a @ b.T)

    table = rows.table.clone().requires_grad_()
    expected = by_hand(rows, table, in_batch=in_batch, penalty=penalty, similarity=similarity)
    expected.backward()
    loss = loss_class(
        lookup_model(rows.table),
        scale=SCALE,
        penalty_weight=PENALTY_WEIGHT,
        penalty=penalty,
        queries_per_negative=rows.m,
        in_batch_negatives=in_batch,
        similarity_fct=similarity,
        **({"mini_batch_size": 2} if loss_class is CachedCLPLoss else {}),
    )

    value, gradients = run_loss(loss, rows.columns, rows.labels)

    assert_close(value, expected.detach(), rtol=1e-10, atol=1e-10)
    assert_close(gradients.reshape(table.shape), table.grad, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("penalty", PENALTIES)
@given(rows=batches(), data=st.data(), in_batch=st.booleans())
@few
def test_the_order_of_rows_does_not_matter(
    rows: Rows, data: Any, in_batch: bool, penalty: str, lookup_model: Any, run_loss: Any
) -> None:
    order = data.draw(st.permutations(range(len(rows.anchors))))
    loss = CLPLoss(lookup_model(rows.table), penalty=penalty, queries_per_negative=rows.m, in_batch_negatives=in_batch)
    shuffled = rows.take(list(order))

    value, gradients = run_loss(loss, rows.columns, rows.labels)
    other_value, other_gradients = run_loss(loss, shuffled.columns, shuffled.labels)

    torch.testing.assert_close(value, other_value)
    torch.testing.assert_close(gradients, other_gradients)


@pytest.mark.parametrize("penalty", PENALTIES)
@given(rows=batches(queries=1))
@few
def test_a_query_of_weight_0_counts_like_no_query(rows: Rows, penalty: str, lookup_model: Any, run_loss: Any) -> None:
    model = lookup_model(rows.table)
    settings_ = {"penalty": penalty, "scale": SCALE}
    # A second query for each negative, borrowed from the documents, at weight 0.
    extra = Rows(rows.table, rows.anchors, rows.documents, [], [], m=2)
    extra.queries = [[x for q in queries for x in (q, 0)] for queries in rows.queries]
    extra.weights = [[x for weight in weights for x in (weight, 0.0)] for weights in rows.weights]

    one = run_loss(CLPLoss(model, **settings_), rows.columns, rows.labels)
    two = run_loss(CLPLoss(model, queries_per_negative=2, **settings_), extra.columns, extra.labels)

    torch.testing.assert_close(one, two)


@given(rows=batches(repeats=False))
@few
def test_penalty_weight_0_is_multiple_negatives_ranking_loss(
    rows: Rows, lookup_model: Any, run_loss: Any, assert_close: Any
) -> None:
    model = lookup_model(rows.table)
    documents_only = rows.columns[: 1 + len(rows.documents[0])]

    expected = run_loss(MultipleNegativesRankingLoss(model, scale=50.0), documents_only)

    for loss_class in (CLPLoss, CachedCLPLoss):
        loss = loss_class(model, penalty_weight=0.0, queries_per_negative=rows.m)
        assert_close(run_loss(loss, rows.columns, rows.labels), expected)
        without_queries = loss_class(model, penalty_weight=0.4, queries_per_negative=0)
        assert_close(run_loss(without_queries, documents_only), expected)
        pairs = run_loss(loss_class(model, penalty_weight=0.4, queries_per_negative=rows.m), documents_only[:2])
        assert_close(pairs, run_loss(MultipleNegativesRankingLoss(model, scale=50.0), documents_only[:2]))


@pytest.mark.parametrize("penalty", PENALTIES)
@given(rows=batches())
@few
def test_rows_kept_apart_are_the_mean_of_batches_of_one(
    rows: Rows, penalty: str, lookup_model: Any, run_loss: Any
) -> None:
    loss = CLPLoss(lookup_model(rows.table), penalty=penalty, queries_per_negative=rows.m, in_batch_negatives=False)

    value, gradients = run_loss(loss, rows.columns)
    alone = [run_loss(loss, rows.take([row]).columns) for row in range(len(rows.anchors))]

    torch.testing.assert_close(value, torch.stack([one for one, _ in alone]).mean())
    torch.testing.assert_close(gradients, torch.stack([one for _, one in alone]).mean(dim=0))


def test_penalty_weight_1_is_the_penalty_alone(lookup_model: Any, run_loss: Any) -> None:
    table = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.6, 0.8], [0.8, 0.6]], dtype=torch.float64)
    value, gradients = run_loss(CLPLoss(lookup_model(table), penalty_weight=1.0), [[0], [1], [2], [3]])
    assert value.item() == pytest.approx(1 - 0.96)
    assert not gradients.reshape(4, 2)[:2].any()
