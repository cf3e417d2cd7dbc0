"""Saved models: they come back bit for bit in a fresh process, and no code from their folder runs."""

from __future__ import annotations

import json
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
import transformers
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors.torch import load_file, save_file
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Dense, Normalize, Router

import st_clp
from st_clp.moe import expert_usage, is_moe
from tests.fresh import run_fresh

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
    run_fresh(FRESH, stdin=task, cwd=path)
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
    assert json.loads((path / "modules.json").read_text())[0]["type"] == "st_clp.MoETransformer"


HIDDEN = """
import importlib.machinery, sys

class Hidden(importlib.machinery.PathFinder):
    # what a process sees of st_clp where it is not installed: a file beside it, but no package
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        if name.partition(".")[0] == "st_clp":
            spec = super().find_spec(name, path, target)
            if spec is None or spec.submodule_search_locations is not None:
                raise ModuleNotFoundError(f"No module named {name!r}", name=name)
            return spec
        return None

sys.meta_path.insert(0, Hidden)
from sentence_transformers import SentenceTransformer
SentenceTransformer(sys.argv[1], device="cpu", trust_remote_code=True)
"""


@pytest.mark.parametrize("started", ["elsewhere", "in the model's folder"])
@pytest.mark.parametrize("routes", [False, True])
def test_without_st_clp_the_error_says_what_to_install(
    make_tiny_model: Callable[..., SentenceTransformer], tmp_path: Path, started: str, routes: bool
) -> None:
    model = make_tiny_model(seed=1)
    if routes:
        router = Router.for_query_document(list(model.children()), list(make_tiny_model(seed=2).children()))
        model = SentenceTransformer(modules=[router], device="cpu")
    path = tmp_path / "model"
    st_clp.upcycle(model).save(str(path))
    where = tmp_path if started == "elsewhere" else path
    found = run_fresh(HIDDEN, path, cwd=where, check=False)
    assert found.returncode == 1
    assert "pip install st_clp" in found.stderr.splitlines()[-1]


def test_a_model_opened_by_its_own_folder_is_of_the_package(tiny_model: SentenceTransformer, tmp_path: Path) -> None:
    st_clp.upcycle(tiny_model).save(str(tmp_path / "first"))
    opened = SentenceTransformer(str(tmp_path / "first"), device="cpu", trust_remote_code=True)
    assert type(opened[0]) is st_clp.MoETransformer
    assert np.array_equal(pickle.loads(pickle.dumps(opened)).encode(TEXTS), opened.encode(TEXTS))
    opened.save(str(tmp_path / "second"))
    assert np.array_equal(st_clp.load(tmp_path / "second", device="cpu").encode(TEXTS), opened.encode(TEXTS))


def test_a_folder_of_an_earlier_version_opens_as_before(tiny_model: SentenceTransformer, tmp_path: Path) -> None:
    model = st_clp.upcycle(tiny_model)
    path = tmp_path / "earlier"
    model.save(str(path))
    modules = path / "modules.json"
    modules.write_text(modules.read_text().replace("st_clp.MoETransformer", "st_clp.moe.MoETransformer"))
    (path / "st_clp.py").unlink()
    for embeddings in in_a_fresh_process(path):
        assert np.array_equal(embeddings, model.encode(TEXTS))


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


@pytest.mark.parametrize("opener", ["AutoModel", "AutoModelForMaskedLM", "BertModel"])
def test_transformers_alone_refuses_a_mixture(tiny_model: SentenceTransformer, tmp_path: Path, opener: str) -> None:
    """It would draw the feed-forwards' weights anew and say so in a line of a report; no code of ours helps it."""
    st_clp.upcycle(tiny_model).save(str(tmp_path))
    code = (
        f"import sys, transformers; transformers.{opener}.from_pretrained(sys.argv[1]); assert 'st_clp' in sys.modules"
    )
    found = run_fresh(code, tmp_path, check=False)
    assert found.returncode != 0
    for part in ("mixture of experts of st-clp", "pip install st-clp", "st_clp.load(path)", "trust_remote_code=True"):
        assert part in found.stderr.splitlines()[-1]
    assert transformers.AutoConfig.from_pretrained(tmp_path).model_type == "bert"


def test_folders_of_version_0_1_0_open(tiny_model: SentenceTransformer, tmp_path: Path) -> None:
    model = trained(st_clp.upcycle(tiny_model, 3))
    model.save(str(tmp_path))
    config = json.loads((tmp_path / "config.json").read_text())
    assert config.pop("transformers_weights")  # all that has been added since
    (tmp_path / "config.json").write_text(json.dumps(config))
    for embeddings in in_a_fresh_process(tmp_path):
        assert np.array_equal(embeddings, model.encode(TEXTS))
    with pytest.raises(ValueError, match=r"own: open it with st_clp\.load"):
        st_clp.MoETransformer.from_reference(tmp_path)


def adapters(model: SentenceTransformer, **changes: Any) -> SentenceTransformer:
    config = {"target_modules": r".*(query|value|experts\.\d+)", "r": 2, "init_lora_weights": False, **changes}
    model.add_adapter(peft.LoraConfig(**config))
    return model


