"""The loss against what the paper's published code computes; see clp_loss.md for where the figures are from."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.util import dot_score

from st_clp.losses import CachedCLPLoss, CLPLoss

CASES = json.loads((Path(__file__).parent / "clp_loss.json").read_text())


@pytest.mark.parametrize("loss_class", [CLPLoss, CachedCLPLoss])
@pytest.mark.parametrize("case", CASES, ids=lambda case: f"t{case['temperature']}-b{case['batch']}")
def test_loss_and_gradients_are_the_reference_codes(
    case: dict[str, Any],
    loss_class: type[CLPLoss],
    lookup_model: Callable[..., SentenceTransformer],
    run_loss: Any,
    assert_close: Any,
) -> None:
    parts = [case["query"], case["passages"], case["negative_queries"] or []]
    model = lookup_model(torch.tensor([row for part in parts for row in part], dtype=torch.float64))
    batch, negatives = case["batch"], case["negatives_per_query"]
    passages = [list(range(batch + i, batch + len(case["passages"]), 1 + negatives)) for i in range(1 + negatives)]
    columns = [list(range(batch)), *passages]
    if case["negative_queries"]:
        first = batch + len(case["passages"])
        columns += [list(range(first + i, first + batch * negatives, negatives)) for i in range(negatives)]
    loss = loss_class(
        model,
        scale=1 / case["temperature"],
        penalty_weight=case["weight"],
        queries_per_negative=1 if case["negative_queries"] else 0,
        similarity_fct=dot_score,
    )

    value, gradients = run_loss(loss, columns)

    expected = [case["grad_query"], case["grad_passages"], case["grad_negative_queries"] or []]
    expected_gradients = torch.tensor([row for part in expected for row in part], dtype=torch.float64)
    assert value.item() == pytest.approx(case["loss"], abs=1e-9, rel=0)
    assert_close(gradients.reshape(expected_gradients.shape), expected_gradients, atol=1e-9, rtol=0)
