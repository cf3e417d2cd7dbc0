"""CachedCLPLoss gives CLPLoss's loss and gradients, in the memory of a mini-batch."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import pytest
import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.base.losses import column_merging_disabled
from sentence_transformers.base.losses.gradcache import _create_minibatch
from sentence_transformers.sentence_transformer.losses import MatryoshkaLoss

import st_clp
from st_clp.losses import CachedCLPLoss, CLPLoss
from st_clp.losses.objective import PENALTIES, penalty

SETTINGS: dict[str, dict[str, Any]] = {
    "cosine": {},
    "contrastive": {"penalty": "contrastive"},
    "rows apart": {"penalty": "contrastive", "in_batch_negatives": False},
    "margin": {"penalty": "contrastive", "margin": 0.01, "margin_strategy": "relative"},
    "joint directions": {"directions": ("query_to_doc", "query_to_query", "doc_to_query", "doc_to_doc"), "margin": 0.0},
    "symmetric": {
        "directions": ("query_to_doc", "doc_to_query"),
        "partition_mode": "per_direction",
        "hardness_mode": "all_negatives",
        "hardness_strength": 3.0,
    },
    "no penalty": {"penalty_weight": 0.0},
    "only penalty": {"penalty_weight": 1.0},
}
LABELS = torch.tensor([[1.0, 0.5], [1.0, 1.0], [1.0, 0.0], [0.3, 0.3], [1.0, 1.0]])


@pytest.mark.parametrize("mini_batch", [{"mini_batch_size": 2}, {"mini_batch_size": 3, "mini_batch_num_tokens": 20}])
@pytest.mark.parametrize("name", SETTINGS)
def test_equals_the_uncached_loss(
    name: str,
    mini_batch: dict[str, int],
    tiny_model: SentenceTransformer,
    columns: list[list[str]],
    run_loss: Any,
    assert_close: Any,
) -> None:
    tiny_model.double().train()
    columns = columns[:4] + columns[4:6]
    expected = run_loss(CLPLoss(tiny_model, **SETTINGS[name]), columns, LABELS)
    cached = run_loss(CachedCLPLoss(tiny_model, **mini_batch, **SETTINGS[name]), columns, LABELS)
    assert_close(cached, expected, rtol=1e-10, atol=1e-12)
    assert expected[1].abs().max() > 1e-4


@pytest.mark.parametrize("trained", [False, True])
def test_equals_the_uncached_loss_on_a_mixture(
    trained: bool, tiny_model: SentenceTransformer, columns: list[list[str]], run_loss: Any, assert_close: Any
) -> None:
    """The same tokens teach the router, however the batch is divided; at this scale nothing else would do."""
    model = st_clp.upcycle(tiny_model.double(), 3)
    if trained:  # its first step settles the balance, by the tokens of the first forward pass
        run_loss(CLPLoss(model.train()), columns[:4] + columns[4:6])
    expected = run_loss(CLPLoss(model, scale=1000.0), columns[:4] + columns[4:6])
    for size in (1, 2, 4):
        cached = run_loss(CachedCLPLoss(model, scale=1000.0, mini_batch_size=size), columns[:4] + columns[4:6])
        assert_close(cached, expected, rtol=1e-6, atol=1e-6)
    assert expected[1].abs().max() > 1


def test_pairs_and_several_queries_for_each_negative(
    tiny_model: SentenceTransformer, columns: list[list[str]], run_loss: Any, assert_close: Any
) -> None:
    tiny_model.double().train()
    for used, queries in ((columns[:2], 1), (columns[:4], 0), (columns, 2)):
        expected = run_loss(CLPLoss(tiny_model, queries_per_negative=queries), used)
        cached = run_loss(CachedCLPLoss(tiny_model, queries_per_negative=queries, mini_batch_size=2), used)
        assert_close(cached, expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("with_labels", [False, True])
def test_the_loss_of_embeddings_in_mini_batches(with_labels: bool, lookup_model: Any) -> None:
    """As sentence-transformers' own cached losses are called: the columns of the dataset, with labels or without."""
    draw = torch.Generator().manual_seed(0)
    embeddings = [torch.randn(5, 4, generator=draw).double().requires_grad_() for _ in range(6)]
    labels = torch.rand(5, 2, generator=draw) if with_labels else None
    loss = CachedCLPLoss(lookup_model(torch.eye(4)), mini_batch_size=2)
    expected = loss.compute_loss_from_embeddings(embeddings, labels)
    gradients = torch.autograd.grad(expected, embeddings)
    reps = [list(column.split(2)) for column in embeddings]
    torch.testing.assert_close(loss.calculate_loss(reps, labels), expected)
    total = loss.calculate_loss(reps, labels, with_backward=True)
    torch.testing.assert_close(total, expected.detach())
    torch.testing.assert_close([column.grad for column in embeddings], list(gradients))


