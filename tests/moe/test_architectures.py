"""Every architecture, built tiny: conversion, training, saving."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Normalize, Pooling, Transformer
from torch import nn
from transformers import AutoTokenizer

import st_clp
from st_clp.moe import convert, is_moe, known_architectures, register_architecture

TEXTS = ["a cat on the river", "the king", "what is the capital of a country", "red green blue " * 8]
COMMON: dict[str, Any] = {
    "vocab_size": 200,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "max_position_embeddings": 80,
}
GROUPED = {**COMMON, "num_key_value_heads": 4, "head_dim": 8, "pad_token_id": 0, "bos_token_id": 2, "eos_token_id": 3}
T5 = {"vocab_size": 200, "d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4}
ENCODERS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "bert": ("BertModel", "BertConfig", COMMON),
    "roberta": ("RobertaModel", "RobertaConfig", COMMON),
    "xlm-roberta": ("XLMRobertaModel", "XLMRobertaConfig", COMMON),
    "mpnet": ("MPNetModel", "MPNetConfig", COMMON),
    "electra": ("ElectraModel", "ElectraConfig", {**COMMON, "embedding_size": 16}),
    "distilbert": (
        "DistilBertModel",
        "DistilBertConfig",
        {"vocab_size": 200, "dim": 32, "n_layers": 2, "n_heads": 4, "hidden_dim": 64, "max_position_embeddings": 80},
    ),
    "modernbert": (
        "ModernBertModel",
        "ModernBertConfig",
        {**COMMON, "pad_token_id": 0, "bos_token_id": 2, "eos_token_id": 3, "cls_token_id": 2, "sep_token_id": 3},
    ),
    "t5": ("T5EncoderModel", "T5Config", T5),
    "t5 gated": ("T5EncoderModel", "T5Config", {**T5, "feed_forward_proj": "gated-gelu"}),
    "nomic_bert": ("NomicBertModel", "NomicBertConfig", COMMON),
    "gte": ("GteModel", "GteConfig", GROUPED),
    "eurobert": ("EuroBertModel", "EuroBertConfig", {**GROUPED, "mask_token_id": 4}),
    "gemma3_text": ("Gemma3TextModel", "Gemma3TextConfig", GROUPED),
    "qwen3": ("Qwen3Model", "Qwen3Config", GROUPED),
}


@pytest.fixture
def build(tiny_model_path: Path, tmp_path: Path) -> Callable[[str], SentenceTransformer]:
    def build_model(name: str) -> SentenceTransformer:
        model_class, config_class, settings = ENCODERS[name]
        if not hasattr(transformers, model_class):
            pytest.skip(f"transformers {transformers.__version__} has no {model_class}")
        torch.manual_seed(0)
        encoder = getattr(transformers, model_class)(getattr(transformers, config_class)(**settings))
        encoder.save_pretrained(tmp_path / "encoder")
        AutoTokenizer.from_pretrained(tiny_model_path).save_pretrained(tmp_path / "encoder")
        modules = [Transformer(str(tmp_path / "encoder"), max_seq_length=64), Pooling(32, "mean"), Normalize()]
        return SentenceTransformer(modules=modules, device="cpu")

    return build_model


def embed(model: SentenceTransformer) -> torch.Tensor:
    return model.encode(TEXTS, convert_to_tensor=True)


@pytest.mark.parametrize("name", ENCODERS)
@pytest.mark.parametrize(
    ("projection", "experts", "per_token"), [("intermediate", 2, 1), ("output", 2, 1), ("feed_forward", 4, 2)]
)
def test_convert_train_and_save(
    build: Callable[[str], SentenceTransformer],
    tmp_path: Path,
    name: str,
    projection: str,
    experts: int,
    per_token: int,
) -> None:
    model = build(name)
    dense = embed(model)
    st_clp.upcycle(model, experts, per_token, projection)
    torch.testing.assert_close(embed(model), dense, atol=1e-5, rtol=0)

    st_clp.train_only(model, "moe")
    before = {key: value.detach().clone() for key, value in model.named_parameters()}
    trainable = {key for key, value in model.named_parameters() if value.requires_grad}
    optimizer = torch.optim.SGD([value for value in model.parameters() if value.requires_grad], lr=1.0)
    model.train()
    for _ in range(2):
        optimizer.zero_grad()
        (model(model.preprocess(TEXTS))["sentence_embedding"] - 1).pow(3).sum().backward()
        optimizer.step()
    model.eval()
    assert {key for key, value in model.named_parameters() if not torch.equal(value, before[key])} == trainable
    assert not torch.allclose(embed(model), dense, atol=1e-5)

    model.save(str(tmp_path / "model"))
    assert torch.equal(embed(st_clp.load(tmp_path / "model", device="cpu")), embed(model))


def test_the_list_names_what_is_promised() -> None:
    promised = {"bert", "roberta", "xlm-roberta", "mpnet", "distilbert", "modernbert", "electra", "t5"}
    assert promised <= set(known_architectures())


def test_a_user_can_add_one(build: Callable[[str], SentenceTransformer], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(convert, "_ARCHITECTURES", dict(convert._ARCHITECTURES))
    model = build("bert")
    model[0].model.config.model_type = "mine"
    with pytest.raises(ValueError, match="register_architecture"):
        st_clp.upcycle(model)
    register_architecture("mine", "encoder.layer", "intermediate.nothing", "output.dense")
    with pytest.raises(ValueError, match=r"Layer 0 .*intermediate\.nothing"):
        st_clp.upcycle(model)
    register_architecture("mine", "encoder.layer", "intermediate.dense", "output.dense")
    dense = embed(model)
    torch.testing.assert_close(embed(st_clp.upcycle(model)), dense, atol=1e-6, rtol=0)


def test_a_projection_that_is_no_plain_linear_is_refused(tiny_model: SentenceTransformer) -> None:
    tiny_model[0].model.encoder.layer[1].output.dense = nn.Sequential(tiny_model[0].model.encoder.layer[1].output.dense)
    with pytest.raises(ValueError, match=r"encoder\.layer\.1\.output\.dense is a Sequential"):
        st_clp.upcycle(tiny_model)
    assert not is_moe(tiny_model)
