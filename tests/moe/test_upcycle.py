"""Converting a model: what stays the same, what is refused, and the way back to a dense model."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.base.modules import Transformer
from sentence_transformers.sentence_transformer.modules import StaticEmbedding

import st_clp
from st_clp.moe import is_moe, known_architectures

TEXTS = ["a cat on the river", "the king", "what is the capital of a country", "red green blue " * 8]


def embed(model: SentenceTransformer) -> torch.Tensor:
    return model.encode(TEXTS, convert_to_tensor=True)


def experts_in(model: SentenceTransformer, place: str) -> list[int]:
    names = [name for name, _ in model.named_parameters() if f"{place}.dense.experts.0.weight" in name]
    return [int(name.split("layer.")[1].split(".")[0]) for name in names]


@pytest.mark.parametrize("projection", ["intermediate", "output", "feed_forward"])
@pytest.mark.parametrize(("experts", "per_token"), [(1, 1), (2, 1), (4, 2), (3, 3)])
def test_embeddings_stay_the_same(
    tiny_model: SentenceTransformer, projection: str, experts: int, per_token: int
) -> None:
    dense = embed(tiny_model)
    converted = st_clp.upcycle(tiny_model, experts, per_token, projection)
    assert converted is tiny_model
    assert isinstance(converted[0], st_clp.MoETransformer)
    torch.testing.assert_close(embed(converted), dense, atol=1e-6, rtol=0)


def test_experts_are_copies_that_train_apart(tiny_model: SentenceTransformer) -> None:
    dense = tiny_model[0].model.encoder.layer[0].intermediate.dense.weight.detach().clone()
    up = st_clp.upcycle(tiny_model, 3)[0].model.encoder.layer[0].intermediate.dense
    assert all(torch.equal(expert.weight, dense) for expert in up.experts)
    with torch.no_grad():
        up.experts[0].weight.zero_()
    assert torch.equal(up.experts[1].weight, dense)


@pytest.mark.parametrize(
    ("layers", "converted"), [("all", [0, 1]), ("every_other", [1]), ([0], [0]), ([-1], [1]), ([1, 0], [0, 1])]
)
def test_layers_that_are_named_are_converted(
    tiny_model: SentenceTransformer, layers: Any, converted: list[int]
) -> None:
    st_clp.upcycle(tiny_model, layers=layers)
    assert experts_in(tiny_model, "intermediate") == converted
    assert tiny_model[0].settings.layers == tuple(converted)


@pytest.mark.parametrize(
    ("settings", "complaint"),
    [
        ({"num_experts": 2, "num_experts_per_tok": 3}, "only 2 experts"),
        ({"num_experts": 0}, "num_experts must be"),
        ({"projection": "both"}, "intermediate, output, feed_forward"),
        ({"layers": [2]}, "no layer 2: the encoder has 2 layers, 0 to 1"),
        ({"layers": []}, "layers is empty"),
        ({"layers": [1, -1]}, "twice"),
        ({"layers": "none"}, "every_other"),
        ({"routing": "random"}, "learned, reference"),
        ({"balance": "luck"}, "bias, loss, none"),
        ({"router_sample": 2.0}, "router_sample"),
    ],
)
def test_a_wrong_setting_is_refused_and_the_model_untouched(
    tiny_model: SentenceTransformer, settings: dict[str, Any], complaint: str
) -> None:
    before, modules = copy.deepcopy(tiny_model.state_dict()), list(tiny_model.modules())
    with pytest.raises(ValueError, match=complaint):
        st_clp.upcycle(tiny_model, **settings)
    assert list(tiny_model.modules()) == modules
    assert all(torch.equal(value, before[name]) for name, value in tiny_model.state_dict().items())
    assert not hasattr(tiny_model[0].model.config, "st_clp_moe")


def test_a_model_is_converted_once(tiny_model: SentenceTransformer) -> None:
    st_clp.upcycle(tiny_model, layers=[0])
    before = list(tiny_model.modules())
    with pytest.raises(ValueError, match="already"):
        st_clp.upcycle(tiny_model, layers=[1])
    assert list(tiny_model.modules()) == before


def test_a_model_without_a_transformer_is_refused(tiny_model: SentenceTransformer) -> None:
    static = SentenceTransformer(
        modules=[StaticEmbedding(tiny_model.tokenizer.backend_tokenizer, embedding_dim=8)], device="cpu"
    )
    with pytest.raises(ValueError, match="first module is a StaticEmbedding"):
        st_clp.upcycle(static)
    with pytest.raises(TypeError, match="StaticEmbedding"):
        st_clp.MoETransformer.from_dense(static[0])


def test_an_unknown_architecture_is_refused_with_those_that_are_known(tiny_model: SentenceTransformer) -> None:
    tiny_model[0].model.config.model_type = "perceptron"
    with pytest.raises(ValueError, match="'perceptron' is not known") as refusal:
        st_clp.upcycle(tiny_model)
    assert all(name in str(refusal.value) for name in known_architectures())
    assert not is_moe(tiny_model)


def test_a_chunked_feed_forward_is_refused(tiny_model: SentenceTransformer) -> None:
    tiny_model[0].model.config.chunk_size_feed_forward = 4
    with pytest.raises(ValueError, match="chunk_size_feed_forward"):
        st_clp.upcycle(tiny_model)
    assert not is_moe(tiny_model)


def test_from_dense_leaves_the_dense_module_as_it_is(tiny_model: SentenceTransformer) -> None:
    dense = embed(tiny_model)
    mixture = st_clp.MoETransformer.from_dense(tiny_model[0], num_experts=3)
    with torch.no_grad():
        for parameter in mixture.parameters():
            parameter.zero_()
    assert type(tiny_model[0]) is Transformer
    assert torch.equal(embed(tiny_model), dense)


def test_the_routers_are_drawn_from_the_seed(tiny_model: SentenceTransformer) -> None:
    def gate(seed: int) -> torch.Tensor:
        return st_clp.MoETransformer.from_dense(tiny_model[0], seed=seed).state_dict()[
            "model.encoder.layer.1.intermediate.dense.gate.weight"
        ]

    assert torch.equal(gate(1), gate(1))
    assert not torch.equal(gate(1), gate(2))


@pytest.mark.parametrize("projection", ["intermediate", "output", "feed_forward"])
def test_to_dense_gives_back_the_dense_model(tiny_model: SentenceTransformer, projection: str) -> None:
    dense = embed(tiny_model)
    st_clp.upcycle(tiny_model, 3, projection=projection)
    again = st_clp.to_dense(tiny_model)
    assert type(again[0]) is Transformer
    assert not is_moe(again)
    assert not hasattr(again[0].model.config, "st_clp_moe")
    assert is_moe(tiny_model)
    torch.testing.assert_close(embed(again), dense, atol=1e-6, rtol=0)


def test_to_dense_takes_the_mean_or_one_expert(tiny_model: SentenceTransformer) -> None:
    up = st_clp.upcycle(tiny_model)[0].model.encoder.layer[0].intermediate.dense
    with torch.no_grad():
        up.experts[0].weight.fill_(1.0)
        up.experts[1].weight.fill_(4.0)
    for how, value in (("average", 2.5), (0, 1.0), (1, 4.0)):
        weight = st_clp.to_dense(tiny_model, how)[0].model.encoder.layer[0].intermediate.dense.weight
        assert torch.equal(weight, torch.full_like(weight, value))
    for wrong in (2, -1, "best", True):
        with pytest.raises(ValueError, match="0 to 1"):
            st_clp.to_dense(tiny_model, wrong)


def test_to_dense_of_a_dense_model_is_refused(tiny_model: SentenceTransformer) -> None:
    with pytest.raises(ValueError, match="no mixture of experts"):
        st_clp.to_dense(tiny_model)
