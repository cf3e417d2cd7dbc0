"""Weights between a base's and a fine-tuned model's."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sentence_transformers import SentenceTransformer

import st_clp
from st_clp.mining import Negative, TrainingRow
from st_clp.options import EvaluationOptions
from st_clp.run.averaging import WeightAverage, best_share, choose_share, hold_out

TEXTS = ["a cat on the river", "the king", "which lake is in the north", "red green blue"]
SHARES = (0.0, 0.25, 0.5, 0.75, 1.0)
OPTIONS = EvaluationOptions(encode_dtype="model", write_csv=False)


def moved(model: SentenceTransformer, size: float = 0.1) -> SentenceTransformer:
    """The model with every weight moved a little, as by training."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += size * torch.randn(parameter.shape, generator=generator)
    return model


def weights(model: SentenceTransformer) -> dict[str, torch.Tensor]:
    return {name: value.detach().clone() for name, value in model.named_parameters()}


@pytest.mark.parametrize("experts", [0, 3])
def test_both_ends_are_the_models_themselves_to_the_bit(tiny_model: SentenceTransformer, experts: int) -> None:
    base = copy.deepcopy(tiny_model)
    model = moved(st_clp.upcycle(tiny_model, experts) if experts else tiny_model)
    trained, embedded = weights(model), model.encode(TEXTS)
    averaging = WeightAverage(model, base)
    averaging.set(0)
    dense = {name: value for name, value in weights(base).items() if name in trained}
    assert dense
    assert all(torch.equal(value, weights(model)[name]) for name, value in dense.items())
    np.testing.assert_allclose(model.encode(TEXTS), base.encode(TEXTS), atol=1e-6 if experts else 0)
    averaging.set(0.3)
    averaging.set(1)
    assert all(torch.equal(value, trained[name]) for name, value in weights(model).items())
    np.testing.assert_array_equal(model.encode(TEXTS), embedded)


def test_each_expert_is_averaged_with_the_dense_weights_it_came_from(tiny_model: SentenceTransformer) -> None:
    base = copy.deepcopy(tiny_model)
    dense = base[0].model.encoder.layer[1].intermediate.dense.weight.detach()
    model = moved(st_clp.upcycle(tiny_model, 2))
    layer = model[0].model.encoder.layer[1].intermediate.dense
    trained = [expert.weight.detach().clone() for expert in layer.experts]
    router = layer.gate.weight.detach().clone()
    assert st_clp.average(model, base, 0.25) is model
    for expert, own in zip(layer.experts, trained, strict=True):
        torch.testing.assert_close(expert.weight.detach(), 0.75 * dense + 0.25 * own)
    assert torch.equal(layer.gate.weight.detach(), router)
    assert torch.equal(base[0].model.encoder.layer[1].intermediate.dense.weight.detach(), dense)


def test_what_cannot_be_averaged_is_refused(tiny_model: SentenceTransformer) -> None:
    with pytest.raises(ValueError, match=r"share must be from 0 to 1, got 1\.5"):
        st_clp.average(moved(copy.deepcopy(tiny_model)), tiny_model, 1.5)
    smaller = copy.deepcopy(tiny_model)
    del smaller[0].model.encoder.layer[1]
    with pytest.raises(ValueError, match=r"encoder\.layer\.1\..* has no counterpart in the base"):
        st_clp.average(tiny_model, smaller, 0.5)


def rows_of(number: int = 40) -> list[TrainingRow]:
    words = "river lake mountain city country money bank language people capital red blue".split()

    def text(i: int) -> str:
        return f"the {words[i % 12]} of {words[(i * 5 + 1) % 12]} {i}"

    def negatives(i: int) -> tuple[Negative, ...]:
        return tuple(Negative(f"d{j}", text(j), 1, 0.5, "ranking") for j in ((i + 7) % number, (i + 13) % number))

    return [
        TrainingRow(f"q{i}", f"which {words[i % 12]} {i}", f"d{i}", text(i), 0.5, negatives(i)) for i in range(number)
    ]


def test_queries_that_are_held_out_are_trained_on_in_no_row() -> None:
    rows = rows_of(40)
    rows += [TrainingRow(row.query_id, row.query, f"{row.positive_id}b", "another", 0.1) for row in rows]
    trained_on, held_out = hold_out(rows, seed=1)
    assert len({row.query_id for row in held_out}) == 4
    assert len(held_out) == 8
    assert not {row.query_id for row in held_out} & {row.query_id for row in trained_on}
    assert len(trained_on) + len(held_out) == len(rows)
    assert hold_out(rows, seed=1) == (trained_on, held_out)
    assert hold_out(rows_of(9), seed=1)[1] == []


