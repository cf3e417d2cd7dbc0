"""Resuming: files that are gone, cut off or changed meanwhile, other settings, records of any kind."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from sentence_transformers import SentenceTransformerTrainer
from typer.testing import CliRunner

import st_clp
from st_clp import cli
from st_clp.run import stages, training_stage
from st_clp.settings import RunSettings

TEXTS = ["where is the red river", "in the north is a big lake"]
COMMON = "--num-negatives 1 --range-max 10 --epochs 0.5 --learning-rate 3e-3 --scale 20 --no-bf16 --experts 2".split()


def invoke(*arguments: Any) -> tuple[int, str]:
    result = CliRunner().invoke(cli.app, [str(argument) for argument in arguments])
    return result.exit_code, " ".join(result.output.split())


@pytest.fixture(scope="module")
def given(tiny_model_path: Path, collection_path: Path) -> list[Any]:
    return ["run", "--model", tiny_model_path, "--collection", collection_path, *COMMON]


@pytest.fixture(scope="module")
def finished(given: list[Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("finished") / "out"
    code, text = invoke(*given, "--output", output)
    assert code == 0, text
    return output


@pytest.fixture
def stop(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """``stop(owner, name)``: end the command where it next calls this; once."""

    def arm(owner: Any, name: str, error: BaseException | None = None) -> None:
        original = getattr(owner, name)

        def stopping(*arguments: Any, **options: Any) -> Any:
            monkeypatch.setattr(owner, name, original)
            raise error or KeyboardInterrupt

        monkeypatch.setattr(owner, name, stopping)

    return arm


def scores(output: Path) -> Any:
    return json.loads((output / "report.json").read_text())["scores"]


def require_same(output: Path, finished: Path) -> None:
    assert scores(output) == scores(finished)
    found, expected = (st_clp.load(str(folder)).encode(TEXTS) for folder in (output, finished))
    np.testing.assert_array_equal(found, expected)


def mined_file(output: Path) -> Path:
    (file,) = (output / "run" / "mined").glob("*.jsonl")
    return file


def cut_off(file: Path) -> None:
    lines = file.read_bytes().splitlines(keepends=True)
    file.write_bytes(b"".join(lines[: len(lines) // 2]))


@pytest.mark.parametrize("spoil", [cut_off, Path.unlink])
def test_mined_rows_that_are_not_whole_are_mined_again(
    spoil: Callable[[Path], None], given: list[Any], finished: Path, tmp_path: Path, stop: Callable[..., None]
) -> None:
    output = tmp_path / "out"
    stop(training_stage, "make_trainer")
    assert invoke(*given, "--output", output)[0] == 130
    spoil(mined_file(output))
    code, text = invoke("run", "--output", output, "--resume")
    assert code == 0, text
    assert "mine is done again: gone or changed since is" in text
    assert mined_file(output).name in text
    require_same(output, finished)


def test_weights_that_are_gone_are_trained_again(
    given: list[Any], finished: Path, tmp_path: Path, stop: Callable[..., None]
) -> None:
    output = tmp_path / "out"
    stop(stages, "load")  # after training
    assert invoke(*given, "--output", output)[0] == 130
    (output / "model.safetensors").unlink()
    code, text = invoke("run", "--output", output, "--resume")
    assert code == 0, text
    assert "train is done again: gone or changed since is" in text
    require_same(output, finished)


def test_resuming_a_finished_run_changes_nothing(finished: Path, tmp_path: Path) -> None:
    output = Path(shutil.copytree(finished, tmp_path / finished.name))
    code, text = invoke("run", "--output", output, "--resume")
    assert code == 0, text
    names = ["README.md", "report.json"]
    before, after = ([(folder / name).read_text() for name in names] for folder in (finished, output))
    assert after == [content.replace(str(finished), str(output)) for content in before]


def test_weights_that_were_changed_are_neither_evaluated_nor_replaced(finished: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    shutil.copytree(finished, output)
    weights = output / "model.safetensors"
    changed = bytearray(weights.read_bytes())
    changed[-1] ^= 1
    weights.write_bytes(changed)
    code, text = invoke("run", "--output", output, "--resume")
    assert code == 1
    assert f"{weights} (the same size, but another content than was written). Put the files back; or remove" in text
    assert weights.read_bytes() == changed
    (output / "run" / "stages" / "train.json").unlink()
    code, text = invoke("run", "--output", output, "--resume")
    assert code == 0, text
    require_same(output, finished)


def test_a_kill_while_checkpoints_are_removed_loses_nothing(
    given: list[Any], finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is left of a checkpoint may look whole: its state is there, and its model is not."""
    output = tmp_path / "out"
    remove = shutil.rmtree

    def remove_some(path: str | Path, *arguments: Any, **options: Any) -> None:
        if Path(path).name != "checkpoints":
            return remove(path, *arguments, **options)
        for file in Path(path).rglob("checkpoint-*/modules.json"):
            file.unlink()
        raise KeyboardInterrupt

    monkeypatch.setattr(shutil, "rmtree", remove_some)
    assert invoke(*given, "--output", output)[0] != 0
    monkeypatch.setattr(shutil, "rmtree", remove)
    assert list((output / "run" / "checkpoints").rglob("checkpoint-*/trainer_state.json"))
    code, text = invoke("run", "--output", output, "--resume")
    assert code == 0, text
    assert "Train: finished before" in text
    require_same(output, finished)
    assert not (output / "run" / "checkpoints").exists()


