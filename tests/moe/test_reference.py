"""The paper's checkpoints: opened as its own code computes them, and written as it would write them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Normalize, Pooling

import st_clp

CHECKPOINTS = sorted(Path(__file__).with_name("golden").glob("moe-*"))
IDS = [path.name for path in CHECKPOINTS]


def cls_embeddings(module: st_clp.MoETransformer, inputs: dict[str, list[list[int]]]) -> torch.Tensor:
    names = ("input_ids", "attention_mask")
    with torch.no_grad():
        tokens = module.eval()({name: torch.tensor(inputs[name]) for name in names})["token_embeddings"]
    return torch.nn.functional.normalize(tokens[:, 0], dim=-1)


def test_the_checkpoints_are_there() -> None:
    assert IDS == ["moe-intermediate-2x1", "moe-intermediate-4x2", "moe-output-2x1"]


@pytest.mark.parametrize("path", CHECKPOINTS, ids=IDS)
def test_embeddings_are_those_of_the_reference_code(path: Path) -> None:
    golden = json.loads((path / "golden.json").read_text())
    module = st_clp.MoETransformer.from_reference(path)
    assert module.settings.routing == "reference"
    expected = torch.tensor(golden["cls_embeddings"])
    torch.testing.assert_close(cls_embeddings(module, golden), expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("path", CHECKPOINTS, ids=IDS)
def test_export_of_an_import_is_the_checkpoint(path: Path, tmp_path: Path) -> None:
    st_clp.MoETransformer.from_reference(path).save_reference(tmp_path)
    before, after = load_file(path / "model.safetensors"), load_file(tmp_path / "model.safetensors")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    config, written = (json.loads((folder / "config.json").read_text()) for folder in (path, tmp_path))
    changed = {key for key, value in config.items() if written.get(key) != value}
    assert changed - {"use_cache"} == {"transformers_version"}  # sentence-transformers turns the cache off from 6.2 on
    assert "st_clp_moe" not in written
    again = st_clp.MoETransformer.from_reference(tmp_path)
    golden = json.loads((path / "golden.json").read_text())
    assert torch.equal(
        cls_embeddings(again, golden), cls_embeddings(st_clp.MoETransformer.from_reference(path), golden)
    )


@pytest.mark.parametrize("path", CHECKPOINTS, ids=IDS)
def test_a_whole_model_around_a_checkpoint_is_saved_and_loaded(path: Path, tmp_path: Path) -> None:
    encoder = st_clp.MoETransformer.from_reference(path)
    pooling = Pooling(encoder.get_embedding_dimension(), "cls")
    model = SentenceTransformer(modules=[encoder, pooling, Normalize()], device="cpu")
    texts = ["t4 t5 t6", "t119"]
    model.save(str(tmp_path))
    assert torch.equal(
        st_clp.load(tmp_path, device="cpu").encode(texts, convert_to_tensor=True),
        model.encode(texts, convert_to_tensor=True),
    )
    assert st_clp.load(tmp_path)[0].settings == encoder.settings


def test_a_pickled_checkpoint_is_read_as_tensors_only(tmp_path: Path) -> None:
    path = tmp_path / "checkpoint"
    shutil.copytree(CHECKPOINTS[0], path)
    weights = load_file(path / "model.safetensors")
    (path / "model.safetensors").unlink()
    torch.save(weights, path / "pytorch_model.bin")
    golden = json.loads((path / "golden.json").read_text())
    module = st_clp.MoETransformer.from_reference(path)
    torch.testing.assert_close(
        cls_embeddings(module, golden), torch.tensor(golden["cls_embeddings"]), atol=1e-5, rtol=0
    )

    class Runs:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return (Path.touch, (tmp_path / "ran",))  # type: ignore[return-value]

    torch.save({**weights, "embeddings.word_embeddings.weight": Runs()}, path / "pytorch_model.bin")
    with pytest.raises(Exception, match=r"(?i)weights.only|unsupported|global"):
        st_clp.MoETransformer.from_reference(path, model_kwargs={"weights_only": False})
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    ("key", "value", "complaint"),
    [("moe", "attention", "intermediate and output"), ("num_experts", 3, r"experts\.2\.weight")],
)
def test_a_checkpoint_whose_settings_are_wrong_is_refused(
    tmp_path: Path, key: str, value: object, complaint: str
) -> None:
    path = tmp_path / "checkpoint"
    shutil.copytree(CHECKPOINTS[0], path)
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps({**config, key: value}))
    with pytest.raises((ValueError, RuntimeError), match=complaint):
        st_clp.MoETransformer.from_reference(path)


def test_a_missing_weight_is_named(tmp_path: Path) -> None:
    path = tmp_path / "checkpoint"
    shutil.copytree(CHECKPOINTS[2], path)
    weights = load_file(path / "model.safetensors")
    del weights["encoder.layer.1.output.dense.experts.0.bias"], weights["pooler.dense.weight"]
    save_file(weights, path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"encoder\.layer\.1\.output\.dense\.experts\.0\.bias") as refusal:
        st_clp.MoETransformer.from_reference(path)
    assert "pooler" not in str(refusal.value)


def test_what_is_no_checkpoint_is_refused(tiny_model: SentenceTransformer, tmp_path: Path) -> None:
    tiny_model.save(str(tmp_path / "dense"))
    with pytest.raises(ValueError, match="no 'st_clp_moe'"):
        st_clp.MoETransformer.from_reference(tmp_path / "dense")
    st_clp.upcycle(tiny_model).save(str(tmp_path / "own"))
    with pytest.raises(ValueError, match=r"st_clp\.load"):
        st_clp.MoETransformer.from_reference(tmp_path / "own")


def test_what_the_reference_cannot_hold_is_not_written(tiny_model: SentenceTransformer, tmp_path: Path) -> None:
    mixture = st_clp.MoETransformer.from_dense(tiny_model[0], projection="feed_forward", layers=[1])
    mixture.model.encoder.layer[1].intermediate.dense.gate.balance_bias.fill_(0.5)
    with pytest.raises(ValueError, match="cannot be written") as refusal:
        mixture.save_reference(tmp_path / "out")
    for reason in ("is bert", "both projections", "not every layer", "balance bias"):
        assert reason in str(refusal.value)
    assert not (tmp_path / "out").exists()