@pytest.mark.parametrize("loss_class", [CLPLoss, CachedCLPLoss])
@pytest.mark.parametrize("penalty", ["cosine", "contrastive"])
def test_all_weights_0_leave_the_weighted_contrastive_term(
    penalty: str,
    loss_class: type[CLPLoss],
    tiny_model: SentenceTransformer,
    columns: list[list[str]],
    run_loss: Any,
    assert_close: Any,
) -> None:
    tiny_model.double().train()
    loss = loss_class(tiny_model, penalty=penalty, penalty_weight=0.25)
    value, gradients = run_loss(loss, columns[:6], torch.zeros(5, 2))
    plain_value, plain_gradients = run_loss(CLPLoss(tiny_model, queries_per_negative=0), columns[:4])
    assert_close(value, 0.75 * plain_value)
    assert_close(gradients, 0.75 * plain_gradients)


@pytest.mark.parametrize("loss_class", [CLPLoss, CachedCLPLoss])
@pytest.mark.parametrize("penalty", ["cosine", "contrastive"])
def test_an_empty_text_stands_for_a_query_that_is_not_known(
    penalty: str,
    loss_class: type[CLPLoss],
    tiny_model: SentenceTransformer,
    columns: list[list[str]],
    run_loss: Any,
    assert_close: Any,
) -> None:
    tiny_model.double().train()
    loss = loss_class(tiny_model, penalty=penalty, penalty_weight=0.5)
    # Three rows with one negative; only the first and the last have a query for it.
    rows = [column[:3] for column in (*columns[:3], columns[4])]
    labels = torch.tensor([[1.0], [0.0], [1.0]])
    empty = run_loss(loss, [*rows[:3], [rows[3][0], "", rows[3][2]]], labels)
    something = run_loss(loss, [*rows[:3], [rows[3][0], "which king was queen", rows[3][2]]], labels)
    assert_close(empty, something, rtol=1e-10, atol=1e-12)
    assert empty[1].isfinite().all()
    assert run_loss(loss, [*rows[:3], [rows[3][0], "", rows[3][2]]])[0] != empty[0]


@pytest.mark.parametrize("loss_class", [CLPLoss, CachedCLPLoss])
def test_another_penalty_is_one_function(
    loss_class: type[CLPLoss], lookup_model: Any, run_loss: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    # So that it is taken out again afterwards.
    monkeypatch.setitem(PENALTIES, "spread", PENALTIES["cosine"])

    @penalty("spread")
    def spread(batch: Any, rows: slice, options: Any) -> torch.Tensor:
        """The first number of each negative; the queries of the negatives are not read at all."""
        return batch.vectors.documents[1:, rows, 0].T

    table = torch.randn(8, 3, generator=torch.Generator().manual_seed(0)).double()
    loss = loss_class(lookup_model(table), penalty="spread", penalty_weight=1.0)
    value, gradients = run_loss(loss, [[0, 1], [2, 3], [4, 5], [6, 7]], torch.tensor([[1.0], [0.5]]))
    assert value.item() == pytest.approx(float(table[4, 0] + 0.5 * table[5, 0]) / 1.5)
    expected = torch.zeros_like(table)
    expected[4, 0], expected[5, 0] = 1 / 1.5, 0.5 / 1.5
    torch.testing.assert_close(gradients.reshape(8, 3), expected)


@pytest.mark.parametrize("mini_batch_size", [2, 5])
def test_dropout_is_the_same_in_both_passes(
    mini_batch_size: int,
    make_tiny_model: Callable[..., SentenceTransformer],
    columns: list[list[str]],
    run_loss: Any,
    assert_close: Any,
) -> None:
    model = make_tiny_model(dropout=0.3).double().train()
    settings = {"penalty": "contrastive", "penalty_weight": 0.5}
    torch.manual_seed(7)
    value, gradients = run_loss(CachedCLPLoss(model, mini_batch_size=mini_batch_size, **settings), columns[:6])

    # The same mini-batches in the same order with the graph kept: anchors, queries of negatives, then documents, the
    # texts of each by length where they are in several.
    model.zero_grad()
    features = [model.preprocess(column) for column in columns[:6]]
    lengths = [column["attention_mask"].sum(dim=1) * (mini_batch_size < 5) for column in features]
    orders = [of_column.argsort(stable=True) for of_column in lengths]
    features = [
        {name: value[order] if isinstance(value, torch.Tensor) else value for name, value in column.items()}
        for column, order in zip(features, orders, strict=True)
    ]
    embeddings: dict[int, torch.Tensor] = {}
    torch.manual_seed(7)
    for index in (0, 4, 5, 1, 2, 3):
        pieces = [
            _create_minibatch(features[index], begin, begin + mini_batch_size) for begin in range(0, 5, mini_batch_size)
        ]
        embeddings[index] = torch.cat([model(piece)["sentence_embedding"] for piece in pieces])[orders[index].argsort()]
    expected = CLPLoss(model, **settings).compute_loss_from_embeddings([embeddings[index] for index in range(6)])
    expected.backward()

    assert_close(value, expected.detach(), rtol=1e-10, atol=1e-12)
    expected_gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in model.parameters()]
    assert_close(gradients, torch.cat([g.flatten() for g in expected_gradients]), rtol=1e-10, atol=1e-12)
    # Dropout was on: another seed gives another loss.
    torch.manual_seed(8)
    assert run_loss(CachedCLPLoss(model, mini_batch_size=mini_batch_size, **settings), columns[:6])[0] != value