@pytest.mark.parametrize("size", [0.01, 3.0])
def test_the_share_is_none_below_the_base_on_what_was_held_out(tiny_model: SentenceTransformer, size: float) -> None:
    base = copy.deepcopy(tiny_model)
    model = moved(tiny_model, size)
    trained_on, held_out = hold_out(rows_of(100), seed=0)
    averaging = WeightAverage(model, base)
    chosen = choose_share(model, averaging, {"a": held_out}, {"a": trained_on}, OPTIONS)
    assert {0.0, 1.0, chosen.share} <= set(chosen.scores) <= set(SHARES)
    assert chosen.scores[chosen.share] >= chosen.scores[0]
    assert chosen.queries == 10
    if size > 1:
        assert chosen.share < 1  # such weights are noise
        assert chosen.scores[1] < chosen.scores[0]
    expected = st_clp.average(moved(copy.deepcopy(base), size), base, chosen.share)
    np.testing.assert_array_equal(model.encode(TEXTS), expected.encode(TEXTS))


@pytest.mark.parametrize(
    ("scores", "share"),
    [
        # A good base: a half, whatever these queries prefer, but not if that is below the base.
        ([0.80, 0.82, 0.829, 0.83, 0.829], 0.5),
        ([0.80, 0.82, 0.79, 0.85, 0.86], 0.75),
        ([0.80, 0.79, 0.78, 0.70, 0.60], 0.0),
        ([0.80, 0.795, 0.798, 0.801, 0.802], 0.75),
        # A weak one: the best share, but not all of the trained weights.
        ([0.445, 0.632, 0.644, 0.649, 0.645], 0.75),
        ([0.445, 0.632, 0.649, 0.60, 0.60], 0.5),
        ([0.596, 0.671, 0.747, 0.783, 0.804], 0.75),
        ([0.048, 0.265, 0.377, 0.407, 0.409], 0.75),
        # All of them from a base that knows nothing, where three quarters cost more than little.
        ([0.112, 0.236, 0.432, 0.476, 0.504], 1.0),
        ([0.445, 0.50, 0.55, 0.60, 0.65], 1.0),
        # All of them after all, where a mean of both loses more than a straight line would.
        ([0.40, 0.40, 0.41, 0.54, 0.60], 1.0),
        ([0.40, 0.30, 0.20, 0.30, 0.60], 1.0),
    ],
)
def test_the_share_that_is_used(scores: list[float], share: float) -> None:
    asked: list[float] = []

    def score(share: float) -> float:
        asked.append(share)
        return scores[SHARES.index(share)]

    assert best_share(score) == share
    if share == 0.5 and scores[-1] - scores[0] < 0.1:
        assert set(asked) == {0.0, 0.5, 1.0}  # each costs an evaluation


@settings(max_examples=200, deadline=None)
@given(st.lists(st.floats(0, 1), min_size=5, max_size=5))
def test_a_share_is_never_below_the_base_nor_from_a_weak_one_keeps_less_than_three_quarters_of_the_gain(
    values: list[float],
) -> None:
    scores = dict(zip(SHARES, values, strict=True))
    share = best_share(scores.__getitem__)
    assert scores[share] >= scores[0.0]
    if scores[1.0] - scores[0.0] < 0.1:
        assert all(abs(other - 0.5) >= abs(share - 0.5) for other in SHARES if scores[other] >= scores[0.0])
    else:
        assert scores[share] - scores[0.0] >= 0.75 * (max(values) - scores[0.0]) - 1e-12
        keeps = 0.75 if scores[0.0] >= 0.5 else 0.95
        assert share < 1 or scores[0.75] - scores[0.0] < keeps * (scores[1.0] - scores[0.0]) + 1e-12


def test_without_queries_to_hold_out_half_of_both_is_taken_and_said(
    tiny_model: SentenceTransformer, caplog: pytest.LogCaptureFixture
) -> None:
    averaging = WeightAverage(moved(tiny_model), copy.deepcopy(tiny_model))
    chosen = choose_share(tiny_model, averaging, {"a": []}, {"a": rows_of(5)}, OPTIONS)
    assert (chosen.share, chosen.queries) == (0.5, 0)
    assert "too few training queries" in caplog.text
    assert "50% of the weights are the trained ones" in str(chosen)
