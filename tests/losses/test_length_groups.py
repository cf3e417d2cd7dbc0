"""Texts of like length share a forward pass: the embeddings stay what they are, and less of the work is padding."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sentence_transformers import SentenceTransformer
from sentence_transformers.base.losses.merged_forward import column_merging_disabled, embed_columns
from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss

from st_clp import CachedCLPLoss, CLPLoss
from st_clp.losses.forward import embed_by_length, tokens_to_embed
from st_clp.losses.host_texts import HostTexts
from st_clp.losses.passes import ON_CPU, ON_GPU, PassCost, length_groups

SHORT, LONG = "which river", "the big river of the north is one lake and two mountain in the west of the old stone " * 3
COLUMNS = [[SHORT] * 20 + [LONG], ["who was king"] * 10 + [LONG] * 2 + ["the king of war is queen"] * 9]


def passes_of(model: SentenceTransformer) -> list[tuple[int, int]]:
    """A list that gets the shape of every forward pass from now on."""
    shapes: list[tuple[int, int]] = []
    model.register_forward_pre_hook(lambda _, arguments: shapes.append(tuple(arguments[0]["input_ids"].shape)))
    return shapes


def features_of(model: SentenceTransformer) -> list[dict[str, Any]]:
    return [model.preprocess(column) for column in COLUMNS]


def embed(model: SentenceTransformer, columns: list[dict[str, Any]]) -> list[torch.Tensor]:
    """As one kind of texts."""
    return embed_by_length(model, [columns], [[HostTexts.of(column) for column in columns]])


def tokens_of(shapes: list[tuple[int, int]]) -> int:
    return sum(rows * width for rows, width in shapes)


def test_embeddings_are_the_same_and_fewer_tokens_are_padding(tiny_model: SentenceTransformer) -> None:
    plain = embed_columns(tiny_model, features_of(tiny_model), separate_first=False)
    shapes = passes_of(tiny_model)
    grouped = embed(tiny_model, features_of(tiny_model))
    for one, other in zip(grouped, plain, strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-5)
    lengths = [int(row.sum()) for features in features_of(tiny_model) for row in features["attention_mask"]]
    assert sum(rows for rows, _ in shapes) == len(lengths) == 42
    assert len(shapes) > 1
    assert sum(lengths) <= tokens_of(shapes) < 42 * max(lengths) / 2
    assert tokens_of(shapes) == tokens_to_embed([np.array(lengths)], tiny_model.device)


def test_padding_on_the_left_stays_as_the_positions_depend_on_it(tiny_model: SentenceTransformer) -> None:
    tiny_model.tokenizer.padding_side = "left"
    plain = embed_columns(tiny_model, features_of(tiny_model), separate_first=False)
    shapes = passes_of(tiny_model)
    for one, other in zip(embed(tiny_model, features_of(tiny_model)), plain, strict=True):
        torch.testing.assert_close(one, other)
    assert len(shapes) == 1


@pytest.mark.parametrize("side", ["right", "left"])
def test_the_cached_loss_embeds_by_length_too(tiny_model: SentenceTransformer, side: str) -> None:
    tiny_model.tokenizer.padding_side = side
    anchors = [f"{LONG if number % 4 == 3 else 'river'} {number}" for number in range(16)]
    columns = [anchors, [f"the stone of {text}" for text in anchors]]
    values, tokens = [], []
    for options in ({}, {"mini_batch_size": 4}):
        loss = (CachedCLPLoss if options else CLPLoss)(tiny_model, penalty_weight=0, queries_per_negative=0, **options)
        tiny_model.zero_grad()
        shapes = passes_of(tiny_model)
        value = loss([tiny_model.preprocess(column) for column in columns], None)
        value.backward()
        gradients = [one.grad.clone() for one in tiny_model.parameters() if one.grad is not None]
        values.append((value.detach(), gradients))
        tokens.append(tokens_of(shapes))
    torch.testing.assert_close(values[1], values[0], atol=1e-4, rtol=1e-3)
    widest = max(tiny_model.preprocess(column)["input_ids"].shape[1] for column in columns)
    # Twice, without and with gradients; a quarter of the mini-batches is wide.
    assert (tokens[1] < 2 * 32 * widest / 2) == (side == "right")


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
        found.append((value.detach(), gradients, tokens_of(shapes)))
    (grouped, gradients, tokens), (plain, expected, more) = found
    assert tokens < more / 2
    torch.testing.assert_close(grouped, plain, atol=1e-4, rtol=1e-4)
    for one, other in zip(gradients, expected, strict=True):
        torch.testing.assert_close(one, other, atol=1e-4, rtol=1e-3)


def test_one_pass_where_others_need_as_many(tiny_model: SentenceTransformer, monkeypatch: pytest.MonkeyPatch) -> None:
    features = features_of(tiny_model)
    shapes = passes_of(tiny_model)
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    embed(tiny_model, features)
    assert len(shapes) == 1


def test_each_column_in_a_pass_of_its_own_where_a_loss_around_it_needs_that(tiny_model: SentenceTransformer) -> None:
    features = features_of(tiny_model)
    shapes = passes_of(tiny_model)
    with column_merging_disabled():
        embed(tiny_model, features)
    assert [rows for rows, _ in shapes] == [21, 21]
    assert all("sentence_embedding" in column for column in features)  # which it reads


COSTS = st.sampled_from([ON_CPU, ON_GPU, PassCost(device=3), PassCost(device=1, host=300), PassCost(20, 400, 4)])


def cost_of(groups: list[list[int]], cost: PassCost) -> int:
    """What these passes take, by the lengths of their texts."""
    return cost.of(sum(len(group) * cost.round_up(max(group)) for group in groups), len(groups))


@settings(max_examples=200, deadline=None)
@given(st.lists(st.integers(1, 400), min_size=1, max_size=200), COSTS)
def test_every_text_is_in_one_group_and_groups_follow_by_length(lengths: list[int], cost: PassCost) -> None:
    groups = length_groups(np.array(lengths), cost)
    assert sorted(np.concatenate(groups).tolist()) == list(range(len(lengths)))
    assert all((np.diff(group) > 0).all() for group in groups)
    found = [[lengths[place] for place in group] for group in groups]
    assert all(max(one) < min(other) for one, other in itertools.pairwise(found))
    assert cost_of(found, cost) <= cost_of([lengths], cost)


@settings(max_examples=200, deadline=None)
@given(st.lists(st.sampled_from([1, 7, 20, 33, 64, 130]), min_size=1, max_size=40), st.integers(1, 30), COSTS)
def test_no_other_groups_take_less(lengths: list[int], longer: int, cost: PassCost) -> None:
    lengths = [longer * length for length in lengths]
    widths = sorted(set(lengths))
    found = [[lengths[place] for place in group] for group in length_groups(np.array(lengths), cost)]
    for cuts in itertools.product([False, True], repeat=len(widths) - 1):
        ends = [width for width, cut in zip(widths, cuts, strict=False) if cut] + [widths[-1]]
        starts = [0, *ends[:-1]]
        other = [[n for n in lengths if start < n <= end] for start, end in zip(starts, ends, strict=True)]
        assert cost_of(found, cost) <= cost_of(other, cost)
