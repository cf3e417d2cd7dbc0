"""Packed linear layers: the same embeddings, in a copy of the model alone, and wherever they cannot be, without."""

from __future__ import annotations

import copy
from collections.abc import Iterator

import numpy as np
import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from sentence_transformers import SentenceTransformer
from torch import nn

from st_clp import upcycle
from st_clp.encoding import encode_documents, working_model
from st_clp.encoding.packing import PackedLinear, pack_linear_layers
from st_clp.encoding.working_model import WorkingModel, hardware_has_bf16

TEXTS = ["a big river", "the old lake of the north", "fire", "who was king?", "one two three four five six", "bird"]

can_pack = pack_linear_layers(nn.Sequential(nn.Linear(4, 4))) == 1
needs_packing = pytest.mark.skipif(not can_pack, reason="PyTorch packs no weights for this processor")
needs_bf16 = pytest.mark.skipif(
    not can_pack or not hardware_has_bf16(torch.device("cpu")), reason="this processor multiplies no bfloat16"
)

SIZES = {"vocab_size": 99, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
ARCHITECTURES: dict[str, dict[str, int]] = {
    "Bert": SIZES,
    "XLMRoberta": SIZES,
    "ModernBert": {**SIZES, "local_attention": 6, "cls_token_id": 2, "sep_token_id": 3},
    "MPNet": SIZES,
    "Electra": {**SIZES, "embedding_size": 16},
    "DistilBert": {"vocab_size": 99, "dim": 32, "hidden_dim": 64, "n_layers": 2, "n_heads": 4},
    "Albert": {**SIZES, "embedding_size": 16},
    "T5": {"vocab_size": 99, "d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4},
    "Qwen3": {**SIZES, "num_key_value_heads": 2, "head_dim": 8},
}


def linear_layers(model: nn.Module) -> Iterator[nn.Linear]:
    return (module for module in model.modules() if isinstance(module, nn.Linear))


@needs_packing
@settings(max_examples=30, deadline=None)
@given(
    rows=st.integers(0, 70),
    given=st.integers(1, 40),
    out=st.integers(1, 40),
    bias=st.booleans(),
    seed=st.integers(0, 99),
)
def test_a_packed_layer_gives_what_the_plain_one_gives(rows: int, given: int, out: int, bias: bool, seed: int) -> None:
    torch.manual_seed(seed)
    layers = nn.Sequential(nn.Linear(given, out, bias=bias))
    hidden = torch.randn(2, rows, given)
    with torch.inference_mode():
        expected = layers(hidden)
        assert pack_linear_layers(layers) == 1
        torch.testing.assert_close(layers(hidden), expected)


@needs_packing
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_every_encoder_gives_the_same_states(name: str) -> None:
    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(
        **ARCHITECTURES[name], pad_token_id=1, bos_token_id=2, eos_token_id=3
    )
    model = getattr(transformers, "T5EncoderModel" if name == "T5" else f"{name}Model")(config).eval()
    for parameter in model.parameters():
        parameter.data.normal_(std=0.1)  # biases too, which begin as zeros
    packed = copy.deepcopy(model)
    assert pack_linear_layers(packed) == len(list(linear_layers(model))) > 0
    ids = torch.randint(4, 99, (3, 17))
    kept = torch.ones_like(ids)
    kept[1, 5:] = 0
    with torch.inference_mode():
        found, right = (m(input_ids=ids, attention_mask=kept).last_hidden_state for m in (packed, model))
    torch.testing.assert_close(found[kept.bool()], right[kept.bool()], atol=1e-5, rtol=1e-5)


@needs_bf16
def test_a_processors_bfloat16_copy_is_packed_and_the_model_is_not(tiny_model: SentenceTransformer) -> None:
    working = WorkingModel(tiny_model, "document", "bfloat16")
    assert all(type(layer) is PackedLinear for layer in linear_layers(working._runs[0].model))
    assert all(type(layer) is nn.Linear for layer in linear_layers(tiny_model))


@needs_bf16
def test_packed_or_not_the_embeddings_are_those_of_the_model(
    tiny_model: SentenceTransformer, monkeypatch: pytest.MonkeyPatch
) -> None:
    def encoded() -> np.ndarray:
        return np.concatenate(list(encode_documents(tiny_model, TEXTS, dtype="bfloat16")))

    packed = encoded()
    monkeypatch.setattr(working_model, "pack_linear_layers", lambda encoder: 0)
    assert (packed * encoded()).sum(axis=1).min() > 0.9999
    assert (packed * tiny_model.encode_document(TEXTS)).sum(axis=1).min() > 0.999


@needs_packing
def test_experts_stay_as_they_are(tiny_model: SentenceTransformer) -> None:
    """A mixture multiplies by its experts' weights itself; a packed expert would send it the slower way round."""
    encoder = upcycle(tiny_model, projection="feed_forward")[0].model
    pack_linear_layers(encoder)
    layers = {name: type(layer) for name, layer in encoder.named_modules() if isinstance(layer, nn.Linear)}
    assert {kind for name, kind in layers.items() if ".experts." in name} == {nn.Linear}
    assert {kind for name, kind in layers.items() if ".experts." not in name} == {PackedLinear}


def test_where_nothing_can_be_packed_the_encoder_stays_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    class Other(nn.Linear):
        """Not a plain linear layer: its forward may be anything."""

    assert pack_linear_layers(nn.Sequential(Other(4, 4), nn.ReLU())) == 0
    layers = nn.Sequential(nn.Linear(4, 4))
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    assert pack_linear_layers(layers) == 0
    assert type(layers[0]) is nn.Linear
