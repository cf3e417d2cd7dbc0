"""The mixture as an accelerator or a compiled graph runs it: the same results, and nothing that the host waits for."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss
from torch import Tensor, nn

import st_clp
from st_clp import CLPLoss
from st_clp.encoding.attention import use_known_padding
from st_clp.moe import expert_usage
from st_clp.moe.context import places_of
from st_clp.moe.convert import expert_layers
from st_clp.moe.grouped import (
    StackedLinear,
    grouped_outer_product,
    grouped_product,
    sort_by_expert,
)
from st_clp.moe.products import slices
from st_clp.moe.router_signal import TIE_BREAK

TEXTS = ["a cat on the river", "the king", "what is the capital of a country", "red green blue " * 8]


@contextmanager
def as_on_a_device() -> Iterator[None]:
    """Route as on an accelerator, where the host knows no counts."""
    with pytest.MonkeyPatch.context() as patch:
        for module in ("context", "balance", "routing"):
            patch.setattr(f"st_clp.moe.{module}.stays_on_device", lambda tokens: True)
        yield


def upcycled(model: SentenceTransformer, *args: Any, **kwargs: Any) -> SentenceTransformer:
    """A mixture whose experts differ."""
    mixture = st_clp.upcycle(model, *args, **kwargs)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, value in mixture.named_parameters():
            if "experts." in name:
                value += torch.randn(value.shape, generator=generator) * 0.05
    return mixture


class Outcome:
    """What a training pass gives: embeddings, gradients, how often the experts were used, and the balance."""

    def __init__(self, model: SentenceTransformer, call: Any) -> None:
        model.zero_grad()
        output = call(model.preprocess(TEXTS))["sentence_embedding"]
        (output @ torch.linspace(-1, 1, output.shape[1], dtype=output.dtype)).pow(2).sum().backward()
        self.embeddings = output.detach().float()
        self.gradients = {name: p.grad.float() for name, p in model.named_parameters() if p.grad is not None}
        self.use = [layer.tokens for layer in expert_usage(model).layers]
        self.balance = {name: value.clone() for name, value in model.named_buffers() if "balance" in name}

    def agrees_with(self, other: Outcome, tolerance: float) -> None:
        torch.testing.assert_close(self.embeddings, other.embeddings, atol=tolerance, rtol=tolerance)
        assert self.gradients.keys() == other.gradients.keys()
        for name, value in self.gradients.items():
            assert (value - other.gradients[name]).norm() <= 20 * tolerance * value.norm() + 1e-6, name
        assert self.use == other.use
        for name, value in self.balance.items():
            torch.testing.assert_close(value, other.balance[name], atol=tolerance, rtol=tolerance)


KINDS = [
    {"projection": projection, "num_experts": experts, "num_experts_per_tok": per_token, **more}
    for projection in ("intermediate", "output", "feed_forward")
    for experts, per_token in ((2, 1), (3, 1), (3, 2))
    for more in ({}, {"balance": "loss"}, {"router_sample": 1.0})
    if per_token == 1 or not more
]


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: "-".join(map(str, kind.values())))
def test_a_device_computes_what_a_processor_does(tiny_model: SentenceTransformer, kind: dict[str, Any]) -> None:
    model = upcycled(tiny_model, **kind).train()
    other = copy.deepcopy(model)
    expected = Outcome(model, model)
    with as_on_a_device():
        Outcome(other, other).agrees_with(expected, 1e-5)


@pytest.mark.parametrize("projection", ["intermediate", "output", "feed_forward"])
def test_and_so_it_does_in_bfloat16(tiny_model: SentenceTransformer, projection: str) -> None:
    """By PyTorch's grouped product, which takes no other numbers; the router's signal too."""
    model = upcycled(tiny_model, 3, projection=projection, balance="none", router_sample=1.0).bfloat16().train()
    other = copy.deepcopy(model)
    expected = Outcome(model, model)
    with as_on_a_device(), pytest.MonkeyPatch.context() as patch:
        patch.setattr("st_clp.moe.grouped.products", None)  # no product an expert, for which counts are needed
        found = Outcome(other, other)
    found.agrees_with(expected, 0.02)


def test_under_autocast_weights_are_cast_and_their_gradients_are_not(tiny_model: SentenceTransformer) -> None:
    model = upcycled(tiny_model, 2).train()
    other = copy.deepcopy(model)
    with torch.autocast("cpu", torch.bfloat16):
        expected = Outcome(model, model)
        with as_on_a_device():
            found = Outcome(other, other)
    found.agrees_with(expected, 0.02)
    assert all(p.grad is None or p.grad.dtype == torch.float32 for p in other.parameters())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", [{}, {"projection": "feed_forward"}, {"projection": "output", "num_experts": 3}])
def test_a_whole_model_compiles_without_a_break(
    tiny_model: SentenceTransformer, kind: dict[str, Any], dtype: torch.dtype
) -> None:
    """A break is where the host must see a result; so there is none, forwards, backwards and while counting."""
    model = upcycled(tiny_model, **kind).to(dtype).train()
    other = copy.deepcopy(model)
    torch.compiler.reset()
    with pytest.MonkeyPatch.context() as patch:
        if dtype == torch.bfloat16:  # then the counts are not even looked at within an operation
            patch.setattr("st_clp.moe.grouped.products", None)
        found = Outcome(other, torch.compile(other, fullgraph=True, backend="aot_eager"))
    expected = Outcome(model, model)
    found.agrees_with(expected, 1e-5 if dtype == torch.float32 else 0.05)


def test_a_compiled_model_trains_as_any_does(tiny_model: SentenceTransformer) -> None:
    """Balance included, which moves when the optimizer has stepped."""
    # all tokens are tried: which ones are drawn depends on the bits of the router's weights
    model = upcycled(tiny_model, 2, router_sample=1.0).train()
    other = copy.deepcopy(model)
    torch.compiler.reset()
    compiled = torch.compile(other, fullgraph=True, backend="aot_eager")

    def train(trained: SentenceTransformer, call: Any) -> None:
        optimizer = torch.optim.SGD(trained.parameters(), lr=0.01)
        for _ in range(3):
            Outcome(trained, call)
            optimizer.step()

    train(model, model)
    train(other, compiled)
    for (name, one), two in zip(model.named_parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(two, one, atol=1e-5, rtol=1e-4, msg=name)
    expected = Outcome(model, model)  # a pass that is not compiled moves the balance for the step before
    for name, value in other.named_buffers():
        if "balance" in name:
            torch.testing.assert_close(value, expected.balance[name], msg=name)
    model.eval()
    other.eval()
    with torch.no_grad():
        one, two = (call(model.preprocess(TEXTS))["sentence_embedding"] for call in (model, compiled))
    torch.testing.assert_close(two, one, atol=1e-5, rtol=1e-4)


def test_layers_that_are_compiled_alone_are_not_compiled_again_for_other_lengths(
    tiny_model: SentenceTransformer,
) -> None:
    """Nor for another pass, step or layer: what is read outside of a graph does not differ between them."""
    model = upcycled(tiny_model, 2).train()
    st_clp.train_only(model, "moe")
    torch.compiler.reset()
    for layer in model[0].model.encoder.layer:
        layer.compile(dynamic=True, fullgraph=True, backend="aot_eager")
    optimizer = torch.optim.SGD([value for value in model.parameters() if value.requires_grad], lr=0.01)

    def step(more: int) -> None:
        for texts in ([*TEXTS[:2], "a cat " * more], TEXTS * more):
            with torch.autocast("cpu", torch.bfloat16):
                model(model.preprocess(texts))["sentence_embedding"].float().pow(3).sum().backward()
        optimizer.step()
        optimizer.zero_grad()

    step(2)
    step(3)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for more in (1, 4, 5):
            step(more)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", KINDS[::2], ids=lambda kind: "-".join(map(str, kind.values())))
def test_a_training_step_asks_for_no_number(
    tiny_model: SentenceTransformer, monkeypatch: pytest.MonkeyPatch, kind: dict[str, Any], dtype: torch.dtype
) -> None:
    """On a device that holds no numbers a step would fail where the host asks for one; loss and optimizer included."""
    monkeypatch.setattr(torch, "autocast", lambda *given, **named: nullcontext())  # which that device does not have
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda device: False)
    if dtype == torch.float32:  # of which there is no grouped product
        monkeypatch.setattr("st_clp.moe.grouped._product_each", _shape_of_product)
        monkeypatch.setattr("st_clp.moe.grouped._outer_product_each", _shape_of_outer_product)
    else:
        monkeypatch.setattr("st_clp.moe.grouped.GROUPED_DEVICES", ("meta",))
    model = st_clp.upcycle(tiny_model, **kind).to(dtype)
    st_clp.train_only(model, "moe")
    columns = [model.preprocess(TEXTS[at : at + 2]) for at in (0, 1, 2, 0)]
    use_known_padding(model[0].model)  # or transformers looks at the mask
    for layer in expert_layers(model):
        if layer.gate is not None:  # of a model without numbers nothing says whether it has a balance
            layer.gate.balance.calibrated = True
    model = model.to("meta").train()
    columns = [{name: _without_numbers(value) for name, value in column.items()} for column in columns]
    loss = CLPLoss(model)
    trained = [value for value in model.parameters() if value.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=0.1)
    loss(columns, None).backward()
    optimizer.step()
    assert all(value.grad is not None and value.grad.shape == value.shape for value in trained)
    with torch.no_grad():
        model.eval()(columns[0])
    with pytest.raises((RuntimeError, NotImplementedError)):  # as it would have been
        expert_usage(model)


def _without_numbers(value: Any) -> Any:
    return value.to("meta") if isinstance(value, Tensor) else value


def _shape_of_product(rows: Tensor, matrices: Tensor, ends: Tensor) -> Tensor:
    return rows.new_empty(rows.shape[0], matrices.shape[2])


def _shape_of_outer_product(left: Tensor, right: Tensor, ends: Tensor) -> Tensor:
    return left.new_empty(len(ends), left.shape[1], right.shape[1])


sizes_lists = st.lists(st.integers(0, 6), min_size=1, max_size=5).filter(any)


@settings(max_examples=40, deadline=None)
@given(sizes_lists, st.booleans(), st.booleans(), st.sampled_from([torch.float32, torch.bfloat16]), st.integers(0, 50))
def test_products_are_those_of_the_experts_one_by_one(
    sizes: list[int], bias: bool, unsorted: bool, dtype: torch.dtype, seed: int
) -> None:
    torch.manual_seed(seed)
    experts = [nn.Linear(16, 8, bias=bias).to(dtype) for _ in sizes]
    chosen = torch.cat([torch.full((size,), expert) for expert, size in enumerate(sizes)])
    shuffled = chosen[torch.randperm(len(chosen))] if unsorted else chosen
    ordered = sort_by_expert(shuffled, len(sizes))
    order, back = ordered.order, ordered.order.argsort()
    tokens = torch.randn(len(chosen), 16).to(dtype).requires_grad_()
    parameters = [*[e.weight for e in experts], *[e.bias for e in experts]]
    source = (order, back) if unsorted else (None, None)
    found = StackedLinear.apply(tokens, None, *source, 1, ordered.ends, ordered.owner, None, None, None, *parameters)
    rows = tokens[order] if unsorted else tokens
    expected = torch.cat([expert(rows[part]) for expert, part in zip(experts, slices(sizes), strict=True)])
    tolerance = 1e-5 if dtype == torch.float32 else 0.03
    torch.testing.assert_close(found, expected, atol=tolerance, rtol=tolerance)
    wanted = [tokens, *[parameter for parameter in parameters if parameter is not None]]
    direction = torch.randn_like(found)
    given_back = torch.autograd.grad(found, wanted, direction)
    for one, other in zip(given_back, torch.autograd.grad(expected, wanted, direction, allow_unused=True), strict=True):
        other = torch.zeros_like(one) if other is None else other
        torch.testing.assert_close(one, other, atol=5 * tolerance, rtol=5 * tolerance)


@settings(max_examples=40, deadline=None)
@given(sizes_lists, st.sampled_from([(16, 8), (13, 7)]), st.sampled_from([torch.float32, torch.bfloat16]))
def test_numbers_that_no_kernel_takes_are_multiplied_all_the_same(
    sizes: list[int], sides: tuple[int, int], dtype: torch.dtype
) -> None:
    torch.manual_seed(len(sizes))
    rows, others = torch.randn(sum(sizes), sides[0]).to(dtype), torch.randn(sum(sizes), sides[1]).to(dtype)
    matrices = torch.randn(len(sizes), *sides).to(dtype)
    ends = torch.tensor(sizes).cumsum(0).int()
    found, outer = grouped_product(rows, matrices, ends), grouped_outer_product(others, rows, ends)
    for expert, part in enumerate(slices(sizes)):
        torch.testing.assert_close(found[part], rows[part] @ matrices[expert], atol=0.05, rtol=0.02)
        torch.testing.assert_close(outer[expert], others[part].t() @ rows[part], atol=0.05, rtol=0.02)


@settings(max_examples=40, deadline=None)
@given(sizes_lists, st.sampled_from([(8, 16), (16, 8)]), st.booleans(), st.integers(1, 5), st.data())
def test_the_routers_signal_is_that_of_all_experts_at_the_rows_tried(
    sizes: list[int], sides: tuple[int, int], unsorted: bool, stride: int, data: st.DataObject
) -> None:
    torch.manual_seed(stride)
    count, experts = sum(sizes), [nn.Linear(*sides).double().float() for _ in sizes]
    tried = sorted(data.draw(st.sets(st.integers(0, count - 1))))
    empty = data.draw(st.integers(0, 3))
    places = torch.tensor([*tried, *[0] * empty], dtype=torch.int64)
    weights = torch.tensor([float(stride)] * len(tried) + [0.0] * empty)
    owner = torch.cat([torch.full((size,), expert) for expert, size in enumerate(sizes)])
    ordered = sort_by_expert(owner, len(sizes))
    tokens, direction = torch.randn(count, sides[0]), torch.randn(count, sides[1])
    shares = torch.rand(count, len(sizes), requires_grad=True)
    parameters = [*[e.weight for e in experts], *[e.bias for e in experts]]
    source = (ordered.order, ordered.order.argsort()) if unsorted else (None, None)
    router = (ordered.ends, ordered.owner, stride, places, weights)
    StackedLinear.apply(tokens, shares, *source, 1, *router, *parameters).backward(direction)
    every = torch.stack([(direction * expert(tokens)).sum(1) for expert in experts], dim=1).detach()
    expected = torch.zeros(count, len(sizes))
    expected[tried] = every[tried] * stride
    expected[torch.arange(count), owner] += every[torch.arange(count), owner] * TIE_BREAK
    torch.testing.assert_close(shares.grad, expected, rtol=1e-4, atol=1e-4)


@settings(max_examples=100, deadline=None)
@given(st.lists(st.booleans(), min_size=1, max_size=300), st.integers(1, 20))
def test_the_places_of_what_is_drawn_have_a_shape_that_tells_nothing(drawn: list[bool], stride: int) -> None:
    found = places_of(torch.tensor(drawn), stride)
    expected = [place for place, taken in enumerate(drawn) if taken]
    assert found.shape == places_of(torch.zeros(len(drawn), dtype=torch.bool), stride).shape
    kept = found[found >= 0].tolist()
    assert kept == expected[: len(found)]
    assert len(found) == len(drawn) or len(found) >= len(drawn) / stride + 6 * (len(drawn) / stride) ** 0.5


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(0, 3), min_size=1, max_size=40))
def test_sorting_keeps_the_order_of_each_experts_tokens(chosen: list[int]) -> None:
    found = sort_by_expert(torch.tensor(chosen), 4)
    assert found.order.tolist() == sorted(range(len(chosen)), key=lambda slot: chosen[slot])
    assert found.owner.tolist() == sorted(chosen)
    assert found.ends.dtype == torch.int32
    assert found.ends.tolist() == [sum(owner <= expert for owner in chosen) for expert in range(4)]


@pytest.mark.gpu
@pytest.mark.parametrize("kind", KINDS[:3], ids=lambda kind: "-".join(map(str, kind.values())))
def test_on_a_card_the_mixture_is_the_processors(tiny_model: SentenceTransformer, kind: dict[str, Any]) -> None:
    model = upcycled(tiny_model, **kind).train()
    there = copy.deepcopy(model).to("cuda")
    expected = Outcome(model, model)
    found = Outcome(there, lambda features: _back(there, features))
    found.gradients = {name: value.cpu() for name, value in found.gradients.items()}
    found.balance = {name: value.cpu() for name, value in found.balance.items()}
    found.agrees_with(expected, 1e-4)


def _back(model: SentenceTransformer, features: dict[str, Any]) -> dict[str, Tensor]:
    features = {name: value.cuda() if isinstance(value, Tensor) else value for name, value in features.items()}
    return {"sentence_embedding": model(features)["sentence_embedding"].cpu()}


def test_the_loss_of_sentence_transformers_trains_it(tiny_model: SentenceTransformer) -> None:
    model = st_clp.upcycle(tiny_model, 3).train()
    st_clp.train_only(model, "moe")
    columns = [model.preprocess(TEXTS[:2]), model.preprocess(TEXTS[2:])]
    with as_on_a_device():
        MultipleNegativesRankingLoss(model)(columns, None).backward()
    assert all(value.grad is not None for value in model.parameters() if value.requires_grad)
