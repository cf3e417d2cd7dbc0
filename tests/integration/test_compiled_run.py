"""A run whose layers are compiled for the training."""

from __future__ import annotations

import copy
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import StaticEmbedding
from tokenizers import Tokenizer
from tokenizers.models import WordLevel

from st_clp.run import stages, training_stage
from st_clp.run.modelling import compiled_layers
from st_clp.settings import SettingsError
from tests.toy import settings_of


@pytest.mark.parametrize("experts", [0, 2])
def test_a_run_with_compiled_layers_trains_what_any_run_does(
    tiny_model_path: Path, collection_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, experts: int
) -> None:
    short = {"experts": experts, "epochs": 1}
    plain = stages.run(settings_of(tiny_model_path, collection_path, tmp_path / "plain", **short))
    torch.compiler.reset()
    passes: list[int] = []

    def traced(graph: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> object:
        passes.append(len(inputs))
        return graph.forward

    monkeypatch.setattr(training_stage, "compiled_layers", partial(compiled_layers, backend=traced))
    settings = settings_of(tiny_model_path, collection_path, tmp_path / "compiled", **short, compile_layers=True)
    report = stages.run(settings)
    assert passes
    name = f"{collection_path}/dev"
    before, after = (report["scores"][when][name]["ndcg@10"] for when in ("before", "after"))
    assert after > before
    losses = [[entry["loss"] for entry in found["training"]["history"]] for found in (plain, report)]
    # which tokens are tried for the routers depends on the bits of their weights; compiled layers round otherwise
    np.testing.assert_allclose(losses[1][:2], losses[0][:2], rtol=1e-2)
    if not experts:
        np.testing.assert_allclose(losses[1], losses[0], rtol=1e-3)


def test_layers_are_compiled_while_it_lasts_and_not_for_copies(tiny_model: SentenceTransformer) -> None:
    expected = tiny_model.encode(["a cat", "the king of the north"])
    layers = tiny_model[0].model.encoder.layer
    with compiled_layers(tiny_model, backend="eager"):
        assert all(layer._compiled_call_impl is not None for layer in layers)
        assert copy.deepcopy(tiny_model)[0].model.encoder.layer[0]._compiled_call_impl is None
        np.testing.assert_allclose(tiny_model.encode(["a cat", "the king of the north"]), expected, atol=1e-6)
    assert all(layer._compiled_call_impl is None for layer in layers)


def test_a_model_without_layers_is_refused() -> None:
    words = StaticEmbedding(Tokenizer(WordLevel({"cat": 0, "[UNK]": 1}, unk_token="[UNK]")), embedding_dim=8)
    model = SentenceTransformer(modules=[words], device="cpu")
    refused = pytest.raises(SettingsError, match="compile_layers: the encoder of this model has no layers")
    with refused, compiled_layers(model):
        pass
