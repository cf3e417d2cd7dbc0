"""Seeing the experts."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from sentence_transformers import SentenceTransformer

import st_clp
from st_clp.moe import expert_usage, reset_usage

TEXTS = ["a cat on the river", "the king", "what is the capital of a country", "red green blue " * 8]
LANGUAGES = ["en", "fa", "en", "fa"]


def test_usage_by_group_adds_up(tiny_model: SentenceTransformer) -> None:
    model = st_clp.upcycle(tiny_model, 3)
    model.encode(TEXTS[:1])
    before = expert_usage(model)
    usage = expert_usage(model, TEXTS, by=LANGUAGES)
    tokens = int(model.preprocess(TEXTS)["attention_mask"].sum())
    assert len(usage.layers) == 2
    for layer in usage.layers:
        assert sum(layer.tokens) == tokens
        assert [sum(pair) for pair in zip(*layer.groups.values(), strict=True)] == layer.tokens
        assert list(layer.groups) == ["en", "fa"]
        assert sum(layer.shares) == pytest.approx(1)
        assert layer.entropy is not None
        assert 0.9 < layer.entropy <= 1  # a router that was just drawn is undecided
        assert set(layer.distances) == {"0-1", "0-2", "1-2"}
        assert set(layer.distances.values()) == {0.0}
    assert expert_usage(model) == before  # measuring texts leaves the running counts alone
    json.dumps(usage.to_dict())
    assert "en:" in str(usage)


def test_distance_and_entropy_follow_the_weights(tiny_model: SentenceTransformer) -> None:
    model = st_clp.upcycle(tiny_model)
    up = model[0].model.encoder.layer[0].intermediate.dense
    with torch.no_grad():
        up.experts[1].weight.mul_(-1)
        up.gate.weight.mul_(1e4)
    layer = expert_usage(model, TEXTS).layers[0]
    assert layer.distances["0-1"] == pytest.approx(2.0)
    assert layer.entropy is not None
    assert layer.entropy < 0.1


def test_a_dead_expert_is_reported(tiny_model: SentenceTransformer) -> None:
    model = st_clp.upcycle(tiny_model, 3)
    assert expert_usage(model).dead == []  # nothing has gone through yet
    model[0].model.encoder.layer[1].intermediate.dense.gate.balance_bias[2] = -1e6
    usage = expert_usage(model, TEXTS)
    assert (1, 2) in usage.dead
    assert "hardly used: 2" in str(usage)


def test_reset_starts_from_zero(tiny_model: SentenceTransformer) -> None:
    model = st_clp.upcycle(tiny_model)
    model.encode(TEXTS)
    assert any(expert_usage(model).layers[0].tokens)
    reset_usage(model)
    assert expert_usage(model).layers[0].tokens == [0, 0]
    assert expert_usage(model).layers[0].shares == [0.0, 0.0]


def test_what_cannot_be_reported_is_refused(tiny_model: SentenceTransformer) -> None:
    with pytest.raises(ValueError, match="no mixture of experts"):
        expert_usage(tiny_model)
    with pytest.raises(ValueError, match="2 names for 4 texts"):
        expert_usage(st_clp.upcycle(tiny_model), TEXTS, by=["en", "fa"])
    with pytest.raises(ValueError, match="texts is empty"):
        expert_usage(tiny_model, [])
    assert sum(expert_usage(tiny_model, [""]).layers[0].tokens) == 2  # [CLS] and [SEP]


def test_a_plot(tiny_model: SentenceTransformer, tmp_path: Path) -> None:
    usage = expert_usage(st_clp.upcycle(tiny_model), TEXTS, by=LANGUAGES)
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        with pytest.raises(ImportError, match="pip install 'st-clp"):
            usage.plot(tmp_path / "usage.png")
        return
    usage.plot(tmp_path / "usage.png")
    assert (tmp_path / "usage.png").read_bytes().startswith(b"\x89PNG")
