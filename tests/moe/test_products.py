"""The experts' products: the same in whatever shapes and by whichever way they are computed."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from st_clp.moe.products import GroupedLinear, gathered_products, products, slices


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