def test_a_lost_evaluation_is_made_again(finished: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    shutil.copytree(finished, output)
    shutil.rmtree(output / "run" / "evaluations")
    code, text = invoke("run", "--output", output, "--resume")
    assert code == 0, text
    assert (output / "run" / "evaluations" / "before" / "evaluation.json").is_file()
    assert "Train: finished before" in text
    require_same(output, finished)


def test_after_a_failure_only_what_is_computed_holds_settings(
    given: list[Any], finished: Path, tmp_path: Path, stop: Callable[..., None]
) -> None:
    output = tmp_path / "out"
    stop(SentenceTransformerTrainer, "training_step", ValueError("the learning rate is a joke"))
    code, text = invoke(*given, "--output", output, "--training-arg", "weight_decay=1e-2")
    assert code == 1
    assert "the learning rate is a joke" in text
    assert f"st-clp run --output {output} --resume" in text
    code, text = invoke("run", "--output", output, "--resume", "--num-negatives", "2")
    assert code == 1
    assert "num_negatives was 1, now 2), and what is computed depends on them" in text
    code, text = invoke("run", "--output", output, "--resume", "--training-arg", "weight_decay=0")
    assert code == 0, text
    assert "training_arg is {'weight_decay': 0} from here on; it was {'weight_decay': '1e-2'}" in text
    assert "Mine: finished before" in text
    require_same(output, finished)
    settings = json.loads((output / "report.json").read_text())["settings"]
    assert settings["training_arg"] == {"weight_decay": 0}
    code, text = invoke("run", "--output", output, "--resume", "--epochs", "1")
    assert code == 1
    assert "epochs was 0.5, now 1.0" in text


def test_the_whole_command_may_be_given_again_with_another_setting_of_a_later_stage(
    given: list[Any], tmp_path: Path, stop: Callable[..., None]
) -> None:
    output = tmp_path / "out"
    stop(training_stage, "make_trainer")
    assert invoke(*given, "--output", output)[0] == 130
    code, text = invoke(*given, "--output", output, "--resume", "--penalty-weight", "0.3", "--batch-size", "32")
    assert code == 0, text
    assert "penalty_weight is 0.3 from here on; it was 0.1" in text
    assert json.loads((output / "report.json").read_text())["settings"]["batch_size"] == 32


@pytest.mark.parametrize("left", ["nothing", "empty", "unfinished"])
@pytest.mark.parametrize("again", [[], ["--resume"], ["--overwrite"]])
def test_a_start_that_could_not_write_its_settings_blocks_nothing(
    left: str, again: list[str], given: list[Any], tmp_path: Path, stop: Callable[..., None]
) -> None:
    output = tmp_path / "out"
    stop(RunSettings, "write_yaml", OSError(28, os.strerror(28), str(output)))
    code, text = invoke(*given, "--output", output)
    assert code == 1
    assert "No space left on device" in text
    if left == "empty":  # as version 0.1.0 left it
        (output / "run" / "settings.yaml").touch()
    elif left == "unfinished":
        (output / "run" / "settings.yaml.1-deadbeef.partial").write_text("model: ")
    stop(stages, "load_collections")  # it has gone past the folder
    code, text = invoke(*given, "--output", output, *again)
    assert code == 130, text


def test_what_version_0_1_0_began_goes_on(given: list[Any], finished: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    shutil.copytree(finished, output)
    for record in (output / "run" / "stages").iterdir():
        content = json.loads(record.read_text())
        del content["outputs"]
        record.write_text(json.dumps(content))
    code, text = invoke("run", "--output", output, "--resume")
    assert code == 0, text
    assert "done again" not in text
    (output / "modules.json").unlink()
    code, text = invoke("run", "--output", output, "--resume")
    assert code == 0, text
    assert "train is done again" in text
    require_same(output, finished)


@pytest.mark.parametrize(
    ("stage", "change", "message"),
    [
        ("evaluate-before", {"scores": 7}, "scores"),
        ("evaluate-before", {"scores": {"c": {"ndcg@10": "high"}}}, "ndcg@10"),
        ("evaluate-after", {"expert_usage": [1]}, "expert_usage"),
        ("evaluate-after", {"seconds": "soon"}, "seconds"),
        ("evaluate-after", {"outputs": {"x": 3}}, "an output without size and digest"),
        ("evaluate-after", {"outputs": []}, "outputs"),
        ("evaluate-after", None, "nested too deep"),
    ],
)
def test_a_record_of_another_kind_is_said_and_its_stage_done_again(
    stage: str,
    change: dict[str, Any] | None,
    message: str,
    finished: Path,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    output = tmp_path / "out"
    shutil.copytree(finished, output)
    record = output / "run" / "stages" / f"{stage}.json"
    record.write_text("[" * 100_000 if change is None else json.dumps({**json.loads(record.read_text()), **change}))
    code, text = invoke("run", "--output", output, "--resume")
    assert code == 0, text
    assert f"{record}" in caplog.text
    assert message in caplog.text
    assert "the stage is done again" in caplog.text
    assert scores(output) == scores(finished)


def test_two_collections_of_one_name_are_kept_apart(
    given: list[Any], collection_path: Path, other_collection_path: Path, tmp_path: Path
) -> None:
    folders = [tmp_path / place / "data" / "mine" for place in ("one", "two")]
    for source, folder in zip((collection_path, other_collection_path), folders, strict=True):
        shutil.copytree(source, folder)
    both = [argument for folder in folders for argument in ("--collection", folder)]
    output = tmp_path / "out"
    code, text = invoke(*given[:3], *both, *COMMON, "--output", output)
    assert code == 0, text
    evaluated = tmp_path / "evaluated"
    code, text = invoke("evaluate", given[2], *both, "--output", evaluated)
    assert code == 0, text
    for evaluation in (evaluated, output / "run" / "evaluations" / "before", output / "run" / "evaluations" / "after"):
        found = json.loads((evaluation / "evaluation.json").read_text())["collections"]
        assert [result["source"] for result in found.values()] == [f"{folder}/dev" for folder in folders]
        assert len(list((evaluation / "runs").glob("*.trec"))) == 2
        assert [name[-17:] for name in found] == ["one_data_mine_dev", "two_data_mine_dev"]
    alone = [
        json.loads((tmp_path / f"alone {number}" / "evaluation.json").read_text())["collections"]
        for number, folder in enumerate(folders)
        if invoke("evaluate", given[2], "--collection", folder, "--output", tmp_path / f"alone {number}")[0] == 0
    ]
    together = json.loads((evaluated / "evaluation.json").read_text())["collections"]
    assert [result["scores"] for result in together.values()] == [
        result["scores"] for found in alone for result in found.values()
    ]
    assert len({json.dumps(result["scores"]) for result in together.values()}) == 2
