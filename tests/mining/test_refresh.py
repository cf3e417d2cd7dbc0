"""Negatives that are mined anew while training goes on: which batch gets which, and what stays as it was."""

from __future__ import annotations

import copy
import logging
import random
import tempfile
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.training_args import BatchSamplers
from transformers import TrainerCallback

from st_clp import AnceCallback, mine_hard_negatives, train_only, upcycle
from st_clp.mining import MiningOptions, mine
from st_clp.mining.rows import to_dataset
from st_clp.moe import expert_usage
from st_clp.refresh import plot_refreshes
from st_clp.refresh.generations import write_first
from st_clp.refresh.rows_in_use import Layout, Negatives
from st_clp.run.planning import Unwaiting

OPTIONS = MiningOptions(num_negatives=2, range_max=8)


def expected_columns(model: SentenceTransformer, collection: Any, options: MiningOptions = OPTIONS) -> dict[str, list]:
    """What mining with a model gives: a query's text as the tokenizer has it, to the rest of its row."""
    rows = to_dataset(
        mine(model, collection, options, dtype="model", show_progress_bar=False).rows,
        num_negatives=2,
        queries_per_negative=options.queries_per_negative,
    )
    return {as_read(model, row["anchor"]): [as_read(model, v) for k, v in row.items() if k != "anchor"] for row in rows}


def as_read(model: SentenceTransformer, value: Any) -> Any:
    if not isinstance(value, str):
        return [float(weight) for weight in value]
    return model.tokenizer.decode(model.tokenizer.encode(value), skip_special_tokens=True)


def rows_of(batch: list[list[str]]) -> dict[str, list]:
    import json

    return {row[0]: [*row[1:-1], json.loads(row[-1])] for row in zip(*batch, strict=True)}


def probe(refresh_run: ModuleType, **methods: Any) -> Any:
    return refresh_run.make_callback(TrainerCallback, **methods)


