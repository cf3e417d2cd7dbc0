"""Training with another dropout than the model's own."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import StaticEmbedding
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import ModernBertConfig, ModernBertModel

from st_clp.moe import load
from st_clp.run import stages
from st_clp.run.modelling import prepare_model, set_dropout
from st_clp.settings import RunSettings, SettingsError
from tests.toy import settings_of


@pytest.mark.parametrize("experts", [0, 2])
@pytest.mark.parametrize("dropout", [None, 0.0, 0.5])
def test_a_model_trains_with_the_dropout_that_is_asked_for(
    make_tiny_model: Callable[..., SentenceTransformer], dropout: float | None, experts: int
) -> None:
    model = make_tiny_model(dropout=0.1)
    prepare_model(model, RunSettings(dropout=dropout, experts=experts))
    model.train()
    features = model.preprocess(["the king of the north", "a cat"])
    once, again = (model(dict(features))["sentence_embedding"] for _ in range(2))
    assert torch.equal(once, again) == (dropout == 0)
    shares = {module.p for module in model.modules() if isinstance(module, torch.nn.Dropout)}
    assert shares == {0.1 if dropout is None else dropout}


def test_the_dropout_of_attention_is_set_where_it_is_a_number() -> None:
    encoder = ModernBertModel(
        ModernBertConfig(
            vocab_size=32, hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2,
            attention_dropout=0.25, mlp_dropout=0.25, pad_token_id=0,
        )
    )  # fmt: skip
    set_dropout(encoder, 0.0)
    attentions = [layer.attn for layer in encoder.layers]
    assert [attention.attention_dropout for attention in attentions] == [0.0, 0.0]


def test_a_run_without_dropout_saves_a_model_with_its_own(
    make_tiny_model: Callable[..., SentenceTransformer], collection_path: Path, tmp_path: Path
) -> None:
    make_tiny_model(dropout=0.2).save(str(tmp_path / "base"))
    losses = []
    for dropout in (None, 0.0):
        settings = settings_of(tmp_path / "base", collection_path, tmp_path / f"run {dropout}", dropout=dropout)
        losses.append([entry["loss"] for entry in stages.run(settings)["training"]["history"]])
        saved = load(str(tmp_path / f"run {dropout}"))
        assert {module.p for module in saved.modules() if isinstance(module, torch.nn.Dropout)} == {0.2}
    assert losses[1][-1] < losses[0][-1]


def test_a_model_without_dropout_and_a_share_beyond_bounds_are_refused() -> None:
    words = StaticEmbedding(Tokenizer(WordLevel({"cat": 0, "[UNK]": 1}, unk_token="[UNK]")), embedding_dim=8)
    model = SentenceTransformer(modules=[words], device="cpu")
    set_dropout(model, 0.0)
    with pytest.raises(SettingsError, match="dropout: this model has no layers with dropout"):
        set_dropout(model, 0.1)
    with pytest.raises(SettingsError, match=r"dropout must be at least 0 and at most 0\.9, got 1"):
        RunSettings(dropout=1.0)
