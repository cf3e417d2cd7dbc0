"""Training on a Ray cluster: the weights that torchrun gives, whoever is killed meanwhile."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from sentence_transformers import SentenceTransformer, SentenceTransformerTrainer, SentenceTransformerTrainingArguments
from transformers import TrainerCallback

from st_clp import AnceCallback, CLPLoss, mine_hard_negatives
from st_clp.data import CollectionError
from st_clp.option_values import SettingsError
from st_clp.refresh.generations import is_whole
from st_clp.refresh.rows_in_use import Layout
from st_clp.run.folder import RunDirectory
from st_clp.run.ray_training import train_on_cluster
from st_clp.run.splits import load_collections
from st_clp.run.stages import run
from st_clp.run.training_stage import TrainingStage
from st_clp.settings import RunSettings
from tests.distributed.words import collection_of_words
from tests.toy import write_beir

pytest.importorskip("ray", reason="Ray is not installed: pip install 'st-clp[ray]'")


STEPS = 3 * (180 // 8)  # 20 of the 200 queries are held out for evaluation


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_beir(collection_of_words(400, queries=200), tmp_path_factory.mktemp("data") / "words")


@pytest.fixture(scope="module")
def settings(tiny_model_path: Path, source: Path, tmp_path_factory: pytest.TempPathFactory) -> RunSettings:
    """With all that training may do: a mixture, refreshed negatives, averaging."""
    return RunSettings(
        model=str(tiny_model_path),
        collection=[str(source)],
        output=str(tmp_path_factory.mktemp("run") / "cluster"),
        encode_dtype="model",
        bf16=False,
        sentence_queries=0,
        num_negatives=2,
        range_max=20,
        batch_size=4,
        epochs=3,
        training_arg={"save_steps": 10},
        experts=2,
        refresh_every="25",
        average_with_base="0.5",
        ray="auto",
        train_workers=2,
    )


def weights_in(folder: str | Path) -> bytes:
    return (Path(folder) / "model.safetensors").read_bytes()


def by_torchrun(settings: RunSettings, output: Path, address: str) -> None:
    """Train on the rows that a finished run has mined."""
    work = output / "run"
    shutil.copytree(Path(settings.output) / "run" / "mined", work / "mined")
    dataclasses.replace(settings, output=str(output)).write_yaml(work / "settings.yaml")
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    paths = [path for path in sys.path if path]
    result = subprocess.run(
        [*launcher, str(Path(__file__).with_name("train_share.py")), str(output)],
        env={
            **os.environ,
            "OMP_NUM_THREADS": "1",
            "RAY_ADDRESS": address,
            "PYTHONPATH": os.pathsep.join(paths),
        },
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert result.returncode == 0, result.stderr


def training_workers() -> list[psutil.Process]:
    found = []
    for process in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.Error):
            if "RayTrainWorker" in " ".join(process.cmdline()):
                found.append(process)
    return found


def mined(settings: RunSettings, output: str) -> TrainingStage:
    """The training stage of a run whose rows are there."""
    here = dataclasses.replace(settings, output=output)
    directory = RunDirectory(here.output)
    directory.prepare(here)
    shutil.copytree(Path(settings.output) / "run" / "mined", directory.work / "mined")
    said: list[str] = []
    return TrainingStage(here, directory, load_collections(here).train, say=said.append)


def test_a_run_on_the_cluster_has_the_weights_of_torchrun_though_a_worker_is_killed(
    cluster: Any, settings: RunSettings, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    try:
        report = run(settings)
    except RuntimeError as error:
        if "Backend gloo does not support alltoall" in str(error):
            pytest.skip(f"torch {torch.__version__} cannot gather with gradients between processors, only between GPUs")
        raise
    assert report["training"]["rows"]
    assert report["training"]["steps"] == STEPS
    assert [refresh["status"] for refresh in report["training"]["refreshes"]] == ["first", "used", "used"]
    by_torchrun(settings, tmp_path / "torchrun", cluster.address)
    assert weights_in(settings.output) == weights_in(tmp_path / "torchrun")
    assert weights_in(settings.output) != weights_in(settings.model)
    left = {path.name for path in (Path(settings.output) / "run").iterdir()}
    assert left - {"embeddings"} == {"evaluations", "mined", "refreshes.png", "settings.yaml", "stages"}

    # What a killed worker costs is what came after the last checkpoint.
    stage = mined(settings, str(tmp_path / "killed"))
    killed = threading.Event()

    def kill() -> None:
        while not killed.wait(0.02):
            if stage.directory.last_checkpoint() is not None and (workers := training_workers()):
                workers[-1].kill()
                killed.set()

    killer = threading.Thread(target=kill)
    killer.start()
    try:
        result = train_on_cluster(stage)
    finally:
        killed.set()
        killer.join()
    assert "a worker of the training is lost; all go on from checkpoint-" in caplog.text
    assert result["steps"] == report["training"]["steps"]
    assert result["refreshes"][1]["changed"] == report["training"]["refreshes"][1]["changed"]
    assert weights_in(tmp_path / "killed") == weights_in(settings.output)


def test_what_goes_wrong_in_training_is_said_with_the_node(cluster: Any, settings: RunSettings, tmp_path: Path) -> None:
    settings = dataclasses.replace(settings, output=str(tmp_path / "empty"))
    directory = RunDirectory(settings.output)
    directory.prepare(settings)
    stage = TrainingStage(settings, directory, load_collections(settings).train, say=print)
    with pytest.raises(CollectionError, match=r"on node .*mined.* is not there"):
        train_on_cluster(stage)


def test_training_on_a_cluster_is_refused_where_it_cannot_be() -> None:
    with pytest.raises(SettingsError, match=r"train_workers is for a Ray cluster: name one \(ray\)"):
        RunSettings(train_workers=2)


def test_a_local_cluster_without_room_says_so(cluster: Any, settings: RunSettings) -> None:
    asked = dataclasses.replace(settings, ray="local", train_workers=1000)  # this process is part of one already
    stage = TrainingStage(asked, RunDirectory(asked.output), [], print)
    with pytest.raises(SettingsError, match="train_workers=1000: the cluster has room for 3 that take 1 CPU each"):
        train_on_cluster(stage)


class Patient(TrainerCallback):
    """Waits at the steps where new negatives are due until they are there, so that no run uses them late."""

    def __init__(self, folder: Path) -> None:
        self._layout = Layout(folder)

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        begun = state.global_step - 3
        deadline = time.monotonic() + 60
        while begun > 0 and begun % 8 == 0 and not is_whole(self._layout.negatives(begun)):
            assert time.monotonic() < deadline, self._layout.log.read_text()[-2000:]
            time.sleep(0.1)


@pytest.mark.parametrize("asynchronous", [False, True])
def test_negatives_that_are_refreshed_on_the_cluster_are_those_of_one_process(
    cluster: Any, tiny_model_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, asynchronous: bool
) -> None:
    """More than one part of documents, so that workers encode them."""
    torch.set_num_threads(1)
    collection = collection_of_words(4500, queries=60)
    # Another process joins what this one is part of.
    monkeypatch.setenv("RAY_ADDRESS", cluster.address)

    def trained(where: str, **on: Any) -> tuple[list[dict[str, Any]], bytes]:
        model = SentenceTransformer(str(tiny_model_path), device="cpu")
        rows = mine_hard_negatives(model, collection, num_negatives=2, output_details=True, verbose=False)
        how = {"every": 8, "asynchronous": asynchronous, "dtype": "model", **on}
        if asynchronous:
            how["lag"] = 4
        ance = AnceCallback(collection, rows, folder=tmp_path / where / "ance", **how)
        arguments = SentenceTransformerTrainingArguments(
            str(tmp_path / where),
            num_train_epochs=2,
            per_device_train_batch_size=8,
            learning_rate=1e-3,
            use_cpu=True,
            report_to="none",
            disable_tqdm=True,
            save_strategy="no",
        )
        trainer = SentenceTransformerTrainer(
            model=model,
            args=arguments,
            train_dataset=ance.train_dataset,
            loss=CLPLoss(model),
            callbacks=[ance, Patient(tmp_path / where / "ance")] if asynchronous else [ance],
        )
        trainer.train()
        model.save(str(tmp_path / where / "model"))
        told = [{k: v for k, v in refresh.items() if k != "seconds"} for refresh in ance.refreshes]
        return told, weights_in(tmp_path / where / "model")

    here, there = trained("here"), trained("there", ray="auto", workers=2)
    assert [refresh["status"] for refresh in there[0]].count("used") >= 1
    assert all(refresh["status"] != "failed" for refresh in there[0]), there[0]
    assert there == here