@pytest.mark.parametrize(
    ("what", "arguments"),
    [
        ("plain", {}),
        ("workers", {"dataloader_num_workers": 2, "dataloader_prefetch_factor": 2}),
        ("accumulation", {"gradient_accumulation_steps": 2, "num_train_epochs": 4}),
        ("no duplicates", {"batch_sampler": BatchSamplers.NO_DUPLICATES}),
        ("pinned, persistent workers", {"dataloader_num_workers": 1, "dataloader_persistent_workers": True}),
        ("collated ahead", {}),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_every_batch_has_the_negatives_that_the_weights_of_the_last_refresh_mine(
    what: str, arguments: dict[str, Any], tiny_model: SentenceTransformer, tmp_path: Path, refresh_run: ModuleType
) -> None:
    weights: dict[int, SentenceTransformer] = {}

    def remember(state: Any, model: SentenceTransformer) -> None:
        if state.global_step % 3 == 0:
            weights[state.global_step] = copy.deepcopy(model).eval()

    before = refresh_run.first_model(tiny_model)
    done = refresh_run.train(
        tiny_model,
        tmp_path,
        before=[probe(refresh_run, on_step_end=remember)],
        after=[Unwaiting()] if what == "collated ahead" else [],
        arguments=arguments,
    )
    together = 2 if what == "accumulation" else 1
    steps = done.trainer.state.global_step
    assert [r["used_from"] for r in done.ance.refreshes] == [0, *range(3, steps, 3)]
    collection = refresh_run.make_collection()
    mined = {step: expected_columns(model, collection) for step, model in {0: before, **weights}.items()}
    assert mined[0] != mined[3] != mined[6]
    for number, batch in enumerate(done.batches):
        expected = mined[number // together // 3 * 3]
        for anchor, row in rows_of(batch).items():
            assert row == expected[anchor], (number, anchor)


def test_rows_and_their_order_are_those_of_a_training_without_refreshes(
    tiny_model_path: Path, tmp_path: Path, refresh_run: ModuleType
) -> None:
    plain = refresh_run.train(tiny_model_path, tmp_path / "plain", every=None)
    refreshed = refresh_run.train(tiny_model_path, tmp_path / "refreshed", every="epoch")
    assert [batch[:2] for batch in plain.batches] == [batch[:2] for batch in refreshed.batches]
    assert plain.batches[:4] == refreshed.batches[:4]
    assert plain.batches[4:] != refreshed.batches[4:]
    assert [r["step"] for r in refreshed.ance.refreshes] == [0, 4, 8]


@pytest.mark.parametrize("ahead", [False, True], ids=["", "collated ahead"])
def test_a_resumed_run_has_the_batches_of_one_that_was_not_stopped(
    ahead: bool, make_tiny_model: Any, tmp_path: Path, refresh_run: ModuleType
) -> None:
    model = make_tiny_model(dropout=0.2)  # so that a random number too many would show
    path = tmp_path / "start"
    model.save(str(path))
    whole = refresh_run.train(path, tmp_path / "whole", arguments=refresh_run.SAVING)

    def stop(state: Any, model: Any) -> None:
        if state.global_step == 8:
            raise KeyboardInterrupt

    def planned() -> list[TrainerCallback]:
        return [Unwaiting()] if ahead else []

    with pytest.raises(KeyboardInterrupt):
        refresh_run.train(
            path,
            tmp_path / "stopped",
            after=[*planned(), probe(refresh_run, on_step_begin=stop)],
            arguments=refresh_run.SAVING,
        )
    resumed = refresh_run.train(path, tmp_path / "stopped", after=planned(), resume=True, arguments=refresh_run.SAVING)
    assert resumed.batches == whole.batches[5:]
    described = [{k: v for k, v in r.items() if k != "seconds"} for r in resumed.ance.refreshes]
    assert described == [{k: v for k, v in r.items() if k != "seconds"} for r in whole.ance.refreshes]
    for one, other in zip(resumed.model.parameters(), whole.model.parameters(), strict=True):
        assert torch.equal(one, other)


def test_a_checkpoint_whose_negatives_are_gone_is_refused(
    tiny_model_path: Path, tmp_path: Path, refresh_run: ModuleType
) -> None:
    refresh_run.train(tiny_model_path, tmp_path, arguments=refresh_run.SAVING)
    (tmp_path / "ance" / "negatives" / "step-00000003" / "account.json").unlink()
    with pytest.raises(RuntimeError, match=r"negatives of step 3.*start anew"):
        refresh_run.train(tiny_model_path, tmp_path, resume=str(tmp_path / "checkpoint-5"))


def test_negatives_that_no_checkpoint_needs_are_removed(
    tiny_model_path: Path, tmp_path: Path, refresh_run: ModuleType
) -> None:
    refresh_run.train(
        tiny_model_path, tmp_path, arguments={**refresh_run.SAVING, "save_steps": 1, "save_total_limit": 2}
    )
    left = sorted(path.name for path in (tmp_path / "ance" / "negatives").iterdir())
    assert left == ["step-00000000", "step-00000009"]
    assert not (tmp_path / "ance" / "embeddings").exists()


def test_a_refresh_that_fails_leaves_training_going_and_the_next_one_tries_again(
    tiny_model: SentenceTransformer, tmp_path: Path, refresh_run: ModuleType, caplog: pytest.LogCaptureFixture
) -> None:
    obstacle = tmp_path / "ance" / "embeddings"

    def block(state: Any, model: Any) -> None:
        if state.global_step == 2:
            obstacle.write_text("a file where a folder should be")
        if state.global_step == 4:
            obstacle.unlink()

    with caplog.at_level(logging.ERROR):
        done = refresh_run.train(tiny_model, tmp_path, before=[probe(refresh_run, on_step_end=block)])
    assert [(r["step"], r["status"]) for r in done.ance.refreshes] == [
        (0, "first"),
        (3, "failed"),
        (6, "used"),
        (9, "used"),
    ]
    assert "the refresh of step 3 failed, and training goes on with the negatives of step 0" in caplog.text
    assert "Error" in done.ance.refreshes[1]["error"]
    assert {"refresh_failed": 1.0, "step": 3}.items() <= done.trainer.state.log_history[1].items()
    assert done.trainer.state.global_step == 12


def test_several_collections_each_have_their_own_negatives(
    tiny_model: SentenceTransformer, tmp_path: Path, refresh_run: ModuleType
) -> None:
    weights: dict[int, SentenceTransformer] = {}

    def remember(state: Any, model: SentenceTransformer) -> None:
        weights.setdefault(state.global_step, copy.deepcopy(model).eval())

    done = refresh_run.train(
        tiny_model,
        tmp_path,
        seeds=(0, 1),
        every=8,
        before=[probe(refresh_run, on_step_end=remember)],
        arguments={"prompts": {"anchor": ""}, "num_train_epochs": 2},
    )
    collections = [refresh_run.make_collection(seed) for seed in (0, 1)]
    expected = [expected_columns(weights[8], collection) for collection in collections]
    seen = set()
    for batch in done.batches[8:]:
        rows = rows_of(batch)
        (which,) = [i for i in (0, 1) if all(row[0] == expected[i].get(anchor, [0])[0] for anchor, row in rows.items())]
        assert all(row == expected[which][anchor] for anchor, row in rows.items())
        seen.add(which)
    assert seen == {0, 1}
    assert set(done.ance.refreshes[1]["collections"]) == {"toy 0", "toy 1"}


def with_lora(model: SentenceTransformer) -> SentenceTransformer:
    model.add_adapter(LoraConfig(r=4, target_modules=["query", "value"], init_lora_weights=False))
    return model


def with_experts(model: SentenceTransformer) -> SentenceTransformer:
    upcycle(model, num_experts=2)
    train_only(model, "moe")
    return model


@pytest.mark.parametrize("change", [with_lora, with_experts])
def test_mining_leaves_no_trace_in_the_training(
    change: Any, make_tiny_model: Any, tmp_path: Path, refresh_run: ModuleType
) -> None:
    model = change(make_tiny_model(dropout=0.1))
    model.gradient_checkpointing_enable()
    found: dict[str, list[Any]] = {"before": [], "after": []}

    def look(when: str) -> Any:
        def method(state: Any, model: SentenceTransformer) -> None:
            usage = expert_usage(model).to_dict()["layers"] if change is with_experts else None
            weights = [value.clone() for value in model.state_dict().values()]
            randoms = (random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist())
            found[when].append((model.training, usage, randoms, weights))

        return probe(refresh_run, on_step_end=method)

    done = refresh_run.train(
        model,
        tmp_path,
        before=[look("before")],
        after=[look("after")],
        options={"sampling_strategy": "random"},
    )
    assert [r["status"] for r in done.ance.refreshes] == ["first", "used", "used", "used"]
    for (*before, weights_before), (*after, weights_after) in zip(found["before"], found["after"], strict=True):
        assert before == after
        assert before[0] is True
        assert all(torch.equal(a, b) for a, b in zip(weights_before, weights_after, strict=True))


@pytest.mark.parametrize("change", [lambda model: model, with_lora, with_experts], ids=["dense", "lora", "experts"])
def test_another_process_gets_the_same_model_from_its_trained_weights_alone(
    change: Any, tiny_model: SentenceTransformer, tmp_path: Path
) -> None:
    import pickle

    from safetensors.torch import load_file

    from st_clp.refresh import snapshot

    model = change(tiny_model)
    sent = pickle.dumps(snapshot.skeleton(model))
    snapshot.write_frozen(model, tmp_path / "frozen")
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += 0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0))
    snapshot.write_trained(model, tmp_path / "trained")
    arrived = pickle.loads(sent)
    snapshot.fill(arrived, tmp_path / "frozen", tmp_path / "trained")
    texts = ["which river is old", "the big lake of the north"]
    np.testing.assert_array_equal(arrived.encode(texts), model.eval().encode(texts))
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    written = set(load_file(tmp_path / "trained"))
    assert trained <= written
    assert not written & {name for name, parameter in model.named_parameters() if not parameter.requires_grad}


def test_every_step_is_logged_those_after_which_negatives_are_refreshed_too(
    tiny_model: SentenceTransformer, tmp_path: Path, refresh_run: ModuleType
) -> None:
    done = refresh_run.train(tiny_model, tmp_path, every=3, arguments={"logging_steps": 1}, reported=True)
    assert [entry["step"] for entry in done.trainer.state.log_history if "loss" in entry] == list(range(1, 13))


def test_the_account_goes_to_the_log_and_into_a_picture(
    tiny_model: SentenceTransformer, tmp_path: Path, refresh_run: ModuleType
) -> None:
    done = refresh_run.train(tiny_model, tmp_path)
    refresh = done.ance.refreshes[2]
    (logged,) = [e for e in done.trainer.state.log_history if e["step"] == 6 and "refresh_age" in e]
    for name in ("changed", "mean_positive_score", "mean_negative_score", "above_positive"):
        assert logged[f"refresh_{name}"] == round(refresh[name], 4)
    assert 0 < refresh["changed"] <= 1
    assert 0 <= refresh["above_positive"] <= 1
    assert -1 <= refresh["mean_negative_score"] <= 1
    assert refresh["collections"]["collection"]["rows"] == 16
    ages = {e["step"]: e["negatives_age"] for e in done.trainer.state.log_history if "loss" in e}
    assert ages == {2: 2, 4: 1, 6: 0, 8: 2, 10: 1, 12: 3}
    plot_refreshes(done.ance.refreshes, tmp_path / "refreshes.png")
    assert (tmp_path / "refreshes.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(ValueError, match="nothing to plot"):
        plot_refreshes([], tmp_path / "none.png")


def test_the_account_counts_what_changed_and_what_scores_above_its_positive(
    tiny_model: SentenceTransformer, tmp_path: Path, refresh_run: ModuleType
) -> None:
    """Against a count by hand, from what mining gives."""
    weights: dict[int, SentenceTransformer] = {0: refresh_run.first_model(tiny_model)}

    def remember(state: Any, model: SentenceTransformer) -> None:
        weights.setdefault(state.global_step, copy.deepcopy(model).eval())

    done = refresh_run.train(tiny_model, tmp_path, before=[probe(refresh_run, on_step_end=remember)])
    collection = refresh_run.make_collection()
    now, then = (
        mine(weights[step], collection, OPTIONS, dtype="model", show_progress_bar=False).rows for step in (3, 0)
    )
    old = {row.query_id: {n.doc_id for n in row.negatives} for row in then}
    pairs = [(row, negative) for row in now for negative in row.negatives]
    account = done.ance.refreshes[1]
    assert account["changed"] == pytest.approx(np.mean([n.doc_id not in old[row.query_id] for row, n in pairs]))
    assert account["above_positive"] == pytest.approx(np.mean([n.score > row.positive_score for row, n in pairs]))
    assert account["mean_negative_score"] == pytest.approx(np.mean([n.score for _, n in pairs]), abs=1e-5)
    assert account["mean_positive_score"] == pytest.approx(np.mean([row.positive_score for row in now]), abs=1e-5)


def test_rows_that_mining_drops_keep_their_negatives(
    tiny_model: SentenceTransformer, tmp_path: Path, refresh_run: ModuleType, caplog: pytest.LogCaptureFixture
) -> None:
    """No candidate is as far away as is asked for, so the refresh drops every query."""
    strict = {"max_score": -2.0, "on_shortage": "drop"}
    first = expected_columns(refresh_run.first_model(tiny_model), refresh_run.make_collection())
    done = refresh_run.train(
        tiny_model, tmp_path, options=strict, first_options={"max_score": None, "on_shortage": "relax"}, every=8
    )
    assert all(row == first[anchor] for batch in done.batches for anchor, row in rows_of(batch).items())
    refresh = done.ance.refreshes[1]
    assert refresh["status"] == "used"
    assert (refresh["collections"]["collection"]["kept"], refresh["changed"]) == (16, 0)
    assert "16 rows were not mined again and keep the negatives that they had" in caplog.text


@settings(max_examples=15, deadline=None)
@given(sizes=st.lists(st.integers(1, 2500), min_size=1, max_size=3), data=st.data())
def test_a_row_is_found_by_its_number_whatever_collections_there_are(sizes: list[int], data: st.DataObject) -> None:
    """Through the files of a generation, which are written in blocks, as a data loader reads them."""
    columns = ["anchor", "positive", "negative_1", "negative_query_1"]
    datasets = {}
    for which, size in enumerate(sizes):
        texts = {column: [f"{column} {which} {i} ä\n" for i in range(size)] for column in columns}
        details = {
            "query_id": [f"q{i}" for i in range(size)],
            "positive_id": [f"d{i}" for i in range(size)],
            "positive_score": [0.5] * size,
            "negative_ids": [[f"n{i}"] for i in range(size)],
            "negative_ranks": [[None] for _ in range(size)],
            "negative_scores": [[None] for _ in range(size)],
            "negative_sources": [["random"] for _ in range(size)],
        }
        label = {"label": [[i / size] for i in range(size)]}
        datasets[f"{which}"] = Dataset.from_dict({**texts, **label, **details})
    with tempfile.TemporaryDirectory() as folder:
        layout = Layout(Path(folder))
        write_first(layout.negatives(7), datasets)
        negatives = Negatives(layout, len(sizes), ["negative_1", "negative_query_1", "label"])
        negatives.use(7)
        number = data.draw(st.integers(0, sum(sizes) - 1))
        which, within = 0, number
        while within >= sizes[which]:
            which, within = which + 1, within - sizes[which]
        (row,) = negatives.fill([{"anchor": "kept", "negative_1": "old", "label": [0.0], "row": number}], 7)
        assert row == {
            "anchor": "kept",
            "negative_1": f"negative_1 {which} {within} ä\n",
            "negative_query_1": f"negative_query_1 {which} {within} ä\n",
            "label": [within / sizes[which]],
        }


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"every": 0}, "at least 1"),
        ({"every": "week"}, "every must be a number of steps, at least 1, or epoch"),
        ({"lag": -1}, "at least 0"),
        ({"threads": 0}, "at least 1"),
        ({"batchsize": 3}, "knows no 'batchsize'"),
        ({"options": MiningOptions(num_negatives=3)}, "2 negatives with 1 queries each.*3 with 1"),
        ({"collections": {"a": None}}, "two mappings"),
    ],
)
def test_what_cannot_be_meant_is_refused(
    change: dict[str, Any], message: str, tiny_model: SentenceTransformer, refresh_run: ModuleType
) -> None:
    collection = refresh_run.make_collection()
    rows = mine_hard_negatives(
        tiny_model, collection, num_negatives=2, output_details=True, show_progress_bar=False, verbose=False
    )
    with pytest.raises(ValueError, match=message):
        AnceCallback(**{"collections": collection, "rows": rows, "every": 5, **change})
    with pytest.raises(ValueError, match="output_details"):
        AnceCallback(collection, rows.remove_columns(["negative_ids"]))
    with pytest.raises(ValueError, match="same names"):
        AnceCallback({"a": collection}, {"b": rows})
