"""What a run says that it will cost, before it begins and by ``--dry-run``."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sentence_transformers import SentenceTransformer
from typer.testing import CliRunner

from st_clp import cli
from st_clp.run import forecast, stages
from st_clp.run.folder import RunDirectory
from st_clp.run.forecast import Forecast
from st_clp.run.training_trial import try_steps

from .test_run import settings_of

CHECKPOINTS_AND_MODEL = 3
TEXTS = ["where is the red river", "in the north is a big lake"]


def by_name(found: Forecast) -> dict[str, str]:
    return {stage.name: stage.work for stage in found.stages}


def test_a_dry_run_counts_all_that_is_to_be_done_and_writes_nothing(
    tiny_model_path: Path, collection_path: Path, tmp_path: Path
) -> None:
    output = tmp_path / "out"
    found = stages.forecast_run(settings_of(tiny_model_path, collection_path, output))
    work = by_name(found)
    assert work["evaluate-before"].startswith("90 documents of ")
    assert work["evaluate-before"].endswith(" tokens to encode, 60 queries")
    assert work["evaluate-after"] == work["evaluate-before"]
    assert work["mine"] == "120 queries"  # the documents are encoded by then
    assert work["train"].startswith("32 steps of ")  # 120 rows in batches of 16, four times
    assert "about 120 rows, 16 a batch" in work["train"]
    assert all(stage.seconds and stage.seconds > 0 for stage in found.stages)
    assert found.step is not None
    model = SentenceTransformer(str(tiny_model_path))
    assert found.step.parameters[1] > sum(parameter.numel() for parameter in model.parameters())  # there are experts
    assert found.step.weights == 4 * found.step.parameters[1]
    assert found.step.trained == 12 * found.step.parameters[0]
    assert found.step.activations > 0
    assert found.disk > CHECKPOINTS_AND_MODEL * found.step.weights
    assert not list(tmp_path.iterdir())


def test_queries_that_are_held_out_are_not_counted_as_trained_on(
    tiny_model_path: Path, collection_path: Path, tmp_path: Path
) -> None:
    settings = settings_of(tiny_model_path, collection_path, tmp_path / "out", average_with_base="auto")
    assert "about 108 rows" in by_name(stages.forecast_run(settings))["train"]


def test_the_command_says_it_line_by_line(tiny_model_path: Path, collection_path: Path, tmp_path: Path) -> None:
    command = ["run", "--model", tiny_model_path, "--collection", collection_path, "--output", tmp_path / "out"]
    result = CliRunner().invoke(cli.app, [*map(str, command), "--dry-run", "--average-with-base", "auto"])
    assert result.exit_code == 0, result.output
    lines = [line.split() for line in result.stdout.splitlines()]
    starts = [line[0] for line in lines if line]
    assert starts == ["What", "evaluate", "mine", "train", "evaluate", "in", "memory", "not", "not"]
    assert "choosing the share of the base's weights" in result.stdout
    assert "freed memory that a process on a CPU keeps" in result.stdout
    assert not list(tmp_path.iterdir())
    # What cannot be run is refused as a run refuses it.
    result = CliRunner().invoke(cli.app, [*map(str, command), "--dry-run", "--training-arg", "weight_decay=much"])
    assert result.exit_code == 1
    assert "weight_decay" in result.output


def test_a_forecast_changes_nothing_of_the_run(
    tiny_model_path: Path, collection_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    reports = {}
    for name, trifle in (("said", 0.0), ("not said", float("inf"))):
        monkeypatch.setattr(forecast, "TRIFLE", trifle)
        reports[name] = stages.run(settings_of(tiny_model_path, collection_path, tmp_path / name, epochs=1))
        assert ("What it will take" in capsys.readouterr().out) == (name == "said")
    assert reports["said"]["scores"] == reports["not said"]["scores"]
    assert reports["said"]["training"]["history"] == reports["not said"]["training"]["history"]
    weights = [(tmp_path / name / "model.safetensors").read_bytes() for name in reports]
    assert weights[0] == weights[1]


def test_what_is_there_is_not_counted_again(tiny_model_path: Path, collection_path: Path, tmp_path: Path) -> None:
    settings = settings_of(tiny_model_path, collection_path, tmp_path / "out", epochs=1)
    directory = RunDirectory(settings.output)
    stop = RuntimeError("stopped")

    class Stopping(stages._Run):
        def _mine(self) -> dict[str, Any]:
            raise stop

    with pytest.raises(RuntimeError, match="stopped"):
        Stopping(settings, stages.new_console()).go(resume=False, overwrite=False)
    found = stages.forecast_run(settings, resume=True)
    assert [stage.seconds is None for stage in found.stages] == [True, False, False, False]
    assert "finished" in str(found)
    # Its record gone, its embeddings still are there.
    directory.records.forget("evaluate-before")
    found = stages.forecast_run(settings, resume=True)
    assert by_name(found)["evaluate-before"] == "60 queries"
    assert "90 documents" in by_name(found)["evaluate-after"]


def test_a_long_run_says_what_would_shorten_it(tiny_model_path: Path, collection_path: Path, tmp_path: Path) -> None:
    settings = settings_of(tiny_model_path, collection_path, tmp_path / "out", num_negatives=4)
    found = stages.forecast_run(settings)
    assert "shorter" not in str(found)
    train = next(stage for stage in found.stages if stage.name == "train")
    hours = dataclasses.replace(train, seconds=3 * 3600.0)
    found = dataclasses.replace(found, stages=(hours,), disk=found.disk_free + 1, memory_free=1)
    assert "3.0 h" in str(found)
    assert "--num-negatives 2" in str(found)
    assert "free some, or name another --output" in str(found)
    assert "--mini-batch-size" in str(found)


@pytest.mark.parametrize("mini_batch_size", [None, 4])
@pytest.mark.parametrize("experts", [0, 2])
def test_a_trial_step_leaves_the_model_as_it_is(
    tiny_model: SentenceTransformer, tmp_path: Path, experts: int, mini_batch_size: int | None
) -> None:
    before = tiny_model.encode(TEXTS)
    flags = [parameter.requires_grad for parameter in tiny_model.parameters()]
    settings = settings_of(tmp_path, tmp_path, tmp_path, experts=experts, mini_batch_size=mini_batch_size)
    cost = try_steps(tiny_model, settings, TEXTS, TEXTS, seconds=1000)
    assert cost.batch_size == settings.batch_size  # there is time for all of them
    np.testing.assert_array_equal(tiny_model.encode(TEXTS), before)
    assert [parameter.requires_grad for parameter in tiny_model.parameters()] == flags
    assert all(parameter.grad is None for parameter in tiny_model.parameters())


def test_activations_are_those_that_autograd_keeps(tiny_model: SentenceTransformer, tmp_path: Path) -> None:
    """Twice the rows, twice the bytes; smaller mini-batches, fewer."""
    costs = {
        name: try_steps(
            tiny_model,
            settings_of(tmp_path, tmp_path, tmp_path, experts=0, **changes),
            TEXTS[:1],
            TEXTS[:1],
            seconds=1e-9,  # the fewest rows alone are tried
        ).activations
        for name, changes in (
            ("16", {}),
            ("32", {"batch_size": 32}),
            ("32 by 4", {"batch_size": 32, "mini_batch_size": 4}),
            ("more negatives", {"num_negatives": 5}),
        )
    }
    assert costs["32"] == 2 * costs["16"]
    assert costs["32 by 4"] < costs["32"] / 4
    assert costs["more negatives"] > 1.5 * costs["16"]
    # A transformer of width 32 keeps some 20 to 60 numbers of its width a token and layer.
    tokens = 16 * 8 * (2 + 2 + 2)
    assert 4 * 32 * tokens * 10 < costs["16"] < 4 * 32 * tokens * 2 * 60


def test_weights_in_another_precision_are_kept_once_and_not_for_each_row(
    tiny_model: SentenceTransformer, tmp_path: Path
) -> None:
    costs = [
        try_steps(
            tiny_model,
            settings_of(tmp_path, tmp_path, tmp_path, experts=0, batch_size=rows, bf16=True),
            TEXTS[:1],
            [4 * TEXTS[0]],
            seconds=1000,
        ).activations
        for rows in (16, 32, 48)
    ]
    assert costs[2] - costs[1] == pytest.approx(costs[1] - costs[0], rel=0.05)
    layers = [module for module in tiny_model.modules() if isinstance(module, torch.nn.Linear)]
    once = 2 * costs[0] - costs[1]
    # Every layer's weights in bfloat16, for the queries and for the documents; but for the pooler, which is not used.
    assert once > sum(2 * layer.weight.numel() for layer in layers)


def test_a_corpus_counts_what_is_there_and_not_what_its_catalogue_says(tmp_path: Path) -> None:
    import ir_datasets

    from st_clp.data.sources.irds import IrdsCorpus

    class Part:
        """A dataset of ir_datasets of which only a part was put into the home."""

        def __init__(self, documents: int) -> None:
            path = tmp_path / f"{documents}.tsv"
            path.write_text("".join(f"d{number}\tthe river {number}\n" for number in range(documents)))
            self._docs = ir_datasets.create_dataset(docs_tsv=str(path))
            self._path = path

        def __getattr__(self, name: str) -> Any:
            return getattr(self._docs, name)

        def docs_namespace(self) -> str:
            return "part"

        def docs_count(self) -> int:
            return 11_153_802

        def docs_path(self, force: bool = True) -> str:
            return str(self._path)

    for documents in (0, 1, 2067):
        assert IrdsCorpus(Part(documents), None).expected_size() == documents
