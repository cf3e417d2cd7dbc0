"""The command line: one name for one thing, former names, and what a bug report needs."""

from __future__ import annotations

from typing import Any

import pytest
from typer.testing import CliRunner

import st_clp
from st_clp import cli
from st_clp.cli import evaluation_commands as module
from st_clp.cli.settings_command import settings_command
from st_clp.options import EvaluationOptions


@pytest.fixture
def given(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """What ``st-clp evaluate`` was given, which then ends."""
    seen: list[dict[str, Any]] = []

    def stop(collections: Any, metrics: Any, options: dict[str, Any]) -> None:
        seen.append(options)
        raise ValueError("seen")

    monkeypatch.setattr(module, "_load", lambda sources, split, fields: seen.append({"split": split}) or {"c": None})
    monkeypatch.setattr(module, "_evaluator", stop)
    return seen


@pytest.mark.parametrize(
    "arguments",
    [
        "--model m --eval-split test --encode-dtype model --encode-batch-size 3",
        "m --split test --dtype model --batch-size 3",
        "m --eval-split test --dtype model --encode-batch-size 3",
    ],
)
def test_evaluate_knows_the_names_of_run_and_its_former_ones(given: list[dict[str, Any]], arguments: str) -> None:
    result = CliRunner().invoke(cli.app, ["evaluate", *arguments.split(), "--collection", "c", "--output", "o"])
    assert "seen" in result.output, result.output
    assert given[0] == {"split": "test"}
    options = given[1]["options"]
    assert isinstance(options, EvaluationOptions)
    assert (options.encode_dtype, options.encode_batch_size, options.ignore_identical_ids) == ("model", 3, True)


def test_former_names_are_not_shown() -> None:
    text = CliRunner().invoke(cli.app, ["evaluate", "--help"], env={"COLUMNS": "300"}).output
    assert "--encode-dtype" in text
    assert "--eval-split" in text
    assert " --dtype" not in text
    assert " --split" not in text


def test_an_alias_gives_way_to_the_option_itself() -> None:
    seen: list[Any] = []
    extras = {"depth": (int, 1, "How deep.")}
    command = settings_command(lambda **options: seen.append(options), "name", [], extras, aliases={"deep": "depth"})
    command(depth=2, deep=1)
    command(depth=1, deep=7)
    assert seen == [{"depth": 2}, {"depth": 7}]


def test_doctor_says_what_there_is_and_nothing_secret(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "sk-secret-1")
    monkeypatch.setenv("HF_TOKEN", "hf_secret2")
    monkeypatch.setenv("OPENAI_API_KEY_2", "sk-secret-3")
    monkeypatch.setenv("HF_TOKEN_READ", "hf_secret4")
    monkeypatch.setenv("OPENAI_BASE_URL", "https://me:secret5@host/v1?api=secret6")
    monkeypatch.setenv("ST_CLP_SOMETHING", "shown")
    result = CliRunner().invoke(cli.app, ["doctor"])
    assert result.exit_code == 0, result.output
    words = " ".join(result.output.split())
    assert f"st-clp {st_clp.__version__} python" in words
    assert "encoding: " in words
    assert "access not tried: HF_HUB_OFFLINE is set" in words
    assert "ST_CLP_SOMETHING shown" in words
    assert "OPENAI_API_KEY set" in words
    assert "OPENAI_BASE_URL https://…host/v1…" in words
    assert "secret" not in words


@pytest.mark.parametrize("address", ["no-address", "http://me:secret@[::1"])
def test_doctor_goes_on_where_the_hub_has_no_address(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "ENDPOINT", address)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    result = CliRunner().invoke(cli.app, ["doctor"])
    assert result.exit_code == 0, result.output
    assert "not reached (" in result.output
    assert "Environment" in result.output
    assert "secret" not in result.output


def test_completion_can_be_had_and_statuses_are_explained() -> None:
    text = " ".join(CliRunner().invoke(cli.app, ["--help"], env={"COLUMNS": "300"}).output.split())
    assert "--install-completion" in text
    assert "130 after Ctrl-C" in text
