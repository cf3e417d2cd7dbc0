"""Texts of like length share a forward pass: the embeddings stay what they are, and less of the work is padding."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sentence_transformers import SentenceTransformer
from sentence_transformers.base.losses.merged_forward import column_merging_disabled, embed_columns
from sentence_transformers.base.modules import Transformer
from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss
from sentence_transformers.sentence_transformer.modules import Pooling

from st_clp import CLPLoss
from st_clp.losses.forward import PASS, embed_by_length, length_groups

SHORT, LONG = "which river", "the big river of the north is one lake and two mountain in the west of the old stone " * 3
COLUMNS = [[SHORT] * 20 + [LONG], ["who was king"] * 10 + [LONG] * 2 + ["the king of war is queen"] * 9]


@pytest.fixture(params=["right", "left"])
def model(request: pytest.FixtureRequest, tiny_model: SentenceTransformer, tiny_t5_path: Path) -> SentenceTransformer:
    """Padding on either side; that on the left for positions that are relative, as models have that pad there."""
    if request.param == "right":
        return tiny_model
    transformer = Transformer(str(tiny_t5_path))
    t5 = SentenceTransformer(modules=[transformer, Pooling(transformer.get_embedding_dimension())], device="cpu")
    t5.tokenizer.padding_side = "left"
    return t5.eval()


def passes_of(model: SentenceTransformer) -> list[tuple[int, int]]:
    """A list that gets the shape of every forward pass from now on."""
    shapes: list[tuple[int, int]] = []
    model.register_forward_pre_hook(lambda _, arguments: shapes.append(tuple(arguments[0]["input_ids"].shape)))
    return shapes


def features_of(model: SentenceTransformer) -> list[dict[str, Any]]:
    return [model.preprocess(column) for column in COLUMNS]


def test_embeddings_are_the_same_and_fewer_tokens_are_padding(model: SentenceTransformer) -> None:
    plain = embed_columns(model, features_of(model), separate_first=False)
    shapes = passes_of(model)
    grouped = embed_by_length(model, features_of(model))
    assert [column.shape for column in grouped] == [column.shape for column in plain]
    for one, other in zip(grouped, plain, strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-5)
    lengths = [int(row.sum()) for features in features_of(model) for row in features["attention_mask"]]
    assert sum(rows for rows, _ in shapes) == len(lengths) == 42
    padded = sum(rows * width for rows, width in shapes)
    assert len(shapes) > 1
    assert sum(lengths) <= padded < 42 * max(lengths) / 2


def test_the_loss_and_its_gradients_are_those_of_one_pass(
    tiny_model: SentenceTransformer, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = []
    for loss in (
        CLPLoss(tiny_model, penalty_weight=0, queries_per_negative=0),
        MultipleNegativesRankingLoss(tiny_model, scale=50),
    ):
        tiny_model.zero_grad()
        anchors = [f"{text} {number}" for number, text in enumerate(["river", "king", "lake", LONG] * 4)]
        positives = [f"{LONG if number % 5 == 0 else 'the stone of'} {number}" for number in range(16)]
        shapes = passes_of(tiny_model)
        value = loss([tiny_model.preprocess(anchors), tiny_model.preprocess(positives)], None)
        value.backward()
        gradients = [None if one.grad is None else one.grad.clone() for one in tiny_model.parameters()]
        found.append((value.detach(), gradients, len(shapes)))
    (grouped, gradients, passes), (plain, expected, once) = found
    assert passes > once
    torch.testing.assert_close(grouped, plain, atol=1e-4, rtol=1e-4)
    for one, other in zip(gradients, expected, strict=True):
        torch.testing.assert_close(one, other, atol=1e-4, rtol=1e-3)


def test_one_pass_where_others_need_as_many(tiny_model: SentenceTransformer, monkeypatch: pytest.MonkeyPatch) -> None:
    features = features_of(tiny_model)
    shapes = passes_of(tiny_model)
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    embed_by_length(tiny_model, features)
    assert len(shapes) == 1


def test_each_column_in_a_pass_of_its_own_where_a_loss_around_it_needs_that(tiny_model: SentenceTransformer) -> None:
    features = features_of(tiny_model)
    shapes = passes_of(tiny_model)
    with column_merging_disabled():
        embed_by_length(tiny_model, features)
    assert [rows for rows, _ in shapes] == [21, 21]
    assert all("sentence_embedding" in column for column in features)  # which it reads


def cost(groups: list[list[int]]) -> int:
    return sum(len(group) * max(group) + PASS for group in groups)


@settings(max_examples=200, deadline=None)
@given(st.lists(st.integers(1, 400), min_size=1, max_size=200), st.data())
def test_every_text_is_in_one_group_and_groups_follow_by_length(lengths: list[int], data: st.DataObject) -> None:
    groups = length_groups(np.array(lengths))
    assert sorted(np.concatenate(groups).tolist()) == list(range(len(lengths)))
    found = [[lengths[place] for place in group] for group in groups]
    assert all(max(one) < min(other) for one, other in itertools.pairwise(found))
    assert cost(found) <= cost([lengths])


@settings(max_examples=100, deadline=None)
@given(st.lists(st.sampled_from([1, 7, 20, 33, 64, 130]), min_size=1, max_size=40))
def test_no_other_groups_take_less(lengths: list[int]) -> None:
    widths = sorted(set(lengths))
    found = [[lengths[place] for place in group] for group in length_groups(np.array(lengths))]
    for cuts in itertools.product([False, True], repeat=len(widths) - 1):
        ends = [width for width, cut in zip(widths, cuts, strict=False) if cut] + [widths[-1]]
        starts = [0, *ends[:-1]]
        other = [[n for n in lengths if start < n <= end] for start, end in zip(starts, ends, strict=True)]
        assert cost(found) <= cost(other)