def test_whole_columns_with_dropout_equal_the_uncached_loss(
    make_tiny_model: Callable[..., SentenceTransformer], columns: list[list[str]], run_loss: Any, assert_close: Any
) -> None:
    model = make_tiny_model(dropout=0.3).double().train()
    torch.manual_seed(7)
    cached = run_loss(CachedCLPLoss(model, mini_batch_size=8), columns[:6])
    torch.manual_seed(7)
    with column_merging_disabled():
        uncached = run_loss(CLPLoss(model), columns[:6])
    assert_close(cached, uncached, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("penalty", ["cosine", "contrastive"])
def test_matryoshka_is_the_same_for_both(
    penalty: str, tiny_model: SentenceTransformer, columns: list[list[str]], run_loss: Any, assert_close: Any
) -> None:
    tiny_model.double().train()
    settings = {"penalty": penalty, "penalty_weight": 0.3}
    dims, weights = [32, 16, 8], [1.0, 0.5, 0.25]

    uncached = run_loss(MatryoshkaLoss(tiny_model, CLPLoss(tiny_model, **settings), dims, weights), columns[:6], LABELS)
    cached_loss = CachedCLPLoss(tiny_model, mini_batch_size=2, **settings)
    cached = run_loss(MatryoshkaLoss(tiny_model, cached_loss, dims, weights), columns[:6], LABELS)

    with torch.no_grad():
        full = [tiny_model(tiny_model.preprocess(column))["sentence_embedding"] for column in columns[:6]]
    by_hand = sum(
        weight * CLPLoss(tiny_model, **settings).compute_loss_from_embeddings([e[:, :dim] for e in full], LABELS)
        for dim, weight in zip(dims, weights, strict=True)
    )
    assert_close(uncached[0], by_hand)
    assert_close(cached, uncached, rtol=1e-9, atol=1e-12)


def test_matryoshka_with_all_weights_0(
    tiny_model: SentenceTransformer, columns: list[list[str]], run_loss: Any
) -> None:
    loss = MatryoshkaLoss(tiny_model, CachedCLPLoss(tiny_model, mini_batch_size=2), [32, 8])
    value, gradients = run_loss(loss, columns[:6], torch.zeros(5, 2))
    assert value.isfinite()
    assert gradients.isfinite().all()
    assert gradients.any()


def test_evaluation_needs_no_gradients(tiny_model: SentenceTransformer, columns: list[list[str]]) -> None:
    features = [tiny_model.preprocess(column) for column in columns[:6]]
    with torch.no_grad():
        cached = CachedCLPLoss(tiny_model, mini_batch_size=2)(features, LABELS)
        assert not cached.requires_grad
        torch.testing.assert_close(cached, CLPLoss(tiny_model)(features, LABELS))


def test_only_a_mini_batch_is_encoded_with_gradients_at_a_time(
    tiny_model: SentenceTransformer, columns: list[list[str]]
) -> None:
    sizes: list[tuple[bool, int]] = []
    tiny_model[0].register_forward_pre_hook(
        lambda module, inputs: sizes.append((torch.is_grad_enabled(), len(inputs[0]["input_ids"])))
    )
    loss = CachedCLPLoss(tiny_model, mini_batch_size=2)
    loss([tiny_model.preprocess(column) for column in columns[:6]], None).backward()
    assert max(size for _, size in sizes) == 2
    assert sum(size for with_gradient, size in sizes if with_gradient) == 30


def test_both_losses_take_the_same_settings() -> None:
    plain = inspect.signature(CLPLoss.__init__).parameters
    cached = inspect.signature(CachedCLPLoss.__init__).parameters
    own = {"mini_batch_size", "mini_batch_num_tokens", "show_progress_bar"}
    assert set(cached) - set(plain) == own
    assert all(cached[name].default == parameter.default for name, parameter in plain.items())
