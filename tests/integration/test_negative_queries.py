"""Training with queries that a local model wrote, end to end."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import PreTrainedTokenizerFast, T5Config, T5ForConditionalGeneration
from typer.testing import CliRunner, Result

from st_clp import cli
from st_clp.mining import mine
from st_clp.mining.rows import read_rows
from st_clp.queries import LocalQueries


@pytest.fixture
def writer_path(tmp_path: Path) -> Path:
    """A tiny T5 with random weights that writes words of the collection."""
    folder = tmp_path / "writer"
    words = "where is the what in river lake mountain city red blue green gold old new big small north south".split()
    vocabulary = {token: number for number, token in enumerate(["<pad>", "</s>", "<unk>", *words])}
    tokenizer = Tokenizer(WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = Whitespace()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>", model_max_length=64
    ).save_pretrained(folder)
    torch.manual_seed(0)
    config = T5Config(
        vocab_size=len(vocabulary), d_model=32, d_kv=16, d_ff=64, num_layers=1, num_heads=2, decoder_start_token_id=0
    )
    T5ForConditionalGeneration(config).save_pretrained(folder)
    return folder


def invoke(*arguments: object) -> Result:
    return CliRunner().invoke(cli.app, ["run", *map(str, arguments)])


def test_a_run_with_queries_by_a_local_model(
    tiny_model_path: Path, collection_path: Path, writer_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "out"
    common = ["--model", tiny_model_path, "--collection", collection_path, "--output", output, "--epochs", 1]
    common += [
        "--sentence-queries",
        0,
        "--num-negatives",
        4,
        "--no-bf16",
        "--query-max-tokens",
        8,
        "--no-prefer-known-queries",
    ]
    common += ["--training-arg", "disable_tqdm=true"]
    result = invoke(*common, "--negative-queries", f"judgments,local:{writer_path}*0.5,title")
    assert result.exit_code == 0, result.output
    report = json.loads((output / "report.json").read_text())
    mined = report["mining"][f"{collection_path}/train"]
    assert mined["query_sources"]["judgments"] > 0
    assert mined["query_sources"]["local"] > 0
    assert sum(mined["query_sources"].values()) == mined["with_query"] == 480
    assert report["settings"]["negative_queries"].startswith("judgments,local:")
    rows = read_rows(next((output / "run" / "mined").glob("*.jsonl")))
    marks = {mark for row in rows for n in row.negatives for mark in zip(n.query_sources, n.query_weights, strict=True)}
    assert {("judgments", 1.0), ("local", 0.5)} <= marks <= {("judgments", 1.0), ("local", 0.5), ("title", 0.5)}
    assert all(entry["loss"] > 0 for entry in report["training"]["history"])

    # Another run in its place finds what was written; the model is not asked again.
    def forbidden(*arguments: Any) -> Any:
        raise AssertionError("written again")

    monkeypatch.setattr(LocalQueries, "_write", forbidden)
    result = invoke(*common, "--negative-queries", f"judgments,local:{writer_path},title", "--overwrite")
    assert result.exit_code == 0, result.output
    again = json.loads((output / "report.json").read_text())["mining"][f"{collection_path}/train"]
    assert again["query_sources"] == mined["query_sources"]


def test_refreshed_negatives_have_queries_of_the_same_sources(
    tiny_model_path: Path, collection_path: Path, writer_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    accounts = []

    def recorded(*arguments: Any, **options: Any) -> Any:
        found = mine(*arguments, **options)
        accounts.append((options["query_store"], found.account.query_sources))
        return found

    monkeypatch.setattr("st_clp.refresh.generations.mine", recorded)
    output = tmp_path / "out"
    result = invoke(
        *("--model", tiny_model_path, "--collection", collection_path, "--output", output, "--epochs", 1, "--no-bf16"),
        *("--num-negatives", 2, "--query-max-tokens", 8, "--no-prefer-known-queries", "--refresh-every", 4),
        *("--training-arg", "disable_tqdm=true", "--negative-queries", f"judgments,local:{writer_path}"),
    )
    assert result.exit_code == 0, result.output
    refreshes = json.loads((output / "report.json").read_text())["training"]["refreshes"]
    assert [refresh["status"] for refresh in refreshes] == ["first", *["used"] * len(accounts)]
    assert len(accounts) > 0
    for store, sources in accounts:
        assert Path(store).is_file()
        assert set(sources) == {"judgments", "local"}
        assert min(sources.values()) > 0


def test_a_source_that_is_not_there_is_said_before_anything_is_done(
    tiny_model_path: Path, collection_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    monkeypatch.delenv("OPENAI_BASE_URL", raising=False)
    common = ["--model", tiny_model_path, "--collection", collection_path, "--output", tmp_path / "out"]
    for sources, message in [
        ("judgments,local:/nowhere", "that is to write queries"),
        ("openai:gpt", "no key for https://api.openai.com/v1"),
        ("titel", "there is no source 'titel'"),
    ]:
        result = invoke(*common, "--negative-queries", sources)
        assert result.exit_code == 1
        assert message in " ".join(result.output.split())
        assert not (tmp_path / "out").exists()
    result = invoke(*common, "--query-budget", 5)
    assert "a budget in money needs the prices" in " ".join(result.output.split())
