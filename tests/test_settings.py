"""One definition of a run's settings for the command line, the YAML file and Python."""

from __future__ import annotations

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
from st_clp.commands import run
from st_clp.encoding import hardware_has_bf16
from st_clp.rundir import RunDirectory, slug
from st_clp.settings import RunSettings, SettingsError
from st_clp.training import column_kinds, load_base_model, make_arguments


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
    text = " ".join(CliRunner().invoke(cli.app, ["run", "--help"], env={"COLUMNS": "300"}).output.split())
    for item in fields(RunSettings):
        assert "--" + item.name.replace("_", "-") in text
        assert item.metadata["help"] in text


def test_the_command_line_comes_before_the_file_and_both_before_defaults(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[RunSettings] = []
    monkeypatch.setattr(run, "run_settings", lambda settings, **options: seen.append(settings))
    (tmp_path / "run.yaml").write_text("model: a\ncollection: one\nnum-negatives: 7\nseed: 3\nlearning_rate: 1\n")
    arguments = ["--config", str(tmp_path / "run.yaml"), "--seed", "5", "--training-arg", "weight-decay=0.5"]
    result = CliRunner().invoke(cli.app, ["run", *arguments, "--collection", "x", "--collection", "y", "--no-bf16"])
    assert result.exit_code == 0, result.output
    (settings,) = seen
    assert (settings.model, settings.num_negatives, settings.seed, settings.epochs) == ("a", 7, 5, 2.0)
    assert (settings.collection, settings.bf16, settings.learning_rate) == (["x", "y"], False, 1.0)
    assert settings.training_arg == {"weight_decay": 0.5}


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"num_negativ": 3}, "no setting 'num_negativ'; did you mean num_negatives?"),
        ({"num_negatives": "four"}, "num_negatives must be of the kind int, got 'four'"),
        ({"num_negatives": True}, "num_negatives must be of the kind int, got True"),
        ({"num_negatives": -1}, "num_negatives must be at least 0, got -1"),
        ({"scale": 0}, "scale must be at least 1e-09, got 0"),
        ({"penalty": "euclid"}, "penalty must be one of cosine, contrastive, got 'euclid'"),
        ({"experts": 2, "experts_per_token": 3}, "no fewer than each token goes to"),
        ({"experts": 0, "train": "moe"}, "train=moe needs experts"),
        ({"epochs": None}, "epochs has no value"),
    ],
)
def test_values_that_cannot_be_meant_are_refused_by_name(values: dict[str, Any], message: str) -> None:
    with pytest.raises(SettingsError, match=message.replace("?", r"\?")):
        RunSettings.from_dict(values)


def test_what_trains_and_how_fast_by_default() -> None:
    assert (RunSettings().what_trains, RunSettings().peak_learning_rate) == ("moe", 1e-4)
    assert (RunSettings(experts=0).what_trains, RunSettings(experts=0).peak_learning_rate) == ("all", 2e-5)
    assert RunSettings(learning_rate=0.5).peak_learning_rate == 0.5


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
