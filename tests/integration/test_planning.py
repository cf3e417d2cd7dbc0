"""A Trainer after plan_on_host: the same training, in which nothing waits for a GPU."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from sentence_transformers import SentenceTransformer, SentenceTransformerTrainer, SentenceTransformerTrainingArguments
from transformers import TrainerCallback

from st_clp import CLPLoss, plan_on_host
from st_clp.encoding import attention
from st_clp.encoding.token_lists import ListPreprocess
from st_clp.losses import CachedCLPLoss
from st_clp.losses.host_texts import KEY, HostTexts
from st_clp.memory import pinned
from st_clp.run import planning

LONG = "the big river of the north is one lake and two mountain in the west of the old stone " * 2
QUERIES = ["which river", "who was king", LONG, "what is bread", "where is the lake", "when was peace"]
DOCUMENTS = ["the river", "the king of war is old", "bread", LONG, "one lake two lake three lake", "bread"]
COLUMNS = {
    "anchor": QUERIES * 2,
    "positive": DOCUMENTS * 2,
    "negative": DOCUMENTS[::-1] * 2,
    "negative_query": QUERIES[::-1] * 2,
}


def make_trainer(
    model: SentenceTransformer, loss: torch.nn.Module, folder: Path, dataset: Any = None, **settings: Any
) -> SentenceTransformerTrainer:
    given: dict[str, Any] = {"max_steps": 2, "use_cpu": True, **settings}
    arguments = SentenceTransformerTrainingArguments(
        output_dir=str(folder / "out"), per_device_train_batch_size=6, report_to="none", disable_tqdm=True,
        save_strategy="no", prompts={"anchor": "the king: "}, **given,
    )  # fmt: skip
    return SentenceTransformerTrainer(
        model=model, args=arguments, train_dataset=dataset or Dataset.from_dict(COLUMNS), loss=loss
    )


def weights(model: SentenceTransformer) -> torch.Tensor:
    return torch.cat([one.detach().flatten() for one in model.parameters()])


@pytest.mark.parametrize("loss_class", [CLPLoss, CachedCLPLoss])
def test_a_training_is_the_same_and_the_loss_is_told(
    loss_class: Any,
    make_tiny_model: Callable[..., SentenceTransformer],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    seen: list[int] = []
    of = HostTexts.of

    def counted(features: dict[str, Any]) -> HostTexts | None:
        seen.append(len(features["input_ids"]))
        return of(features)

    monkeypatch.setattr(HostTexts, "of", counted)
    found, calls = [], []
    for planned in (False, True):
        model = make_tiny_model()
        trainer = make_trainer(model, loss_class(model), tmp_path)
        for _ in range(2 * planned):  # once is enough, and twice does no harm
            plan_on_host(trainer)
        seen.clear()
        told: list[bool] = []
        trainer.loss.register_forward_pre_hook(
            lambda loss, inputs, told=told: told.append(all(KEY in column for column in inputs[0]))
        )
        trainer.train()
        assert told == [planned] * 2
        found.append(weights(model))
        calls.append(list(seen))
    assert torch.equal(*found)
    assert calls[0] == calls[1] == [6] * 4 * 2  # by the loss, or by the data collator: once for each column


def test_on_a_gpu_masks_and_losses_are_not_looked_at(
    make_tiny_model: Callable[..., SentenceTransformer], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The Trainer says that it trains on a GPU, and trains here."""
    made: list[int] = []
    monkeypatch.setattr(
        attention, "make_mask", lambda *args, own=attention.make_mask, **kw: made.append(1) or own(*args, **kw)
    )
    found = []
    for planned in (False, True):
        model = make_tiny_model()
        encoder = model[0].model
        trainer = make_trainer(model, CLPLoss(model), tmp_path)
        with monkeypatch.context() as patch:
            patch.setattr(SentenceTransformerTrainingArguments, "device", torch.device("cuda"))
            for _ in range(2 * planned):
                plan_on_host(trainer)
        assert sum(isinstance(one, planning.Unwaiting) for one in trainer.callback_handler.callbacks) == planned
        during: list[str] = []

        class Look(TrainerCallback):
            def on_step_end(self, *args: Any, during: list[str] = during, encoder: Any = encoder, **kw: Any) -> None:
                during.append(encoder.config._attn_implementation)

        trainer.add_callback(Look())
        made.clear()
        trainer.train()
        assert during == [attention.NAME if planned else attention.REPLACED] * 2
        assert bool(made) is planned
        assert trainer.args.logging_nan_inf_filter is not planned
        assert trainer.accelerator.non_blocking is planned
        assert encoder.config._attn_implementation == attention.REPLACED
        found.append(weights(model))
    torch.testing.assert_close(*found, rtol=1e-5, atol=1e-6)


