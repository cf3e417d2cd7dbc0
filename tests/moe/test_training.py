"""Training a part of a model: the Trainer, adapters, mixed precision, compiled models, two processes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import Dataset
from sentence_transformers import (
    SentenceTransformer,
    SentenceTransformerTrainer,
    SentenceTransformerTrainingArguments,
)
from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss

import st_clp
from st_clp.moe import ExpertUsageCallback, TrainableParameters
from tests.fresh import run_fresh

TEXTS = ["a cat on the river", "the king", "what is the capital of a country", "red green blue " * 8]


def trainable(model: SentenceTransformer) -> set[str]:
    names = {name for name, value in model.named_parameters() if value.requires_grad}
    return {name.split("layer.")[-1].removeprefix("0.").removeprefix("1.") for name in names}


UP = {f"intermediate.dense.experts.{expert}.{kind}" for expert in (0, 1) for kind in ("weight", "bias")}
GATE, DOWN = {"intermediate.dense.gate.weight"}, {"output.dense.weight", "output.dense.bias"}


@pytest.mark.parametrize(
    ("what", "names", "count"),
    [
        ("moe", UP | GATE, 2 * (2 * (32 * 64 + 64) + 2 * 32)),
        ("intermediate", UP | GATE, 2 * (2 * (32 * 64 + 64) + 2 * 32)),
        ("output", DOWN, 2 * (64 * 32 + 32)),
        ("router", GATE, 2 * 2 * 32),
    ],
)
def test_one_part_of_a_mixture_trains(tiny_model: SentenceTransformer, what: str, names: set[str], count: int) -> None:
    found = st_clp.train_only(st_clp.upcycle(tiny_model), what)
    assert trainable(tiny_model) == names
    assert found == TrainableParameters(what, count, sum(value.numel() for value in tiny_model.parameters()))
    assert f"{count:,} of {found.total:,}" in str(found)


def test_one_part_of_a_dense_model_trains(tiny_model: SentenceTransformer) -> None:
    assert st_clp.train_only(tiny_model, "intermediate").trainable == 2 * (32 * 64 + 64)
    assert trainable(tiny_model) == {"intermediate.dense.weight", "intermediate.dense.bias"}
    st_clp.train_only(tiny_model, "output")
    assert trainable(tiny_model) == DOWN
    everything = st_clp.train_only(tiny_model, "all")
    assert everything.trainable == everything.total


@pytest.mark.parametrize("what", ["moe", "router", "attention"])
def test_a_part_that_is_not_there_is_refused(tiny_model: SentenceTransformer, what: str) -> None:
    with pytest.raises(ValueError, match=what):
        st_clp.train_only(tiny_model, what)
    assert all(value.requires_grad for value in tiny_model.parameters())


def run_trainer(model: SentenceTransformer, folder: Path, steps: int, **settings: object) -> SentenceTransformerTrainer:
    words = "river lake mountain city country money bank language people capital north south".split()
    rows = {"anchor": [f"the {word}" for word in words], "positive": [f"a big {word}" for word in words]}
    arguments = SentenceTransformerTrainingArguments(
        str(folder),
        max_steps=steps,
        save_steps=2,
        logging_steps=1,
        per_device_train_batch_size=4,
        learning_rate=1e-2,
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
        **settings,  # type: ignore[arg-type]
    )
    loss = MultipleNegativesRankingLoss(model)
    callbacks = [ExpertUsageCallback(model)]
    return SentenceTransformerTrainer(model, arguments, Dataset.from_dict(rows), loss=loss, callbacks=callbacks)


def test_the_trainer_resumes_from_a_checkpoint(tiny_model_path: Path, tmp_path: Path) -> None:
    def fresh() -> SentenceTransformer:
        model = st_clp.upcycle(SentenceTransformer(str(tiny_model_path), device="cpu"))
        st_clp.train_only(model, "moe")
        model.gradient_checkpointing_enable()
        return model

    whole = fresh()
    trainer = run_trainer(whole, tmp_path / "whole", 4)
    trainer.train()
    logged = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert len(logged) == 4
    assert all(1 <= entry["expert_max_share"] <= 2 and entry["dead_experts"] >= 0 for entry in logged)
    resumed = fresh()
    run_trainer(resumed, tmp_path / "whole", 4).train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    frozen = dict(SentenceTransformer(str(tiny_model_path), device="cpu").named_parameters())
    for (name, one), other in zip(whole.named_parameters(), resumed.parameters(), strict=True):
        torch.testing.assert_close(one, other, msg=name, atol=1e-3, rtol=0)
        if not one.requires_grad:
            assert torch.equal(one, frozen[name]), name
    checkpoint = st_clp.load(tmp_path / "whole" / "checkpoint-4", device="cpu")
    assert np.array_equal(checkpoint.encode(TEXTS), whole.encode(TEXTS))


def test_adapters_around_a_new_mixture_resume_from_a_checkpoint(tiny_model_path: Path, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")

    def fresh() -> SentenceTransformer:
        torch.manual_seed(0)
        model = st_clp.upcycle(SentenceTransformer(str(tiny_model_path), device="cpu"))
        model.add_adapter(peft.LoraConfig(target_modules=r".*(query|experts\.\d+)", r=2))
        return model

    whole, resumed = fresh(), fresh()
    run_trainer(whole, tmp_path / "whole", 4).train()
    checkpoint = tmp_path / "whole" / "checkpoint-2"
    run_trainer(resumed, tmp_path / "whole", 4).train(resume_from_checkpoint=str(checkpoint))
    for (name, one), other in zip(whole.named_parameters(), resumed.parameters(), strict=True):
        assert torch.equal(one, other), name
    last = st_clp.load(tmp_path / "whole" / "checkpoint-4", device="cpu")
    assert np.array_equal(last.encode(TEXTS), whole.encode(TEXTS))
    assert not np.array_equal(st_clp.load(checkpoint, device="cpu").encode(TEXTS), whole.encode(TEXTS))


def test_adapters_around_attention_and_experts(tiny_model: SentenceTransformer, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    st_clp.upcycle(tiny_model).save(str(tmp_path / "base"))
    model = st_clp.load(tmp_path / "base", device="cpu")
    before = model.encode(TEXTS)
    targets = r".*(query|value|experts\.\d+)"
    model.add_adapter(peft.LoraConfig(target_modules=targets, r=2, init_lora_weights=False))
    adapted = model.encode(TEXTS)
    assert np.abs(adapted - before).max() > 1e-4
    model.train()
    model(model.preprocess(TEXTS))["sentence_embedding"].pow(3).sum().backward()
    assert all(value.grad is not None for value in model.parameters() if value.requires_grad)
    model.eval().save(str(tmp_path / "adapter"))
    np.testing.assert_allclose(st_clp.load(tmp_path / "adapter", device="cpu").encode(TEXTS), adapted, atol=1e-6)
    model[0].model.disable_adapters()
    np.testing.assert_allclose(model.encode(TEXTS), before, atol=1e-6)


def test_an_adapter_around_a_mixtures_layer_is_refused_with_what_works(tiny_model_path: Path) -> None:
    peft = pytest.importorskip("peft")

    def adapted(**config: object) -> float:
        """How far an adapter moves the embeddings of a fresh mixture."""
        model = st_clp.upcycle(SentenceTransformer(str(tiny_model_path), device="cpu"))
        before = model.encode(TEXTS)
        model.add_adapter(peft.LoraConfig(r=2, init_lora_weights=False, **config))
        return float(np.abs(model.encode(TEXTS) - before).max())

    with pytest.raises(ValueError, match=r"ExpertLinear[^\0]*experts\\.\\d\+[^\0]*exclude_modules"):
        adapted(target_modules=["dense"])
    with pytest.raises(ValueError, match=r"SortedLinear[^\0]*exclude_modules"):
        adapted(target_modules=["output.dense"])
    mixture = r".*layer\.\d+\.(intermediate|output)\.dense"
    assert adapted(target_modules=["dense"], exclude_modules=mixture) > 1e-4
    assert adapted(target_modules=r".*experts\.\d+") > 1e-4


def test_a_wrapped_down_projection_gets_rows_in_token_order(tiny_model: SentenceTransformer) -> None:
    model = st_clp.upcycle(tiny_model)
    before = model.encode(TEXTS)
    output = model[0].model.encoder.layer[0].output
    output.dense = torch.nn.Sequential(output.dense)
    np.testing.assert_allclose(model.encode(TEXTS), before, atol=1e-6)


def test_mixed_precision_routes_in_float32(tiny_model: SentenceTransformer) -> None:
    model = st_clp.upcycle(tiny_model, projection="feed_forward")
    full = model.encode(TEXTS, convert_to_tensor=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        half = model.encode(TEXTS, convert_to_tensor=True)
        model.train()(model.preprocess(TEXTS))["sentence_embedding"].float().pow(3).sum().backward()
    assert 0 < (half.float() - full).abs().max() < 0.05
    assert all(value.grad is None or value.grad.dtype == torch.float32 for value in model.parameters())
    layer = model[0].model.encoder.layer[0].intermediate.dense
    assert layer.gate.weight.grad.abs().sum() > 0
    assert layer.experts[0].weight.grad.abs().sum() > 0


def test_a_compiled_model_gives_the_same(tiny_model: SentenceTransformer) -> None:
    model = st_clp.upcycle(tiny_model)
    before = model.encode(TEXTS)
    model.compile(backend="eager")  # traced, with nothing generated
    np.testing.assert_allclose(model.encode(TEXTS), before, atol=1e-6)


DISTRIBUTED = """
import gc, os, sys, torch
import torch.distributed as dist
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss
import st_clp
path, store = sys.argv[1:]
torch.set_num_threads(1)
other = os.fork()
rank = int(other == 0)
dist.init_process_group("gloo", init_method="file://" + store, rank=rank, world_size=2)


