"""Routing: who is routed and counted, what the router learns from, and how use is kept even."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.losses import (
    CachedMultipleNegativesRankingLoss,
    MultipleNegativesRankingLoss,
)
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import st_clp
from st_clp import CachedCLPLoss, CLPLoss
from st_clp.moe import MoESettings, expert_usage, reset_usage
from st_clp.moe.balance import move
from st_clp.moe.context import ForwardContext, entered
from st_clp.moe.precise import PreciseLinear, inner_products
from st_clp.moe.products import GroupedLinear, slices
from st_clp.moe.routing import Router

TEXTS = ["a cat on the river", "the king", "what is the capital of a country", "red green blue " * 8]
OTHERS = ["the king cat", "a river", "red", "blue flower"]


def features(model: SentenceTransformer) -> list[dict[str, Any]]:
    return [model.preprocess(TEXTS), model.preprocess(OTHERS)]


def tokens_in(columns: Iterable[dict[str, Any]]) -> int:
    return sum(int(column["attention_mask"].sum()) for column in columns)


def counts(model: SentenceTransformer) -> list[list[int]]:
    return [layer.tokens for layer in expert_usage(model).layers]


def gates(model: SentenceTransformer) -> dict[str, nn.Parameter]:
    return {name: value for name, value in model.named_parameters() if name.endswith("gate.weight")}


def biases(model: SentenceTransformer) -> list[torch.Tensor]:
    return [value.clone() for name, value in model.named_buffers() if name.endswith("balance_bias")]


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 70), st.sampled_from([torch.bfloat16, torch.float16, torch.float32]), st.integers(0, 100))
def test_the_router_computes_in_float32_whatever_the_tokens_are(tokens: int, dtype: torch.dtype, seed: int) -> None:
    torch.manual_seed(seed)
    rows = torch.randn(tokens, 5).to(dtype).requires_grad_()
    weight = torch.randn(3, 5).to(dtype).requires_grad_()
    direction = torch.randn(tokens, 3)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("st_clp.moe.precise.CPU_BLOCK", 16 * 5)  # blocks of 16 rows
        result = PreciseLinear.apply(rows, weight)
        found = torch.autograd.grad(result, [rows, weight], direction)
        products = inner_products(rows.detach(), rows.detach())
    exact = rows.float() @ weight.float().T
    torch.testing.assert_close(result, exact)
    for one, other in zip(found, torch.autograd.grad(exact, [rows, weight], direction), strict=True):
        torch.testing.assert_close(one, other)
    torch.testing.assert_close(products, rows.detach().float().square().sum(1))


@pytest.mark.parametrize("projection", ["intermediate", "output", "feed_forward"])
@pytest.mark.parametrize("per_token", [1, 2])
def test_the_router_has_a_gradient(tiny_model: SentenceTransformer, projection: str, per_token: int) -> None:
    model = st_clp.upcycle(tiny_model, 3, per_token, projection)
    MultipleNegativesRankingLoss(model.train())(features(model), None).backward()
    assert len(gates(model)) == 2
    assert all(gate.grad is not None and gate.grad.abs().sum() > 0 for gate in gates(model).values())


def test_the_reference_router_has_none(tiny_model: SentenceTransformer) -> None:
    model = st_clp.upcycle(tiny_model, routing="reference")
    MultipleNegativesRankingLoss(model.train())(features(model), None).backward()
    assert all(gate.grad is not None and not gate.grad.any() for gate in gates(model).values())
    assert not biases(model)


def test_the_balance_chooses_and_does_not_weigh(tiny_model: SentenceTransformer) -> None:
    """Where every expert is chosen anyway, a bias for choosing changes nothing."""
    model = st_clp.upcycle(tiny_model, 3, 3)
    with torch.no_grad():
        for name, value in model.named_parameters():
            if "experts." in name:
                value += torch.randn_like(value) * 0.1
    before = model.encode(TEXTS, convert_to_tensor=True)
    for name, value in model.named_buffers():
        if name.endswith("balance_bias"):
            value.copy_(torch.tensor([3.0, -2.0, 0.5]))
    torch.testing.assert_close(model.encode(TEXTS, convert_to_tensor=True), before)


def test_positions_that_query_expansion_adds_are_counted(tiny_model: SentenceTransformer) -> None:
    """ColBERT scores them, so an expert works on them for a purpose even where attention skips them."""
    model = st_clp.upcycle(tiny_model)
    columns = features(model)
    MultipleNegativesRankingLoss(model.train())([dict(column) for column in columns], None).backward()
    assert [sum(layer) for layer in counts(model)] == [tokens_in(columns)] * len(counts(model))
    reset_usage(model)
    expanded = [{**column, "query_expansion_positions": column["attention_mask"] == 0} for column in columns]
    MultipleNegativesRankingLoss(model)(expanded, None).backward()
    every = sum(column["attention_mask"].numel() for column in columns)
    assert [sum(layer) for layer in counts(model)] == [every] * len(counts(model))


def test_every_expert_takes_part_in_the_backward_pass(tiny_model: SentenceTransformer) -> None:
    """Distributed training waits for a gradient of every parameter, also of an expert that had no token."""
    model = st_clp.upcycle(tiny_model, 8, balance="none", projection="feed_forward")
    with torch.no_grad():
        for gate in gates(model).values():
            gate.zero_()  # all logits are equal: every token goes to one expert
    st_clp.train_only(model, "moe")
    MultipleNegativesRankingLoss(model.train())(features(model), None).backward()
    assert sorted(map(bool, counts(model)[0])) == [False] * 7 + [True]
    assert all(value.grad is not None for value in model.parameters() if value.requires_grad)


@pytest.mark.parametrize("per_token", [1, 2])
@pytest.mark.parametrize("projection", ["intermediate", "output", "feed_forward"])
def test_without_gradients_a_mixture_gives_what_it_gives_with_them(
    tiny_model: SentenceTransformer, projection: str, per_token: int
) -> None:
    model = st_clp.upcycle(tiny_model, 3, per_token, projection)
    with torch.no_grad():
        for name, value in model.named_parameters():
            if "experts." in name:
                value += torch.randn_like(value) * 0.1
    model.eval()
    texts = model.preprocess(TEXTS)
    with_gradients = model(dict(texts))["sentence_embedding"].detach()
    with torch.no_grad():
        torch.testing.assert_close(model(dict(texts))["sentence_embedding"], with_gradients)


@pytest.mark.parametrize(("given", "out"), [(5, 6), (6, 5)])
def test_the_routers_gradient_is_that_of_the_mixture_of_all_experts(given: int, out: int) -> None:
    """With every token tried, dL/dp_j is the product of the output's gradient and expert j's output."""
    from st_clp.moe.router_signal import TIE_BREAK, RouterSignal

    torch.manual_seed(0)
    sizes = [3, 0, 4]
    experts = [nn.Linear(given, out).double() for _ in sizes]
    rows, direction = torch.randn(7, given, dtype=torch.float64), torch.randn(7, out, dtype=torch.float64)
    shares = torch.rand(7, 3, dtype=torch.float64, requires_grad=True)
    signal = RouterSignal(1, torch.arange(7))
    parameters = [*[e.weight for e in experts], *[e.bias for e in experts]]
    GroupedLinear.apply(rows, shares, sizes, signal, *parameters).backward(direction)
    expected = torch.stack([(direction * expert(rows)).sum(-1) for expert in experts], dim=1)
    for expert, part in enumerate(slices(sizes)):
        expected[part, expert] *= 1 + TIE_BREAK
    assert shares.grad is not None
    torch.testing.assert_close(shares.grad, expected.detach(), rtol=1e-5, atol=1e-5)


@given(st.lists(st.integers(0, 6), min_size=1, max_size=4).filter(any), st.data())
@settings(deadline=None, max_examples=60)
def test_tokens_tried_count_as_many_fold_as_they_are_few(sizes: list[int], data: st.DataObject) -> None:
    """Whatever rows are tried, however few there are: each counts as many fold as it stands for."""
    from st_clp.moe.router_signal import TIE_BREAK, RouterSignal

    rows_count, stride = sum(sizes), data.draw(st.integers(1, 9))
    tried = sorted(data.draw(st.sets(st.integers(0, rows_count - 1))))
    torch.manual_seed(rows_count)
    rows, weights = torch.randn(rows_count, 4), [torch.randn(3, 4) for _ in sizes]
    gradient, parts = torch.randn(rows_count, 3), slices(sizes)
    rows_gradient = torch.cat([gradient[part] @ weight for part, weight in zip(parts, weights, strict=True)])
    found = torch.zeros(rows_count, len(sizes))
    RouterSignal(stride, torch.tensor(tried, dtype=torch.int64))(
        found, gradient, rows, rows_gradient, None, parts, weights, [None] * len(sizes)
    )
    every = torch.stack([((gradient @ weight) * rows).sum(-1) for weight in weights], dim=1)
    expected = torch.zeros_like(found)
    expected[tried] = every[tried] * stride
    for expert, part in enumerate(parts):
        expected[part, expert] += every[part, expert] * TIE_BREAK
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_one_token_in_n_is_tried_and_others_with_other_weights() -> None:
    from st_clp.moe.router_signal import drawn, token_marks

    marks = token_marks({"input_ids": torch.randint(5, 90, (64, 50), generator=torch.manual_seed(0))}, None)
    assert marks is not None
    assert marks.unique().numel() == 3200
    counts = torch.zeros(3200)
    for seed in range(200):
        counts += drawn(marks, torch.randn(2, 32, generator=torch.manual_seed(seed)), 8)
    assert abs(counts.sum() / (200 * 3200) - 1 / 8) < 0.005
    # as often as independent lots: a token's count has the binomial's deviation, and none is always left out
    assert abs(counts.std() - (200 * 1 / 8 * 7 / 8) ** 0.5) < 0.5
    assert counts.min() > 0


@given(st.lists(st.integers(1, 12), min_size=1, max_size=6), st.booleans(), st.integers(0, 5))
@settings(deadline=None, max_examples=60)
def test_a_token_is_tried_however_its_text_is_batched(lengths: list[int], left: bool, more: int) -> None:
    from st_clp.moe.router_signal import token_marks

    texts = [torch.randint(5, 90, (length,), generator=torch.manual_seed(length)) for length in lengths]
    width = max(lengths) + more
    padded, mask = torch.zeros(len(texts), width, dtype=torch.int64), torch.zeros(len(texts), width, dtype=torch.int64)
    for row, text in enumerate(texts):
        place = slice(width - len(text), width) if left else slice(0, len(text))
        padded[row, place], mask[row, place] = text, 1
    together = token_marks({"input_ids": padded}, mask)
    joined = {
        "input_ids": torch.cat(texts)[None],
        "position_ids": torch.cat([torch.arange(length) for length in lengths])[None] + more,
    }
    alone = torch.cat([token_marks({"input_ids": text[None]}, None) for text in texts])
    assert together is not None
    assert torch.equal(together[mask.reshape(-1) == 1], alone)
    flat = token_marks(joined, None)
    assert flat is not None
    assert flat.unique().numel() == alone.unique().numel()


@pytest.mark.parametrize("balance", ["bias", "loss"])
@pytest.mark.parametrize("projection", ["intermediate", "feed_forward"])
def test_a_batch_of_any_size_trains(tiny_model: SentenceTransformer, projection: str, balance: str) -> None:
    model = st_clp.upcycle(tiny_model, 3, projection=projection, balance=balance).train()
    losses = [
        MultipleNegativesRankingLoss(model),
        CLPLoss(model, queries_per_negative=0),
        CachedCLPLoss(model, queries_per_negative=0, mini_batch_size=1),
    ]

    @settings(max_examples=15, deadline=None)
    @given(st.lists(st.integers(0, 3), min_size=1, max_size=3), st.sampled_from(["", "cat"]), st.sampled_from(losses))
    def train_one_step(words: list[int], other: str, loss: nn.Module) -> None:
        model.zero_grad()
        value = loss([model.preprocess(["river " * n for n in words]), model.preprocess([other] * len(words))], None)
        value.backward()
        assert value.isfinite()
        assert all(gate.grad is not None and gate.grad.isfinite().all() for gate in gates(model).values())

    train_one_step()


@pytest.mark.parametrize("projection", ["intermediate", "output", "feed_forward"])
@pytest.mark.parametrize("per_token", [1, 2])
def test_padding_is_neither_routed_nor_counted(
    tiny_model: SentenceTransformer, projection: str, per_token: int
) -> None:
    model = st_clp.upcycle(tiny_model, 3, per_token, projection)
    with torch.no_grad():
        for name, value in model.named_parameters():
            if "experts.1." in name or "experts.2." in name:
                value *= 1.5
    alone = torch.cat([model.encode([text], convert_to_tensor=True) for text in TEXTS])
    reset_usage(model)
    together = model.encode(TEXTS, convert_to_tensor=True)
    torch.testing.assert_close(together, alone, atol=1e-6, rtol=0)
    assert [sum(layer) for layer in counts(model)] == [per_token * tokens_in([model.preprocess(TEXTS)])] * 2


@pytest.mark.parametrize("kind", ["plain", "checkpointed", "reentrant", "cached", "cached and checkpointed"])
@pytest.mark.parametrize("per_token", [1, 2])
def test_a_training_step_counts_each_token_once(tiny_model: SentenceTransformer, kind: str, per_token: int) -> None:
    model = st_clp.upcycle(tiny_model, 3, per_token)
    st_clp.train_only(model, "moe")
    model.train()
    if kind.endswith(("checkpointed", "reentrant")):
        model.gradient_checkpointing_enable({"use_reentrant": kind == "reentrant"})
    columns = features(model)
    total = per_token * tokens_in(columns)
    loss = CachedMultipleNegativesRankingLoss(model, mini_batch_size=2)
    (loss if "cached" in kind else MultipleNegativesRankingLoss(model))(columns, None).backward()
    assert [sum(layer) for layer in counts(model)] == [total, total]
    assert all(value.grad is not None and value.grad.abs().sum() > 0 for value in gates(model).values())


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_gives_the_same_gradients(
    make_tiny_model: Callable[..., SentenceTransformer], reentrant: bool
) -> None:
    def gradients(checkpointed: bool) -> dict[str, torch.Tensor]:
        model = st_clp.upcycle(make_tiny_model(seed=3), 3)
        st_clp.train_only(model, "moe")
        model.train()
        if checkpointed:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        MultipleNegativesRankingLoss(model)(features(model), None).backward()
        return {name: value.grad for name, value in model.named_parameters() if value.grad is not None}

    plain, recomputed = gradients(False), gradients(True)
    assert plain.keys() == recomputed.keys()
    for name, value in plain.items():
        torch.testing.assert_close(recomputed[name], value, msg=name)


def test_both_passes_of_a_cached_step_route_alike(tiny_model: SentenceTransformer) -> None:
    model = st_clp.upcycle(tiny_model, balance_rate=1.0)
    seen: list[list[torch.Tensor]] = []
    model[0].register_forward_hook(lambda *_: seen.append(biases(model)))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    loss = CachedMultipleNegativesRankingLoss(model.train(), mini_batch_size=2)
    steps = []
    for _ in range(3):
        seen.clear()
        optimizer.zero_grad()
        loss(features(model), None).backward()
        optimizer.step()
        assert len(seen) == 8
        assert all(torch.equal(a, b) for later in seen[1:] for a, b in zip(later, seen[0], strict=True))
        steps.append(seen[0])
    assert not torch.equal(steps[1][0], steps[0][0])  # it did move between steps


@pytest.mark.parametrize("sizes", [[1] * 6, [3, 3], [0, 1, 5], [4, 0, 2]])
def test_the_balance_moves_alike_however_a_step_is_cut(tiny_model: SentenceTransformer, sizes: list[int]) -> None:
    """Mini-batches of a cached loss or accumulated ones, of any size: what one pass over all their tokens gives."""

    def moved(sizes: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
        model = st_clp.upcycle(copy.deepcopy(tiny_model), balance_rate=1.0, layers=[0], seed=1).train()
        gate = model[0].model.encoder.layer[0].intermediate.dense.gate
        generator = torch.Generator().manual_seed(0)
        first, step = torch.randn(2, 6, gate.weight.shape[1], generator=generator)
        for parts in ([first], step.split(sizes) if sizes else []):
            for part in parts:
                padded = torch.cat([part, torch.full((2, part.shape[1]), 7.0)])
                mask = torch.tensor([[True] * len(part) + [False] * 2])
                with entered(ForwardContext(mask, counts=True)):
                    gate(padded, mask.shape)
            with torch.no_grad():
                gate.weight.mul_(1.0)  # as an optimizer that has stepped
            gate.balance.settle(gate)
        return gate.balance_bias.clone(), gate.balance_center.clone()

    whole, cut = moved([6]), moved(sizes)
    torch.testing.assert_close(cut, whole)
    assert not torch.equal(whole[0], moved([])[0])


class Operations(TorchDispatchMode):
    """Counts operations."""

    def __init__(self) -> None:
        super().__init__()
        self.number = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.number += 1
        return func(*args, **(kwargs or {}))


@settings(max_examples=20, deadline=None)
@given(st.lists(st.tuples(st.sampled_from([8, 12]), st.integers(2, 3), st.integers(0, 5)), min_size=1, max_size=5))
def test_layers_that_move_together_move_as_each_would_alone(shapes: list[tuple[int, int, int]]) -> None:
    """Of any widths and numbers of experts, and where a step had nothing but padding."""
    generator = torch.Generator().manual_seed(0)
    routers = []
    for layer, (dim, experts, tokens) in enumerate(shapes):
        router = Router(dim, MoESettings(num_experts=experts), layer).train()
        router.draw(1.0, generator)
        for given_tokens in (torch.randn(4, dim, generator=generator), torch.randn(tokens, dim, generator=generator)):
            padded = torch.cat([given_tokens, torch.full((2, dim), 7.0)])
            mask = torch.tensor([[True] * len(given_tokens) + [False] * 2])
            with entered(ForwardContext(mask, counts=True)):
                router(padded, mask.shape)
            with torch.no_grad():
                router.weight.mul_(1.0)  # as an optimizer that has stepped
        routers.append(router)
    alone = copy.deepcopy(routers)
    for router in alone:
        move([router])
    move(routers)
    for router, other in zip(routers, alone, strict=True):
        torch.testing.assert_close(router.balance_bias, other.balance_bias)
        torch.testing.assert_close(router.balance_center, other.balance_center)
    settled = [router.balance_bias.clone() for router in routers]
    move(routers)  # the optimizer has not stepped since
    assert all(torch.equal(router.balance_bias, bias) for router, bias in zip(routers, settled, strict=True))


OPTIMIZERS = {
    "sgd": partial(torch.optim.SGD, lr=0.1),
    "adamw": partial(torch.optim.AdamW, lr=1e-2, foreach=True),
    "the Trainer's": partial(torch.optim.AdamW, lr=1e-2, fused=True),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_the_balance_moves_once_with_each_step_of_any_optimizer(name: str, tiny_model: SentenceTransformer) -> None:
    model = st_clp.upcycle(tiny_model, balance_rate=1.0).train()
    optimizer = OPTIMIZERS[name]([value for value in model.parameters() if value.requires_grad])

    def balances() -> list[torch.Tensor]:
        return [value.clone() for name, value in model.named_buffers() if "balance_center" in name]

    model(features(model)[0])["sentence_embedding"].pow(3).sum().backward()  # sets the balance
    for given_texts in features(model)[::-1]:
        before, biased = balances(), biases(model)
        model(dict(given_texts))["sentence_embedding"].pow(3).sum().backward()
        assert all(torch.equal(a, b) for a, b in zip(before, balances(), strict=True))
        optimizer.step()
        moved = balances()
        assert not any(torch.equal(a, b) for a, b in zip(before, moved, strict=True))
        assert not all(torch.equal(a, b) for a, b in zip(biased, biases(model), strict=True))
        with torch.no_grad():
            model(dict(given_texts))  # the step is not taken for another one
        assert all(torch.equal(a, b) for a, b in zip(moved, balances(), strict=True))


def test_a_balance_that_was_loaded_is_not_moved_by_a_step_before(tiny_model: SentenceTransformer) -> None:
    model = st_clp.upcycle(tiny_model, balance_rate=1.0).train()
    first, second = features(model)
    model(first)["sentence_embedding"].sum().backward()
    good = copy.deepcopy(model.state_dict())
    model(second)["sentence_embedding"].sum().backward()
    model.load_state_dict(good)
    move(module for module in model.modules() if isinstance(module, Router))
    for name, value in model.named_buffers():
        if "balance" in name:
            assert torch.equal(value, good[name]), name


def test_a_models_layers_move_together(tiny_model: SentenceTransformer) -> None:
    """In few operations more a layer: each has its own bias, mean token and sums to write, and no arithmetic."""
    model = st_clp.upcycle(tiny_model, balance_rate=1.0).train()
    routers = [module for module in model.modules() if isinstance(module, Router)]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    first, second = features(model)  # the first ones set a balance that is even for them
    model(first)["sentence_embedding"].sum().backward()
    optimizer.step()
    model(second)["sentence_embedding"].sum().backward()
    with torch.no_grad():
        for router in routers:
            router.weight.mul_(1.0)  # as an optimizer that is none of PyTorch's
    before = biases(model)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(routers[0], "_plan", None)  # nothing is routed: it is the model that has them move
        with pytest.raises(TypeError):
            model(features(model)[0])
    assert not any(torch.equal(a, b) for a, b in zip(before, biases(model), strict=True))
    numbers = []
    for some in (routers[:1], routers[:2]):
        with torch.no_grad():
            for router in some:
                router.weight.mul_(1.0)
        with Operations() as operations:
            move(some)
        numbers.append(operations.number)
    assert numbers[1] - numbers[0] <= 10 < numbers[0]


def test_the_remembered_mean_token_follows_what_is_trained_on(tiny_model: SentenceTransformer) -> None:
    """After k steps on other texts a tenth of the way each: 0.9 ** k of the distance is left."""
    model = st_clp.upcycle(tiny_model)
    st_clp.train_only(model, "router")  # what comes into the first layer's router stays the same
    gate = model[0].model.encoder.layer[0].intermediate.dense.gate
    seen: list[torch.Tensor] = []
    gate.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].detach()))
    optimizer = torch.optim.SGD(gate.parameters(), lr=1e-3)

    def step(texts: list[str], loss: nn.Module) -> torch.Tensor:
        seen.clear()
        optimizer.zero_grad()
        loss([model.preprocess(texts), model.preprocess(texts[::-1])], None).backward()
        optimizer.step()
        return torch.cat(seen).mean(0)

    loss = MultipleNegativesRankingLoss(model.train())
    first = step(["the king", "a cat"], loss)
    torch.testing.assert_close(gate.balance_center, first)  # the first batch sets it
    torch.testing.assert_close(first, step(["the king", "a cat"], loss))
    for _ in range(5):
        other = step(["a river", "red lake"], loss)
    left = gate.balance_center - other
    torch.testing.assert_close(left, (first - other) * 0.9**5, rtol=1e-3, atol=1e-5)
    assert (first - other).abs().max() > 0.05


def test_a_checkpoint_holds_the_last_steps_use(tiny_model: SentenceTransformer, tmp_path: Path) -> None:
    model = st_clp.upcycle(tiny_model, balance_rate=1.0)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    MultipleNegativesRankingLoss(model.train())(features(model), None).backward()
    optimizer.step()
    model.save(str(tmp_path))
    saved = biases(st_clp.load(tmp_path, device="cpu"))
    MultipleNegativesRankingLoss(model)(features(model), None)  # the next step's forward pass moves it no further
    assert all(torch.equal(a, b) for a, b in zip(saved, biases(model), strict=True))


def test_evaluation_leaves_the_balance_alone(tiny_model: SentenceTransformer) -> None:
    model = st_clp.upcycle(tiny_model)
    model.encode(TEXTS)
    assert not any(bias.any() for bias in biases(model))
    st_clp.train_only(model, "moe")
    MultipleNegativesRankingLoss(model.train())(features(model), None).backward()
    before = biases(model)
    model.encode(TEXTS)
    assert all(torch.equal(a, b) for a, b in zip(before, biases(model), strict=True))


def test_the_auxiliary_loss_pushes_away_from_the_crowded_expert(tiny_model: SentenceTransformer) -> None:
    def gradient(balance: str) -> torch.Tensor:
        model = st_clp.upcycle(copy.deepcopy(tiny_model), layers=[0], balance=balance, balance_weight=3.0)
        hidden: list[torch.Tensor] = []
        layer = model[0].model.encoder.layer[0]
        layer.intermediate.register_forward_pre_hook(lambda _, inputs: hidden.append(inputs[0].detach()))
        with torch.no_grad():
            layer.intermediate.dense.gate.weight.copy_(torch.stack([torch.ones(32), torch.zeros(32)]) * 1e-3)
        (model.train()(model.preprocess(TEXTS))["sentence_embedding"] * 0).sum().backward()  # any loss, without a word
        mask = model.preprocess(TEXTS)["attention_mask"].bool()
        rows = hidden[0][mask]
        use = expert_usage(model).layers[0].shares
        weight = layer.intermediate.dense.gate.weight
        shares = torch.softmax(rows @ weight.t(), dim=-1).mean(0)
        (expected,) = torch.autograd.grad(3.0 * 2 * (shares * torch.tensor(use)).sum(), weight)
        torch.testing.assert_close(weight.grad, expected if balance == "loss" else torch.zeros_like(expected))
        return expected

    assert gradient("loss").abs().sum() > 0
    gradient("none")
