"""Saved models: they come back bit for bit in a fresh process, and no code from their folder runs."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Dense, Normalize, Router

import st_clp
from st_clp.moe import expert_usage, is_moe

TEXTS = ["a cat on the river", "the king", "what is the capital of a country", "red green blue " * 8]
FRESH = """
import json, sys
import numpy as np
import torch
torch.set_num_threads(1)
task = json.load(sys.stdin)
for opener, path, kwargs in task["models"]:
    if opener == "load":
        import st_clp
        model = st_clp.load(path, device="cpu", **kwargs)
    else:
        from sentence_transformers import SentenceTransformer
        model = SentenceTransformer(path, device="cpu", trust_remote_code=True, **kwargs)
    np.save(path + "." + opener + ".npy", model.encode(task["texts"], **task["encode"]))
"""


def in_a_fresh_process(path: Path, **encode: str) -> list[np.ndarray]:
    """Embed the texts with the model at ``path`` in a new process, opened in both ways."""
    models = [[opener, str(path), {}] for opener in ("load", "remote")]
    task = json.dumps({"models": models, "texts": TEXTS, "encode": encode})
    subprocess.run([sys.executable, "-c", FRESH], input=task, text=True, check=True, cwd=path, timeout=300)
    return [np.load(f"{path}.{opener}.npy") for opener in ("load", "remote")]


def trained(model: SentenceTransformer) -> SentenceTransformer:
    """Move every parameter and the balance a little, so that nothing is as it was drawn."""
    with torch.no_grad():
        for index, parameter in enumerate(model.parameters()):
            generator = torch.Generator().manual_seed(index)
            parameter += 0.02 * torch.randn(parameter.shape, generator=generator).to(parameter.dtype)
        for name, buffer in model.named_buffers():
            if "balance" in name:
                buffer.copy_(torch.linspace(-0.1234567, 0.1234567, len(buffer)))
    return model


@pytest.mark.parametrize("projection", ["intermediate", "output", "feed_forward"])
def test_a_fresh_process_gives_the_same_embeddings(
    tiny_model: SentenceTransformer, tmp_path: Path, projection: str
) -> None:
    model = trained(st_clp.upcycle(tiny_model, 3, projection=projection, layers=[1], balance_rate=0.5))
    path = tmp_path / "model"
    model.save(str(path))
    for embeddings in in_a_fresh_process(path):
        assert np.array_equal(embeddings, model.encode(TEXTS))
    loaded = st_clp.load(path, device="cpu")
    assert loaded[0].settings == model[0].settings
    assert json.loads((path / "modules.json").read_text())[0]["type"] == "st_clp.moe.MoETransformer"


def test_a_longer_pipeline_and_a_local_hub_folder(tiny_model: SentenceTransformer, tmp_path: Path) -> None:
    modules = [*list(tiny_model.children())[:2], Dense(32, 16), Normalize()]
    model = trained(st_clp.upcycle(SentenceTransformer(modules=modules, device="cpu")))
    path = tmp_path / "hub"
    model.save_pretrained(str(path))  # what push_to_hub uploads
    assert [np.array_equal(found, model.encode(TEXTS)) for found in in_a_fresh_process(path)] == [True, True]


def test_both_routes_of_a_router_model(make_tiny_model: Callable[..., SentenceTransformer], tmp_path: Path) -> None:
    query, document = make_tiny_model(seed=1), make_tiny_model(seed=2)
    router = Router.for_query_document(list(query.children()), list(document.children()))
    model = SentenceTransformer(modules=[router], device="cpu")
    dense = model.encode_query(TEXTS), model.encode_document(TEXTS)
    trained(st_clp.upcycle(model))
    path = tmp_path / "router"
    model.save(str(path))
    for loaded in (st_clp.load(path), SentenceTransformer(str(path), trust_remote_code=True)):
        assert np.array_equal(loaded.encode_query(TEXTS), model.encode_query(TEXTS))
        assert np.array_equal(loaded.encode_document(TEXTS), model.encode_document(TEXTS))
        assert len(expert_usage(loaded).layers) == 4
    assert not np.allclose(model.encode_query(TEXTS), dense[0])


def test_one_encoder_in_both_routes_stays_one(tiny_model: SentenceTransformer) -> None:
    children = list(tiny_model.children())
    model = SentenceTransformer(modules=[Router.for_query_document(children, children)], device="cpu")
    st_clp.upcycle(model)
    assert model[0].sub_modules["query"][0] is model[0].sub_modules["document"][0]


def test_bfloat16_survives_and_the_balance_stays_float32(tiny_model: SentenceTransformer, tmp_path: Path) -> None:
    model = trained(st_clp.upcycle(tiny_model))
    model.save(str(tmp_path / "full"))
    half = st_clp.load(tmp_path / "full", device="cpu", model_kwargs={"dtype": torch.bfloat16})
    bias = [(a, b) for a, b in zip(model.named_buffers(), half.named_buffers(), strict=True) if "balance" in a[0]]
    assert len(bias) == 4
    assert all(b.dtype == torch.float32 and torch.equal(a, b) for (_, a), (_, b) in bias)
    assert {parameter.dtype for parameter in half.parameters()} == {torch.bfloat16}
    assert np.abs(half.encode(TEXTS) - model.encode(TEXTS)).max() < 0.05
    half.save(str(tmp_path / "half"))
    again = st_clp.load(tmp_path / "half", device="cpu")
    assert {parameter.dtype for parameter in again.parameters()} == {torch.bfloat16}
    assert np.array_equal(again.encode(TEXTS), half.encode(TEXTS))
    assert torch.equal(dict(model.to(torch.bfloat16).named_buffers())[bias[0][0][0]], bias[0][0][1])


def test_weights_and_settings_that_disagree_are_refused(tiny_model: SentenceTransformer, tmp_path: Path) -> None:
    st_clp.upcycle(tiny_model).save(str(tmp_path))
    config = json.loads((tmp_path / "config.json").read_text())

    def refusal(**changes: object) -> str:
        changed = {**config, "st_clp_moe": {**config["st_clp_moe"], **changes}}
        (tmp_path / "config.json").write_text(json.dumps(changed))
        with pytest.raises(ValueError, match=r"disagree|does not know") as error:
            st_clp.load(tmp_path)
        return str(error.value)

    message = refusal(num_experts=3)
    assert "layer.0.intermediate.dense.experts.2.weight" in message
    assert "of another shape: encoder.layer.0.intermediate.dense.gate.balance_bias" in message
    assert "layer.0.intermediate.dense.experts.0.weight" in refusal(layers=[1])
    assert "layer.1.output.dense.gate.weight" in refusal(projection="output")
    assert "taste" in refusal(taste="salty")
    (tmp_path / "config.json").write_text(json.dumps(config))
    weights = load_file(tmp_path / "model.safetensors")
    weights["encoder.layer.7.left_over"] = torch.zeros(1)
    del weights["encoder.layer.0.attention.self.query.bias"]
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    message = refusal()
    assert "among the weights but not in the settings: encoder.layer.7.left_over" in message
    assert "in the settings but not among the weights: encoder.layer.0.attention.self.query.bias" in message


@pytest.mark.parametrize("name", ["st_clp.py", "moe.py", "MoETransformer.py", "st_clp/__init__.py", "st_clp/moe.py"])
def test_no_code_from_the_folder_runs(tiny_model: SentenceTransformer, tmp_path: Path, name: str) -> None:
    st_clp.upcycle(tiny_model).save(str(tmp_path / "model"))
    trap = tmp_path / "model" / name
    trap.parent.mkdir(exist_ok=True)
    trap.write_text(f"open({str(tmp_path / 'ran')!r}, 'w').close()\nclass MoETransformer: pass\n")
    assert np.array_equal(st_clp.load(tmp_path / "model").encode(TEXTS), tiny_model.encode(TEXTS))
    assert not (tmp_path / "ran").exists()


def test_a_foreign_class_is_refused_by_name(tiny_model: SentenceTransformer, tmp_path: Path) -> None:
    st_clp.upcycle(tiny_model).save(str(tmp_path))
    (tmp_path / "modeling_evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w').close()\nclass Evil: pass\n")
    modules = json.loads((tmp_path / "modules.json").read_text())
    for foreign in ("modeling_evil.Evil", "st_clp.moe.other.Evil", "os.system"):
        modules[1]["type"] = foreign
        (tmp_path / "modules.json").write_text(json.dumps(modules))
        with pytest.raises(ValueError, match=foreign.replace(".", r"\.")) as error:
            st_clp.load(tmp_path)
        assert "trust_remote_code=True" in str(error.value)
    assert not (tmp_path / "ran").exists()


def test_a_foreign_class_inside_a_router_is_refused(tiny_model: SentenceTransformer, tmp_path: Path) -> None:
    children = list(tiny_model.children())
    SentenceTransformer(modules=[Router.for_query_document(children, children)]).save(str(tmp_path))
    (file,) = tmp_path.rglob("router_config.json")
    config = json.loads(file.read_text())
    config["types"] = dict.fromkeys(config["types"], "modeling_evil.Evil")
    file.write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"modeling_evil\.Evil"):
        st_clp.load(tmp_path)


def test_load_opens_dense_models_and_explains_what_it_does_not(tiny_model: SentenceTransformer, tmp_path: Path) -> None:
    tiny_model.save(str(tmp_path / "dense"))
    assert not is_moe(st_clp.load(tmp_path / "dense"))
    with pytest.raises(FileNotFoundError, match=r"modules\.json"):
        st_clp.load(tmp_path)
    with pytest.raises(ValueError, match="own classes only"):
        st_clp.load(tmp_path / "dense", trust_remote_code=True)
    (tmp_path / "dense" / "modules.json").write_text("[{")
    with pytest.raises(ValueError, match="not valid JSON"):
        st_clp.load(tmp_path / "dense")
