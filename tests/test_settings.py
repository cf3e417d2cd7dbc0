"""One definition of a run's settings for the command line, the YAML file and Python."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from sentence_transformers import SentenceTransformer
from typer.testing import CliRunner

from st_clp import cli
from st_clp.cli import run_commands
from st_clp.encoding import hardware_has_bf16
from st_clp.mining import TrainingRow
from st_clp.run.folder import RunDirectory, slug
from st_clp.run.modelling import column_kinds, load_base_model
from st_clp.run.splits import in_turn, settle_batches
from st_clp.run.training import check_training_arguments, make_arguments, read_training_arguments
from st_clp.settings import RunSettings, SettingsError


@given(
    seed=st.integers(0, 10),
    weight=st.floats(0, 1),
    collections=st.lists(st.text(min_size=1, max_size=8).filter(str.isprintable), max_size=3),
    bf16=st.sampled_from([None, True, False]),
)
def test_settings_survive_yaml(
    tmp_path_factory: pytest.TempPathFactory, seed: int, weight: float, collections: list[str], bf16: bool | None
) -> None:
    settings = RunSettings(
        model="m", seed=seed, penalty_weight=weight, collection=collections, bf16=bf16, training_arg={"a": 1, "b": "x"}
    )
    file = tmp_path_factory.mktemp("settings") / "run.yaml"
    settings.write_yaml(file)
    assert RunSettings.from_dict(RunSettings.read_yaml(file)) == settings


def test_every_setting_is_an_option_with_help() -> None:
    text = " ".join(CliRunner().invoke(cli.app, ["run", "--help"], env={"COLUMNS": "600"}).output.split())
    for item in fields(RunSettings):
        assert "--" + item.name.replace("_", "-") in text
        assert item.metadata["help"] in text


def test_the_command_line_comes_before_the_file_and_both_before_defaults(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[RunSettings] = []
    monkeypatch.setattr(run_commands, "run_settings", lambda settings, **options: seen.append(settings))
    (tmp_path / "run.yaml").write_text("model: a\ncollection: one\nnum-negatives: 7\nseed: 3\nlearning_rate: 1\n")
    arguments = ["--config", str(tmp_path / "run.yaml"), "--seed", "5", "--training-arg", "weight-decay=0.5"]
    result = CliRunner().invoke(cli.app, ["run", *arguments, "--collection", "x", "--collection", "y", "--no-bf16"])
    assert result.exit_code == 0, result.output
    (settings,) = seen
    assert (settings.model, settings.num_negatives, settings.seed, settings.number_of_epochs) == ("a", 7, 5, 2.0)
    assert (settings.collection, settings.bf16, settings.learning_rate) == (["x", "y"], False, 1.0)
    assert settings.training_arg == {"weight_decay": 0.5}


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"num_negativ": 3}, "no setting 'num_negativ'; did you mean num_negatives?"),
        ({"num_negatives": "four"}, "num_negatives must be of the kind int, got 'four'"),
        ({"num_negatives": True}, "num_negatives must be of the kind int, got True"),
        ({"num_negatives": -1}, "num_negatives must be at least 0, got -1"),
        ({"scale": 0}, "scale must be above 0, got 0"),
        ({"penalty": "euclid"}, "penalty must be one of cosine, contrastive, got 'euclid'"),
        ({"experts": 2, "experts_per_token": 3}, "no fewer than each token goes to"),
        ({"experts": 0, "train": "moe"}, "train=moe needs experts"),
        ({"experts_per_token": 2}, "experts_per_token=2 needs experts"),
        ({"projection": "output"}, "projection=output needs experts"),
        ({"scale": None}, "scale has no value"),
        ({"seed": -1}, "seed must be at least 0 and at most 4,294,967,295, got -1"),
        ({"seed": 2**40}, "seed must be at least 0 and at most 4,294,967,295"),
        ({"num_negatives": 10**30}, "num_negatives must be at most"),
        ({"num_negatives": 2.5}, "num_negatives must be of the kind int, got 2.5"),
        ({"collection": [7]}, "collection must be a list of text, and 7 is none"),
        ({"collection": [""]}, "collection holds an empty text"),
        ({"output": "caf\udce9"}, "not valid UTF-8"),
        ({"training_arg": {"max_grad_norm": float("nan")}}, "max_grad_norm must be text, a finite number"),
        ({"training_arg": {1: 2}}, "1 is no name"),
        ({"training_arg": {"lr_scheduler_kwargs": {"a": {1, 2}}}}, "lr_scheduler_kwargs must be text, a finite number"),
    ],
)
def test_values_that_cannot_be_meant_are_refused_by_name(values: dict[str, Any], message: str) -> None:
    with pytest.raises(SettingsError, match=message.replace("?", r"\?")):
        RunSettings.from_dict(values)


def test_a_list_of_text_may_be_given_as_one_text_or_a_tuple() -> None:
    assert RunSettings(collection="one").collection == ["one"]  # type: ignore[arg-type]
    assert RunSettings(collection=("one", "two")).collection == ["one", "two"]  # type: ignore[arg-type]


FLOATS = [item.name for item in fields(RunSettings) if str(item.type).startswith("float")]


@pytest.mark.parametrize("name", FLOATS)
def test_a_float_is_a_finite_number_however_it_is_written(name: str) -> None:
    needed = {"query_price_prompt": 1, "query_price_completion": 1, "ray": "auto"}
    for bad in (float("inf"), float("nan"), "-inf", "nan"):
        with pytest.raises(SettingsError, match=f"{name} must be a finite number"):
            RunSettings.from_dict({**needed, name: bad})
    assert getattr(RunSettings.from_dict({**needed, name: "2e-5"}), name) == 2e-5


def test_yaml_and_its_words_are_read_as_they_are_meant(tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text("learning_rate: 2e-5\nbatch_size: 1e2\nquery_round_trip: off\nscale: '50'\n")
    settings = RunSettings.from_dict(RunSettings.read_yaml(tmp_path / "run.yaml"))
    assert (settings.learning_rate, settings.batch_size) == (2e-5, 100)
    assert (settings.query_round_trip, settings.scale) == ("off", 50.0)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"seed: !!python/name:os.system ''", "no valid YAML: could not determine a constructor for the tag"),
        (b"seed: [", "no valid YAML"),
        (b"collection: " + b"[" * 100_000, "no valid YAML: nested too deep"),
        (b"model: caf\xe9", "no UTF-8 text"),
        (b"seed: 2026-13-41", "no valid YAML: a value that cannot be read"),
        (b"- a\n- b", "must hold settings"),
        (b"", "must hold settings"),
    ],
)
def test_a_file_that_is_no_settings_is_refused_by_name(tmp_path: Path, text: bytes, message: str) -> None:
    (tmp_path / "run.yaml").write_bytes(text)
    with pytest.raises(SettingsError, match=rf"run\.yaml.*{message}"):
        RunSettings.read_yaml(tmp_path / "run.yaml")


def test_training_arguments_are_numbers_where_the_trainer_declares_them() -> None:
    given = {"weight_decay": "1e-2", "adam_epsilon": "1e-6", "max_grad_norm": "1e0", "max_steps": 7, "run_name": "1e3"}
    read = read_training_arguments(RunSettings(training_arg=given))
    assert read == {"weight_decay": 1e-2, "adam_epsilon": 1e-6, "max_grad_norm": 1.0, "max_steps": 7, "run_name": "1e3"}
    check_training_arguments(RunSettings(training_arg=given))


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ({"max_steps": "x"}, "max_steps must be of the kind int, got 'x'"),
        ({"weight_decay": "inf"}, "weight_decay must be a finite number"),
        ({"bf16": "yes please"}, "bf16 must be of the kind bool"),
        ({"gradient_accumulation_steps": 0}, "gradient_accumulation_steps must be at least 1, got 0"),
        ({"optim": "adamm"}, "adamm is not a valid OptimizerNames"),
        ({"adam_beta1": 2}, "Invalid beta parameter"),
        ({"eval_strategy": "steps"}, "eval_dataset"),
        ({"report_to": "nobody"}, "nobody is not supported"),
        ({"router_mapping": [1]}, "training arguments cannot be used"),
        ({"output_dir": "elsewhere"}, "name the run's folder with --output"),
    ],
)
def test_training_arguments_are_tried_and_leave_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, argument: dict[str, Any], message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SettingsError, match=message):
        check_training_arguments(RunSettings(training_arg=argument))
    assert not list(tmp_path.iterdir())


def test_what_trains_and_how_fast_by_default() -> None:
    assert (RunSettings().what_trains, RunSettings().peak_learning_rate) == ("intermediate", 1e-4)
    assert (RunSettings(experts=2).what_trains, RunSettings(experts=2).peak_learning_rate) == ("moe", 1e-4)
    assert (RunSettings(train="all").what_trains, RunSettings(train="all").peak_learning_rate) == ("all", 2e-5)
    assert RunSettings(learning_rate=0.5).peak_learning_rate == 0.5


def test_what_an_earlier_version_has_noted_means_what_it_meant() -> None:
    noted = {"experts": 0, "train": None}
    read = RunSettings.from_dict(RunSettings.as_recorded(noted))
    assert (read.what_trains, read.share_of_trained) == ("all", 1.0)
    read = RunSettings.from_dict(RunSettings.as_recorded({"experts": 2, "train": None}))
    assert (read.what_trains, read.share_of_trained) == ("moe", 1.0)
    now = RunSettings()
    assert RunSettings.from_dict(RunSettings.as_recorded(now.to_dict())) == now


@given(names=st.lists(st.text(min_size=1, max_size=12), min_size=2, max_size=8, unique=True))
def test_different_names_are_different_path_components(names: list[str]) -> None:
    slugs = [slug(name) for name in names]
    assert len(set(slugs)) == len(names)
    assert all("/" not in found and found not in ("", ".", "..") for found in slugs)


def test_the_newest_whole_checkpoint_is_found(tmp_path: Path) -> None:
    directory = RunDirectory(tmp_path)
    assert directory.last_checkpoint() is None
    for step, whole in ((5, True), (10, True), (20, False)):
        folder = tmp_path / "run" / "checkpoints" / f"checkpoint-{step}"
        folder.mkdir(parents=True)
        if whole:
            (folder / "trainer_state.json").write_text("{}")
    found = directory.last_checkpoint()
    assert found is not None
    assert found.name == "checkpoint-10"


def test_prompts_and_routes_follow_the_columns(tiny_model: SentenceTransformer, tmp_path: Path) -> None:
    columns = ["anchor", "positive", "negative_1", "negative_query_1"]
    assert column_kinds(columns, "query: ", None) == {"anchor": "query: ", "negative_query_1": "query: "}
    tiny_model.prompts = {"query": "query: ", "document": "passage: "}
    arguments = make_arguments(tiny_model, RunSettings(bf16=False), tmp_path, columns, steps=100)
    assert arguments.prompts == {
        "anchor": "query: ",
        "positive": "passage: ",
        "negative_1": "passage: ",
        "negative_query_1": "query: ",
    }
    assert arguments.save_steps == 10
    overridden = RunSettings(bf16=False, training_arg={"save_steps": 3})
    assert make_arguments(tiny_model, overridden, tmp_path, columns, steps=100).save_steps == 3


def test_a_model_that_is_not_there_gets_advice(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match=r"there is no folder .*nowhere, and the Hugging Face Hub did not give"):
        load_base_model(str(tmp_path / "nowhere"))


def test_bf16_is_asked_of_the_hardware() -> None:
    assert hardware_has_bf16(torch.device("cpu")) == any(
        torch.cpu.get_capabilities().get(name, False) for name in ("avx512_bf16", "amx_bf16")
    )


def _without_tokenizer(folder: Path) -> None:
    for file in folder.glob("*token*"):
        file.unlink()
    (folder / "vocab.txt").unlink(missing_ok=True)


def _with_a_pickle(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    torch.save({"weight": Path()}, folder / "pytorch_model.bin")


def _with_another_width(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "intermediate_size": 2 * config["intermediate_size"]}))


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (_without_tokenizer, "there is no tokenizer in .*model: none of tokenizer.json"),
        (_with_a_pickle, "its weights are a pickle .* could run code"),
        (_with_another_width, "damaged or incomplete, download or save it again"),
        (lambda folder: os.truncate(folder / "model.safetensors", 5000), "damaged or incomplete, download or save"),
        (lambda folder: (folder / "modules.json").write_text("7"), "modules.json is not what a model has there"),
        (lambda folder: (folder / "modules.json").write_text('["x"]'), "modules.json is not what a model has there"),
        (lambda folder: (folder / "modules.json").write_text("[" * 10**5), "modules.json is not valid JSON"),
        (lambda folder: [file.unlink() for file in folder.glob("*.json")], "neither modules.json nor config.json"),
    ],
)
def test_a_folder_that_is_no_whole_model_is_refused(
    spoil: Callable[[Path], Any], message: str, tiny_model_path: Path, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(tiny_model_path, tmp_path / "model"))
    load_base_model(str(folder))
    spoil(folder)
    with pytest.raises(SettingsError, match=f"model' cannot be loaded: .*{message}"):
        load_base_model(str(folder))


def test_batches_of_documents_have_defaults_of_their_own() -> None:
    rows, documents = RunSettings(batches="rows"), RunSettings(batches="documents")
    assert (rows.number_of_epochs, rows.rows_in_batch, rows.peak_learning_rate) == (2, 16, 1e-4)
    assert (documents.number_of_epochs, documents.rows_in_batch, documents.peak_learning_rate) == (4, 128, 3e-4)
    assert RunSettings(batches="documents", train="all").peak_learning_rate == 2e-5
    given = RunSettings(batches="documents", epochs=1, batch_size=8, learning_rate=0.5)
    assert (given.number_of_epochs, given.rows_in_batch, given.peak_learning_rate) == (1, 8, 0.5)
    assert (rows.negatives_in_rows, documents.negatives_in_rows) == (rows.num_negatives, 0)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"refresh_every": "epoch"}, "refresh_every mines the rows' negatives again.*batches=documents"),
        (
            {"in_batch_negatives": False},
            "batches=documents.*in_batch_negatives=False leaves none; use batches=rows",
        ),
        ({"negative_queries": "openai:x"}, "negative_queries=openai:x is for the penalty.*use batches=rows"),
    ],
)
def test_what_batches_of_documents_cannot_be_with(values: dict[str, Any], message: str) -> None:
    with pytest.raises(SettingsError, match=message):
        RunSettings(batches="documents", **values)
    assert RunSettings(**values).batches == "auto"  # which makes batches of rows of it


def test_auto_makes_batches_of_documents_where_sentences_ask_for_them() -> None:
    asked, made = ["q1", "q2"], ["q1", "sentence:0:d1"]
    assert settle_batches(RunSettings(), asked).batches == "rows"
    assert settle_batches(RunSettings(), made).batches == "documents"
    assert settle_batches(RunSettings(refresh_every="epoch"), made).batches == "rows"
    assert settle_batches(RunSettings(in_batch_negatives=False), made).batches == "rows"
    assert settle_batches(RunSettings(batches="rows"), made).batches == "rows"
    for asked_for in ({"penalty_weight": 0.3}, {"penalty": "contrastive"}, {"negative_queries": "judgments,title"}):
        assert settle_batches(RunSettings(**asked_for), made).batches == "rows"  # else it would come to nothing
    assert settle_batches(RunSettings(batches="documents"), asked).batches == "documents"


def test_queries_that_were_asked_come_again_after_those_that_were_made() -> None:
    def rows(*query_ids: str) -> list[TrainingRow]:
        return [TrainingRow(query_id, "a river", "d1", "the river", 0.5) for query_id in query_ids]

    documents, in_rows = RunSettings(batches="documents"), RunSettings(batches="rows")
    both = {"ko": rows("q1", "sentence:0:d1", "q2"), "made": rows("sentence:0:d2")}
    assert in_turn(both, documents) == [both, {"ko": rows("q1", "q2")}]
    assert in_turn(both, in_rows) == [both]
    for alone in ({"ko": rows("q1")}, {"ko": rows("sentence:0:d1")}):
        assert in_turn(alone, documents) == [alone]
