"""What training makes of the experts: they share the work, and two kinds of text part company."""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest
import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.losses import (
    CachedMultipleNegativesRankingLoss,
    MultipleNegativesRankingLoss,
)

import st_clp
from st_clp.moe import expert_usage, reset_usage

KINDS = (
    "river lake mountain city country money bank language people capital north south east west red blue".split(),
    list("bcdfghjklmnpqrst"),
)


def two_kinds(make_tiny_model: Callable[..., SentenceTransformer], seed: int) -> SentenceTransformer:
    """A tiny model that embeds the words of one kind a little to one side, as trained models do languages."""
    model = make_tiny_model(seed=seed)
    side = torch.randn(32, generator=torch.Generator().manual_seed(seed))
    ids = model.tokenizer.convert_tokens_to_ids(KINDS[1])
    with torch.no_grad():
        model[0].model.embeddings.word_embeddings.weight[ids] += 0.008 * side
    return model


def pair(kind: int, draw: random.Random) -> tuple[str, str]:
    """A text and what it is to be found by: each kind has another rule."""
    words = KINDS[kind]
    chosen = [draw.randrange(len(words)) for _ in range(4)]
    other = [(index + 7) % len(words) if kind == 0 else len(words) - 1 - index for index in chosen]
    return " ".join(words[i] for i in chosen), " ".join(words[i] for i in other)


def train(model: SentenceTransformer, loss: torch.nn.Module, steps: int, seed: int, columns: int = 2) -> None:
    draw = random.Random(seed)
    optimizer = torch.optim.AdamW([value for value in model.parameters() if value.requires_grad], lr=1e-3)
    model.train()
    for _ in range(steps):
        rows = [pair(draw.randrange(2), draw) for _ in range(24)]
        if columns == 4:
            rows = [(*row, *pair(draw.randrange(2), draw)[::-1]) for row in rows]  # type: ignore[misc]
        features = [model.preprocess(list(column)) for column in zip(*rows, strict=True)]
        optimizer.zero_grad()
        loss(features, None).backward()
        optimizer.step()
    model.eval()


def separation(model: SentenceTransformer) -> float:
    """How differently the kinds use the experts: 0 alike, 1 wholly apart; the mean over the layers."""
    draw = random.Random(99)
    texts = [pair(kind, draw)[0] for kind in (0, 1) for _ in range(100)]
    usage = expert_usage(model, texts, by=["words"] * 100 + ["letters"] * 100)
    gaps = []
    for layer in usage.layers:
        words, letters = ([count / sum(layer.groups[k]) for count in layer.groups[k]] for k in ("words", "letters"))
        gaps.append(sum(abs(a - b) for a, b in zip(words, letters, strict=True)) / 2)
    return sum(gaps) / len(gaps)


def test_training_separates_two_kinds_of_text(make_tiny_model: Callable[..., SentenceTransformer]) -> None:
    learned, fixed = [], []
    for seed in range(2):
        for routing, found in (("learned", learned), ("reference", fixed)):
            model = st_clp.upcycle(two_kinds(make_tiny_model, seed), seed=seed, routing=routing)
            st_clp.train_only(model, "moe")
            train(model, MultipleNegativesRankingLoss(model), 120, seed)
            found.append(separation(model))
    assert sum(learned) / 2 > sum(fixed) / 2 + 0.1, (learned, fixed)


@pytest.mark.parametrize("name", ["CLPLoss", "CachedCLPLoss", "MNRL", "CachedMNRL"])
def test_use_stays_even_under_every_loss(tiny_model: SentenceTransformer, name: str) -> None:
    model = st_clp.upcycle(tiny_model, 4)
    st_clp.train_only(model, "moe")
    losses = {
        "MNRL": lambda: MultipleNegativesRankingLoss(model),
        "CachedMNRL": lambda: CachedMultipleNegativesRankingLoss(model, mini_batch_size=8),
        "CLPLoss": lambda: st_clp.CLPLoss(model),
        "CachedCLPLoss": lambda: st_clp.CachedCLPLoss(model, mini_batch_size=8),
    }
    train(model, losses[name](), 25, seed=1, columns=4 if "CLP" in name else 2)
    reset_usage(model)
    draw = random.Random(5)
    model.encode([pair(kind, draw)[0] for kind in (0, 1) for _ in range(100)])
    for layer in expert_usage(model).layers:
        assert max(layer.shares) * 4 < 1.5, layer
        assert min(layer.shares) * 4 > 1 / 1.5, layer