def mixture(path: Path, **settings: Any) -> SentenceTransformer:
    return trained(st_clp.upcycle(SentenceTransformer(str(path), device="cpu"), **settings))


@pytest.mark.parametrize("order", ["upcycled, then adapted", "adapted, then upcycled", "saved between"])
def test_a_mixture_with_adapters_is_saved_whole(tiny_model_path: Path, tmp_path: Path, order: str) -> None:
    if order == "adapted, then upcycled":
        dense = SentenceTransformer(str(tiny_model_path), device="cpu")
        model = trained(st_clp.upcycle(adapters(dense, target_modules=["query"])))
    else:
        model = mixture(tiny_model_path)
        if order == "saved between":
            model.save(str(tmp_path / "base"))
            model = st_clp.load(tmp_path / "base", device="cpu")
        adapters(model)
    model.save(str(tmp_path / "model"))
    shutil.rmtree(tmp_path / "base", ignore_errors=True)
    (tmp_path / "model").rename(tmp_path / "moved")
    for embeddings in in_a_fresh_process(tmp_path / "moved"):
        assert np.array_equal(embeddings, model.encode(TEXTS))
    again = st_clp.load(tmp_path / "moved", device="cpu")
    again.save(str(tmp_path / "again"))
    assert np.array_equal(st_clp.load(tmp_path / "again", device="cpu").encode(TEXTS), model.encode(TEXTS))


def test_which_adapters_are_active_is_saved(tiny_model_path: Path, tmp_path: Path) -> None:
    model = adapters(mixture(tiny_model_path))
    model.add_adapter(peft.LoraConfig(target_modules=["key"], r=3, init_lora_weights=False), "other")

    def reopened(name: str) -> SentenceTransformer:
        model.save(str(tmp_path / name))
        loaded = st_clp.load(tmp_path / name, device="cpu")
        assert np.array_equal(loaded.encode(TEXTS), model.encode(TEXTS))
        return loaded

    assert reopened("second").active_adapters() == ["other"]
    model.set_adapter("default")
    first = reopened("first")
    first.set_adapter("other")  # the one that was not active is there too
    model.set_adapter("other")
    assert np.array_equal(first.encode(TEXTS), model.encode(TEXTS))
    model.disable_adapters()
    reopened("neither")


def test_merged_adapters_are_kept_once_or_refused(tiny_model_path: Path, tmp_path: Path) -> None:
    model = adapters(mixture(tiny_model_path))
    for layer in model.modules():
        if isinstance(layer, BaseTunerLayer):
            layer.merge()
    with pytest.raises(ValueError, match="delete_adapter"):
        model.save(str(tmp_path / "model"))
    assert not list((tmp_path / "model").glob("*.safetensors"))
    model.delete_adapter("default")
    model.save(str(tmp_path / "model"))
    loaded = st_clp.load(tmp_path / "model", device="cpu")
    assert np.array_equal(loaded.encode(TEXTS), model.encode(TEXTS))
    assert not is_moe(st_clp.to_dense(loaded))


def test_an_encoder_that_peft_has_wrapped_is_saved_whole(tiny_model_path: Path, tmp_path: Path) -> None:
    model = mixture(tiny_model_path)
    config = peft.LoraConfig(target_modules=["query"], modules_to_save=["key"], r=2, init_lora_weights=False)
    model[0].model = peft.get_peft_model(model[0].model, config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "modules_to_save" in name:
                parameter += 0.1
    model.save(str(tmp_path))
    assert np.array_equal(st_clp.load(tmp_path, device="cpu").encode(TEXTS), model.encode(TEXTS))


def test_what_would_drop_adapters_is_refused(tiny_model_path: Path, tmp_path: Path) -> None:
    model = adapters(mixture(tiny_model_path))
    with pytest.raises(ValueError, match="would be lost in a dense model"):
        st_clp.to_dense(model)
    with pytest.raises(ValueError, match="would be lost in the reference's layout"):
        model[0].save_reference(tmp_path / "reference")
    assert not (tmp_path / "reference").exists()


def test_an_adapter_saved_alone_by_version_0_1_0_opens(tiny_model_path: Path, tmp_path: Path) -> None:
    mixture(tiny_model_path).save(str(tmp_path / "base"))
    model = adapters(st_clp.load(tmp_path / "base", device="cpu"))
    model.save(str(tmp_path / "model"))
    for name in ("config.json", "model.safetensors"):
        (tmp_path / "model" / name).unlink()
    shutil.rmtree(tmp_path / "model" / "adapters")
    model[0].model.save_pretrained(tmp_path / "model")  # which is what it did
    assert (tmp_path / "model" / "adapter_config.json").is_file()
    loaded = st_clp.load(tmp_path / "model", device="cpu")
    np.testing.assert_allclose(loaded.encode(TEXTS), model.encode(TEXTS), atol=1e-6)
    loaded.save(str(tmp_path / "model"))  # in the place of the old one, and now whole
    shutil.rmtree(tmp_path / "base")
    again = st_clp.load(tmp_path / "model", device="cpu")
    np.testing.assert_allclose(again.encode(TEXTS), model.encode(TEXTS), atol=1e-6)


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