@pytest.mark.gpu
def test_on_a_card_no_step_of_a_trainer_waits(tiny_model: SentenceTransformer, tmp_path: Path) -> None:
    class RefuseToWait(TrainerCallback):
        """From the end of the first step, which allocates and chooses kernels, to that of the second."""

        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            torch.cuda.set_sync_debug_mode("error" if state.global_step == 1 else "default")

    model = tiny_model.to("cuda")
    trainer = make_trainer(
        model, CLPLoss(model, encode_once=True), tmp_path, use_cpu=False, bf16=True, max_steps=3, logging_strategy="no"
    )
    plan_on_host(trainer)
    trainer.add_callback(RefuseToWait())
    try:
        trainer.train()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def collating(trainer: SentenceTransformerTrainer, monkeypatch: pytest.MonkeyPatch, fails: bool = False) -> list[str]:
    """Train as on a GPU; the names of the threads that collated."""
    names: list[str] = []
    preprocess = trainer.data_collator.preprocess_fn

    def watched(texts: list[str], **options: Any) -> dict[str, Any]:
        names.append(threading.current_thread().name)
        if fails and len(names) > 4:
            raise TypeError("a text of the second batch")
        return preprocess(texts, **options)

    trainer.data_collator.preprocess_fn = watched
    with monkeypatch.context() as patch:
        patch.setattr(SentenceTransformerTrainingArguments, "device", torch.device("cuda"))
        plan_on_host(trainer)
    trainer.train()
    return names


def test_on_a_gpu_a_thread_collates_and_ends(
    tiny_model: SentenceTransformer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = make_trainer(tiny_model, CLPLoss(tiny_model), tmp_path)
    before = threading.enumerate()
    names = collating(trainer, monkeypatch)
    assert len(names) == 8  # four columns, two batches
    assert all(name.startswith("collating") for name in names)
    assert not [one for one in threading.enumerate() if one.name.startswith("collating") and one not in before]


def test_what_a_collator_raises_in_its_thread_ends_the_training(
    tiny_model: SentenceTransformer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = make_trainer(tiny_model, CLPLoss(tiny_model), tmp_path)
    with pytest.raises(TypeError, match="a text of the second batch"):
        collating(trainer, monkeypatch, fails=True)
    assert trainer.state.global_step == 1


def test_a_batch_that_is_being_collated_is_pinned_before_it_is_moved(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []
    monkeypatch.setattr(planning, "pinned", lambda batch: seen.append(batch) or batch)
    with ThreadPoolExecutor(1) as thread:
        collate = planning.AheadCollator(lambda rows: {"label": torch.tensor(rows), "prompt": "the king"}, thread)
        batch = pinned(collate([1, 2]))  # as a data loader calls it
        moved = batch.to("meta", non_blocking=True)
    assert (moved["label"].device.type, moved["prompt"]) == ("meta", "the king")
    assert [list(one["label"]) for one in seen] == [[1, 2]]


def test_an_iterable_dataset_is_read_as_it_would_be(
    tiny_model: SentenceTransformer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """accelerate reads it for all processes, and looks into its batches."""
    dataset = Dataset.from_dict(COLUMNS).to_iterable_dataset()
    trainer = make_trainer(tiny_model, CLPLoss(tiny_model), tmp_path, dataset=dataset)
    assert set(collating(trainer, monkeypatch)) == {threading.current_thread().name}
    assert trainer.state.global_step == 2


def test_several_processes_plan_alike_and_tokenise_as_one_does(
    tiny_model: SentenceTransformer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = make_trainer(tiny_model, CLPLoss(tiny_model), tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(SentenceTransformerTrainingArguments, "world_size", 2)
        plan_on_host(trainer)
    assert type(trainer.data_collator.preprocess_fn) is ListPreprocess


def test_a_preprocessing_of_ones_own_stays_and_other_collators_are_refused(
    tiny_model: SentenceTransformer, tmp_path: Path
) -> None:
    trainer = make_trainer(tiny_model, CLPLoss(tiny_model), tmp_path)
    given: list[str] = []

    def preprocess(texts: list[str], **options: Any) -> dict[str, Any]:
        given.extend(texts)
        return tiny_model.preprocess(texts, **options)

    trainer.data_collator.preprocess_fn = preprocess
    plan_on_host(trainer)
    trainer.train()
    assert sorted(set(given)) == sorted({*QUERIES, *DOCUMENTS})
    trainer.data_collator = lambda rows: rows  # type: ignore[assignment]
    with pytest.raises(TypeError, match="the trainer's data collator, a function, has no preprocess_fn"):
        plan_on_host(trainer)
