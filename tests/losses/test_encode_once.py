"""A document that stands in a batch several times is encoded once, and the loss is the same."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from sentence_transformers import SentenceTransformer

from st_clp.losses import CachedCLPLoss, CLPLoss

LOSSES: list[Any] = [CLPLoss, CachedCLPLoss]
DOCUMENTS = ["the river", "the king of war is old", "bread", "one lake two lake three lake", "peace"]
QUERIES = ["which river", "who was king", "what is bread", "where is the big lake", "when was peace"]


@pytest.mark.parametrize("loss_class", LOSSES)
@pytest.mark.parametrize("settings", [{}, {"penalty": "contrastive", "margin": 0.01}, {"in_batch_negatives": False}])
def test_the_loss_and_its_gradients_are_those_of_every_copy(
    settings: dict[str, Any], loss_class: Any, tiny_model: SentenceTransformer, run_loss: Any, assert_close: Any
) -> None:
    tiny_model.double().train()
    columns = [QUERIES, *([DOCUMENTS[i] for i in order] for order in ([0, 0, 1, 1, 2], [1, 3, 0, 4, 0])), QUERIES[::-1]]
    expected = run_loss(CLPLoss(tiny_model, **settings), columns)
    found = run_loss(loss_class(tiny_model, encode_once=True, **settings), columns)
    assert_close(found, expected, rtol=1e-9, atol=1e-10)
    assert expected[1].abs().max() > 1e-4


@given(
    places=st.lists(st.tuples(st.integers(0, 4), st.integers(0, 4), st.integers(0, 4)), min_size=1, max_size=7),
    form=st.sampled_from(["padded", "packed", "no tokens"]),
)
def test_whatever_is_repeated(
    places: list[tuple[int, int, int]], form: str, lookup_model: Callable[..., Any], run_loss: Any
) -> None:
    table = torch.randn(10, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    columns = [[5 + number % 5 for number in range(len(places))], *map(list, zip(*places, strict=True))]
    expected = run_loss(CLPLoss(lookup_model(table, form), queries_per_negative=0), columns)
    found = run_loss(CLPLoss(lookup_model(table, form), queries_per_negative=0, encode_once=True), columns)
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("loss_class", LOSSES)
def test_the_model_reads_each_document_once(loss_class: Any, tiny_model: SentenceTransformer) -> None:
    read: list[int] = []
    tiny_model.register_forward_pre_hook(lambda module, arguments: read.append(len(arguments[0]["input_ids"])))
    columns = [[*QUERIES[:4]], [DOCUMENTS[0]] * 3 + [DOCUMENTS[1]], [DOCUMENTS[1]] * 3 + [DOCUMENTS[0]]]
    passes = 2 if loss_class is CachedCLPLoss else 1  # the cached loss encodes everything twice
    for once, texts in ((False, 4 + 8), (True, 4 + 2)):
        read.clear()
        loss = loss_class(tiny_model, queries_per_negative=0, encode_once=once)
        loss([tiny_model.preprocess(column) for column in columns]).backward()
        assert sum(read) == passes * texts
