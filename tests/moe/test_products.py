"""The experts' products: the same in whatever shapes and by whichever way they are computed."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss
from torch import nn

import st_clp
from st_clp.moe import products as product_module
from st_clp.moe.products import GroupedLinear, gathered_products, one_each, products, slices


@settings(max_examples=25, deadline=None)
@given(st.lists(st.integers(0, 5), min_size=1, max_size=5), st.booleans(), st.integers(0, 100))
def test_the_grouped_product_is_that_of_the_experts_one_by_one(sizes: list[int], bias: bool, seed: int) -> None:
    torch.manual_seed(seed)
    experts = [nn.Linear(4, 3, bias=bias).double() for _ in sizes]
    rows = torch.randn(sum(sizes), 4, dtype=torch.float64, requires_grad=True)
    parameters = [*[e.weight for e in experts], *[e.bias for e in experts]]
    result = GroupedLinear.apply(rows, None, sizes, None, *parameters)
    expected = torch.cat([expert(rows[part]) for expert, part in zip(experts, slices(sizes), strict=True)])
    torch.testing.assert_close(result, expected)
    wanted = [rows, *[parameter for parameter in parameters if parameter is not None]]
    direction = torch.randn_like(result)
    found = torch.autograd.grad(result, wanted, direction)
    for one, other in zip(found, torch.autograd.grad(expected, wanted, direction, allow_unused=True), strict=True):
        torch.testing.assert_close(one, torch.zeros_like(one) if other is None else other)


@settings(max_examples=100, deadline=None)
@given(
    sizes=st.lists(st.integers(0, 30), min_size=1, max_size=5),
    piece=st.integers(1, 20),
    multiple=st.integers(1, 9),
    dtype=st.sampled_from([torch.bfloat16, torch.float16, torch.float32]),
    bias=st.booleans(),
    seed=st.integers(0, 100),
)
def test_a_product_is_the_same_in_whatever_shapes_it_is_taken(
    sizes: list[int], piece: int, multiple: int, dtype: torch.dtype, bias: bool, seed: int
) -> None:
    torch.manual_seed(seed)
    tokens, source = torch.randn(20, 4).to(dtype), torch.randint(20, (sum(sizes),))
    matrices = [torch.randn(4, 3).to(dtype) for _ in sizes]
    biases = [torch.randn(3).to(dtype) if bias else None for _ in sizes]
    parts = zip(slices(sizes), matrices, biases, strict=True)
    rows = tokens[source]
    expected = torch.cat(
        [torch.mm(rows[part], m) if b is None else torch.addmm(b, rows[part], m) for part, m, b in parts]
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("st_clp.moe.products.PIECE", piece)
        patch.setattr("st_clp.moe.products.MULTIPLE", multiple)
        found = products(rows, sizes, matrices, biases)
        gathered = gathered_products(tokens, source, sizes, matrices, biases)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(gathered, expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_processors_products_take_no_odd_numbers_of_rows(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype) -> None:
    """1,058 rows (2 times 23 times 23) took up to a quarter longer by the row than 1,064, and 1,034 longer than 520."""
    shapes: list[int] = []

    def recorded(bias: torch.Tensor, rows: torch.Tensor, matrix: torch.Tensor, *, out: torch.Tensor) -> None:
        shapes.append(len(rows))
        real(bias, rows, matrix, out=out)

    real = torch.addmm
    monkeypatch.setattr(torch, "addmm", recorded)
    sizes = [979, 1058, 11]
    tokens, source = torch.randn(2048, 8).to(dtype), torch.randperm(2048)
    matrices, biases = [torch.randn(8, 8).to(dtype)] * 3, [torch.randn(8).to(dtype)] * 3
    products(tokens, sizes, matrices, biases)
    assert shapes == [984, 536, 528, 16]
    shapes.clear()
    gathered_products(tokens, source, sizes, matrices, biases)
    assert shapes == [984, 536, 528, 16]


@settings(max_examples=50, deadline=None)
@given(
    sizes=st.lists(st.integers(0, 30), min_size=1, max_size=5).filter(any),
    dtype=st.sampled_from([torch.bfloat16, torch.float32]),
    turned=st.booleans(),
    bias=st.booleans(),
    seed=st.integers(0, 100),
)
def test_all_products_in_one_kernel_are_those_of_one_kernel_each(
    sizes: list[int], dtype: torch.dtype, turned: bool, bias: bool, seed: int
) -> None:
    torch.manual_seed(seed)
    rows = torch.randn(sum(sizes), 16).to(dtype)
    matrices = [torch.randn(8, 16).to(dtype).t() if turned else torch.randn(16, 8).to(dtype) for _ in sizes]
    biases = [torch.randn(8).to(dtype) if bias else None for _ in sizes]
    found = product_module.in_one_kernel(rows, sizes, matrices, biases)
    # the bias is added to a rounded product, not within it
    torch.testing.assert_close(found, one_each(rows, sizes, matrices, biases), atol=0.05, rtol=0.02)


@pytest.fixture
def tried_here(monkeypatch: pytest.MonkeyPatch) -> dict[Any, bool]:
    """Both ways are timed on this processor, as on an accelerator; returns what was found."""
    monkeypatch.setattr(product_module, "DEVICES", ("cpu",))
    found: dict[Any, bool] = {}
    monkeypatch.setattr(product_module, "_faster", found)
    return found


def kind(rows: int, experts: int = 2, dtype: torch.dtype = torch.bfloat16) -> tuple[Any, ...]:
    counts = [rows // experts] * experts
    return torch.randn(sum(counts), 16).to(dtype), counts, [torch.randn(16, 8).to(dtype)] * experts, None


def test_each_kind_of_product_is_timed_once(tried_here: dict[Any, bool], monkeypatch: pytest.MonkeyPatch) -> None:
    times: list[int] = []
    real = product_module.in_one_kernel
    monkeypatch.setattr(product_module, "in_one_kernel", lambda *given: times.append(len(given[0])) or real(*given))
    products(*kind(40))
    assert len(tried_here) == 1
    assert len(times) >= product_module.REPEATS
    times.clear()
    products(*kind(50))  # as good as the same number
    assert len(tried_here) == 1
    assert len(times) <= 1
    products(*kind(400))
    products(*kind(40, experts=4))
    assert len(tried_here) == 3


@pytest.mark.parametrize("faster", [True, False])
def test_the_faster_way_is_taken(tried_here: dict[Any, bool], monkeypatch: pytest.MonkeyPatch, faster: bool) -> None:
    given = kind(40)
    fast, slow = (lambda *_: torch.zeros(())), (lambda *_: torch.mm(torch.ones(700, 700), torch.ones(700, 700)))
    monkeypatch.setattr(product_module, "in_one_kernel", fast if faster else slow)
    each = slow if faster else fast
    chosen = product_module.choose(each, *given)
    assert chosen is (product_module.in_one_kernel if faster else each)


def test_where_it_cannot_be_or_fails_each_expert_has_its_product(
    tried_here: dict[Any, bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    for unfit in (kind(40, dtype=torch.float32), kind(40, experts=1), kind(0)):
        assert product_module.choose(one_each, *unfit) is one_each
    rows, counts, matrices, biases = kind(40)
    assert product_module.choose(one_each, rows[:, :13], counts, [m[:13] for m in matrices], biases) is one_each
    assert not tried_here

    def refuse(*given: Any, **options: Any) -> torch.Tensor:
        raise RuntimeError("not for this device")

    monkeypatch.setattr(torch.nn.functional, "grouped_mm", refuse)
    assert product_module.choose(one_each, *kind(40)) is one_each
    torch.use_deterministic_algorithms(True)
    try:
        tried_here.clear()
        assert product_module.choose(one_each, *kind(40)) is one_each
        assert not tried_here
    finally:
        torch.use_deterministic_algorithms(False)


def test_a_processor_does_not_try(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(product_module, "_faster", {})
    products(*kind(40))
    assert not product_module._faster


@pytest.mark.parametrize("projection", ["intermediate", "output", "feed_forward"])
def test_a_mixture_trains_the_same_either_way(
    tiny_model: SentenceTransformer, monkeypatch: pytest.MonkeyPatch, projection: str
) -> None:
    """Gradients too go through the one kernel: of the rows as well as through weights read the other way round."""
    model = st_clp.upcycle(tiny_model, 3, projection=projection, router_sample=0.0).bfloat16()
    texts = [model.preprocess(["a cat on the river", "the king"]), model.preprocess(["the king cat", "red"])]
    calls: list[int] = []

    def train() -> list[torch.Tensor]:
        model.zero_grad()
        model.train()
        MultipleNegativesRankingLoss(model)([dict(column) for column in texts], None).backward()
        return [p.grad.float().clone() for p in model.parameters() if p.grad is not None]

    expected = train()

    def always(each: Any, *given: Any) -> Any:
        calls.append(1)
        return product_module.in_one_kernel

    monkeypatch.setattr("st_clp.moe.products.choose", always)
    found = train()
    assert calls
    for one, other in zip(found, expected, strict=True):
        assert (one - other).norm() <= 0.05 * other.norm() + 1e-4
