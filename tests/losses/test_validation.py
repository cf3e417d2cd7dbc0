"""What the losses refuse, what they say then, and what they tell of themselves."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.util import dot_score

from st_clp.losses import CachedCLPLoss, CLPLoss
from st_clp.losses.columns import _warn_of_unread_labels

LOSSES = [CLPLoss, CachedCLPLoss]
NAN = float("nan")


@pytest.mark.parametrize("loss_class", LOSSES)
@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"scale": 0.0}, "scale must be a positive number.*got 0"),
        ({"scale": -1.0}, "scale"),
        ({"scale": NAN}, "scale"),
        ({"scale": float("inf")}, "scale"),
        ({"penalty_weight": -0.1}, "penalty_weight must be between 0 and 1, got -0.1"),
        ({"penalty_weight": 1.1}, "penalty_weight"),
        ({"penalty_weight": NAN}, "penalty_weight"),
        ({"penalty": "euclid"}, r"penalty must be one of \['contrastive', 'cosine'\], got 'euclid'"),
        ({"queries_per_negative": -1}, "queries_per_negative"),
        ({"queries_per_negative": 1.5}, "queries_per_negative"),
        ({"hardness_mode": "hard_negatives", "hardness_strength": -1.0}, "hardness_strength"),
        ({"hardness_mode": "hard"}, "hardness_mode"),
        ({"directions": ("doc_to_query",)}, "query_to_doc"),
        ({"directions": ("query_to_doc", "sideways")}, "sideways"),
        ({"partition_mode": "both"}, "partition_mode"),
        ({"directions": ("query_to_doc", "doc_to_doc"), "partition_mode": "per_direction"}, "per_direction"),
        ({"directions": ("query_to_doc", "doc_to_query"), "in_batch_negatives": False}, "in_batch_negatives=False"),
        (
            {"hardness_mode": "in_batch_negatives", "hardness_strength": 1.0, "in_batch_negatives": False},
            "hardness_mode",
        ),
        ({"margin": NAN}, "margin"),
        ({"margin": 0.1, "margin_strategy": "percent"}, "margin_strategy"),
    ],
)
def test_bad_settings_are_refused_by_name(
    settings: dict[str, Any], message: str, loss_class: type[CLPLoss], tiny_model: SentenceTransformer
) -> None:
    with pytest.raises(ValueError, match=message):
        loss_class(tiny_model, **settings)


@pytest.mark.parametrize("setting", [{"mini_batch_size": 0}, {"mini_batch_num_tokens": 0}])
def test_bad_mini_batches_are_refused(setting: dict[str, int], tiny_model: SentenceTransformer) -> None:
    with pytest.raises(ValueError, match=next(iter(setting))):
        CachedCLPLoss(tiny_model, **setting)  # type: ignore[arg-type]


def test_the_model_is_not_its_own_guide(tiny_model: SentenceTransformer) -> None:
    with pytest.raises(ValueError, match="guide is the model that is trained"):
        CLPLoss(tiny_model, guide=tiny_model)
    assert tiny_model.training


@pytest.mark.parametrize("loss_class", LOSSES)
@pytest.mark.parametrize(
    ("count", "queries", "expected"),
    [(1, 1, "2, 4, 6, 8"), (3, 1, "2, 4, 6, 8"), (5, 1, "2, 4, 6, 8"), (6, 2, "2, 5, 8, 11"), (1, 0, "2, 3, 4, 5")],
)
def test_columns_that_cannot_be_split(
    count: int, queries: int, expected: str, loss_class: type[CLPLoss], lookup_model: Any, run_loss: Any
) -> None:
    loss = loss_class(lookup_model(torch.eye(8)), queries_per_negative=queries)
    with pytest.raises(ValueError, match=rf"got {count} columns.*queries_per_negative={queries}.*{expected}"):
        run_loss(loss, [[column] for column in range(count)])


@pytest.mark.parametrize("loss_class", LOSSES)
@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (torch.ones(2, 3), r"shape \(2, 2\).*2 rows, 2 negatives with 1 queries each.*shape \(2, 3\)"),
        (torch.ones(1, 2), r"shape \(2, 2\)"),
        (torch.ones(2), r"shape \(2, 2\)"),
        (torch.zeros(2), r"shape \(2, 2\)"),
        (torch.tensor([0, 1]), r"shape \(2, 2\)"),
        (torch.tensor([[0.0, 1.0], [1.0, NAN]]), "between 0"),
        (torch.tensor([[0.0, 1.0], [1.0, 1.5]]), "between 0.0 and 1.5"),
        (torch.tensor([[0.0, 1.0], [1.0, -0.5]]), "between -0.5 and 1.0"),
    ],
)
def test_bad_labels(
    labels: torch.Tensor, message: str, loss_class: type[CLPLoss], lookup_model: Any, run_loss: Any
) -> None:
    columns = [[i, i + 1] for i in range(0, 12, 2)]
    with pytest.raises(ValueError, match=message):
        run_loss(loss_class(lookup_model(torch.eye(12))), columns, labels)


@pytest.mark.parametrize("labels", [torch.tensor([1.0, 0.5]), torch.tensor([3, 4]), torch.ones(2, 3)])
@pytest.mark.parametrize("loss_class", LOSSES)
def test_a_left_over_label_or_score_is_ignored_where_nothing_can_be_weighed(
    labels: torch.Tensor, loss_class: type[CLPLoss], lookup_model: Any, run_loss: Any, caplog: pytest.LogCaptureFixture
) -> None:
    model = lookup_model(torch.randn(8, 4, generator=torch.Generator().manual_seed(0)))
    _warn_of_unread_labels.cache_clear()
    for _ in range(2):
        torch.testing.assert_close(
            run_loss(loss_class(model), [[0, 1], [2, 3]], labels), run_loss(loss_class(model), [[0, 1], [2, 3]])
        )
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "remove_columns" in caplog.text
    columns = [[0, 1], [2, 3], [4, 5], [6, 7]]  # with negatives, but no penalty that would read a weight
    without = loss_class(model, penalty_weight=0.0)
    torch.testing.assert_close(run_loss(without, columns, labels), run_loss(without, columns))
    with pytest.raises(ValueError, match=r"remove_columns\('label'\)"):
        run_loss(loss_class(model), columns, labels)


def test_labels_may_be_whole_numbers_or_truth_values(lookup_model: Any, run_loss: Any) -> None:
    loss = CLPLoss(lookup_model(torch.randn(8, 4, generator=torch.Generator().manual_seed(0))))
    columns, weights = [[0, 1], [2, 3], [4, 5], [6, 7]], torch.tensor([[1.0], [0.0]])
    expected = run_loss(loss, columns, weights)
    torch.testing.assert_close(run_loss(loss, columns, weights.long()), expected)
    torch.testing.assert_close(run_loss(loss, columns, weights.bool()), expected)
    assert expected[0] != run_loss(loss, columns)[0]


@pytest.mark.parametrize("value", [NAN, float("inf")])
@pytest.mark.parametrize("loss_class", LOSSES)
@pytest.mark.parametrize(
    ("column", "name"),
    [(0, "anchor"), (1, "positive"), (3, "negative 2"), (5, "query 2 of negative 1"), (6, "query 1 of negative 2")],
)
def test_embeddings_that_are_not_finite_are_named(
    column: int, name: str, value: float, loss_class: type[CLPLoss], lookup_model: Any, run_loss: Any
) -> None:
    table = torch.randn(16, 4, generator=torch.Generator().manual_seed(0))
    table[2 * column + 1] = value
    columns = [[2 * i, 2 * i + 1] for i in range(8)]
    settings: dict[str, Any] = {"queries_per_negative": 2, "check_finite": True}
    with pytest.raises(ValueError, match=rf"1 of 2 embeddings of the column '{name}' .*row 1"):
        run_loss(loss_class(lookup_model(table), **settings), columns)
    without_check, _ = run_loss(loss_class(lookup_model(table), queries_per_negative=2), columns)
    assert not without_check.isfinite()


@pytest.mark.parametrize("loss_class", LOSSES)
def test_config_temperature_and_citation(
    loss_class: type[CLPLoss], tiny_model: SentenceTransformer, make_tiny_model: Callable[..., SentenceTransformer]
) -> None:
    guide = make_tiny_model(seed=1)
    loss = loss_class(tiny_model, 20.0, 0.3, penalty="contrastive", guide=guide, similarity_fct=dot_score)
    config = loss.get_config_dict()
    assert config["scale"] == 20
    assert config["penalty_weight"] == 0.3
    assert config["penalty"] == "contrastive"
    assert config["similarity_fct"] == "dot_score"
    assert config["guide"] is guide
    assert config["margin"] == 0.0
    assert ("mini_batch_size" in config) == (loss_class is CachedCLPLoss)
    assert loss.temperature == pytest.approx(0.05)
    assert "2412.17364" in loss.citation
    assert ("2101.06983" in loss.citation) == (loss_class is CachedCLPLoss)
    # A loss made from its own description is the same loss.
    again = {**config, "similarity_fct": dot_score}
    assert loss_class(tiny_model, **again).get_config_dict() == config


def test_settings_may_change_while_training(lookup_model: Any, run_loss: Any) -> None:
    model = lookup_model(torch.randn(8, 4, generator=torch.Generator().manual_seed(0)))
    columns = [[0, 1], [2, 3], [4, 5], [6, 7]]
    for loss_class in LOSSES:
        loss = loss_class(model)
        loss.scale, loss.penalty_weight, loss.penalty = 5.0, 0.6, "contrastive"
        fresh = loss_class(model, 5.0, 0.6, penalty="contrastive")
        torch.testing.assert_close(run_loss(loss, columns), run_loss(fresh, columns))


@pytest.mark.gpu
def test_on_a_gpu_wrong_labels_are_named_a_step_later(tiny_model: SentenceTransformer) -> None:
    """The host does not wait for the device to see them; the batch after is refused for the one before."""
    model = tiny_model.to("cuda")
    loss = CLPLoss(model)
    embeddings = [torch.randn(2, 32, device="cuda", requires_grad=True) for _ in range(4)]
    loss.compute_loss_from_embeddings(embeddings, torch.tensor([[0.0], [1.5]], device="cuda"))
    with pytest.raises(ValueError, match=r"batch before this one lie between 0\.0 and 1\.5"):
        loss.compute_loss_from_embeddings(embeddings, torch.tensor([[0.0], [1.0]], device="cuda"))