def work():
    model = st_clp.upcycle(SentenceTransformer(path, device="cpu"), 8)
    st_clp.train_only(model, "moe")
    loss = MultipleNegativesRankingLoss(model).train()
    ddp = torch.nn.parallel.DistributedDataParallel(loss, find_unused_parameters=False)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    texts = [["the river", "a king"], ["red", "a cat on the mountain lake"]][rank]
    for _ in range(4):
        optimizer.zero_grad()
        ddp([model.preprocess(texts), model.preprocess(texts[::-1])], None).backward()
        optimizer.step()
    for name, tensor in [*model.named_parameters(), *((n, b) for n, b in model.named_buffers() if "balance" in n)]:
        both = [torch.empty_like(tensor) for _ in range(2)]
        dist.all_gather(both, tensor.detach())
        assert torch.equal(both[0], both[1]), name
        if "balance" in name:
            assert tensor.any()


work()
gc.collect()  # what holds connections goes before they are closed, not while Python ends
dist.barrier()  # neither closes its connections while the other still uses them
dist.destroy_process_group()
if other:
    sys.exit(os.waitstatus_to_exitcode(os.waitpid(other, 0)[1]))
"""


def test_two_processes_stay_alike_and_miss_no_gradient(tiny_model_path: Path, tmp_path: Path) -> None:
    run_fresh(DISTRIBUTED, tiny_model_path, tmp_path / "store")
