"""Training on several machines: the training stage runs in each of Ray Train's workers, in the run's shared folder.

The workers form a process group, as with torchrun, and give the same weights. If a worker is lost, all start again from
the Trainer's last checkpoint in the folder.
"""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
import socket
from typing import Any

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState

from st_clp.distributed import Failure, connect, gpus_per_worker, import_ray, release_idle
from st_clp.distributed.cluster import LOCAL
from st_clp.queries.own_text import is_made
from st_clp.run.cluster_reports import ReportActor, ShownReports
from st_clp.run.folder import RunDirectory
from st_clp.run.modelling import load_base_model
from st_clp.run.splits import load_collections
from st_clp.run.training_stage import TrainingStage
from st_clp.settings import RunSettings, SettingsError

logger = logging.getLogger(__name__)

TRIES = 5  # times that the workers may be lost before it is said


def train_on_cluster(stage: TrainingStage) -> dict[str, Any]:
    """Train on the cluster that the settings name, in ``train_workers`` processes.

    Returns:
        The first worker's result of :meth:`TrainingStage.run`.

    Raises:
        Exception: An error raised by a worker; its message names the node.
        RuntimeError: Workers were lost five times.
        SettingsError: There is no such cluster, or it lacks room.
    """
    ray = connect(stage.settings)
    takes = _takes(stage.settings, ray)
    release_idle()
    made = any(is_made(query_id) for collection in stage.collections for query_id in collection.queries)
    result = None
    for left in reversed(range(TRIES)):
        telling = ray.remote(ReportActor).options(num_cpus=0, scheduling_strategy=_here(ray)).remote()
        here = {"settings": stage.settings.to_dict(), "unasked": made, "cwd": os.getcwd(), "telling": telling}
        with ShownReports(ray, telling, stage.say):
            error = _fit(stage, here, takes)
        failures, result = ray.get(telling.ended.remote())
        if result is not None:
            break
        # A worker that failed has reported why; one that was lost has not.
        if failures and set(getattr(error, "worker_failures", failures)) <= set(failures):
            raise next(iter(failures.values())).as_error()
        if left == 0:
            raise RuntimeError(f"workers of the training were lost {TRIES} times: {error}") from error
        checkpoint = stage.directory.last_checkpoint()
        where = "the beginning" if checkpoint is None else checkpoint.name
        logger.warning("a worker of the training is lost; all go on from %s", where)
    if not stage.directory.model_files():
        raise SettingsError(
            f"the model was saved by a worker on another machine and is not in {stage.directory.path}: give --output a "
            "folder that all machines of the cluster share"
        )
    assert result is not None
    return result


def _here(ray: Any) -> Any:
    """Options that place an actor on this process's node, so that it is not on a machine that may be lost."""
    node = ray.get_runtime_context().get_node_id()
    return ray.util.scheduling_strategies.NodeAffinitySchedulingStrategy(node, soft=False)


def _takes(settings: RunSettings, ray: Any) -> dict[str, float]:
    """The resources of each worker.

    Raises:
        SettingsError: The cluster is this machine alone, and it lacks room for so many.
    """
    takes = {"CPU": float(settings.cpus_per_worker)}
    if gpus := gpus_per_worker(settings):
        takes["GPU"] = gpus
    has = ray.cluster_resources()
    room = min(int(has.get(kind, 0) / number) for kind, number in takes.items())
    number = settings.train_workers or 1
    if room < number:
        what = ", ".join(f"{count:g} {kind}" for kind, count in takes.items())
        text = f"train_workers={number}: the cluster has room for {room} that take {what} each"
        if settings.ray == LOCAL:
            raise SettingsError(text)
        logger.warning("%s; waiting for it to grow", text)
    return takes


def _fit(stage: TrainingStage, here: dict[str, Any], takes: dict[str, float]) -> Exception | None:
    """Train in the workers; return Ray's message if one of them was lost or failed."""
    from ray.train import RunConfig, ScalingConfig, TrainingFailedError
    from ray.train.torch import TorchConfig, TorchTrainer

    scratch = stage.directory.work / "ray"
    trainer = TorchTrainer(
        _train_in_worker,
        train_loop_config=here,
        scaling_config=ScalingConfig(
            num_workers=stage.settings.train_workers or 1, use_gpu="GPU" in takes, resources_per_worker=takes
        ),
        run_config=RunConfig(name="train", storage_path=str(scratch.absolute())),
        torch_config=TorchConfig(backend="nccl" if "GPU" in takes else "gloo"),
    )
    try:
        trainer.fit()
    except TrainingFailedError as error:
        return error
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return None


def _train_in_worker(here: dict[str, Any]) -> None:
    """Train in a worker."""
    settings = RunSettings(**here["settings"])
    telling = here["telling"]
    with contextlib.suppress(OSError):  # a machine without this folder has names that begin at the root
        os.chdir(here["cwd"])
    ray = import_ray()
    try:
        if not torch.cuda.is_available():
            torch.set_num_threads(settings.cpus_per_worker)
        directory = RunDirectory(settings.output)
        if not directory.settings_file.is_file():
            raise SettingsError(
                f"there is no {directory.settings_file}: give --output a folder that all machines share"
            )
        model = load_base_model(settings.model, max_seq_length=settings.max_seq_length)
        collections = load_collections(settings, unasked=here["unasked"]).train
        stage = TrainingStage(
            settings, directory, collections, say=lambda text: telling.say.remote(text), progress=_Progress(telling)
        )
        if result := stage.run(model):
            ray.get(telling.finish.remote(result))
    except Exception as error:  # of whatever is read, trained and written
        rank = ray.train.get_context().get_world_rank()
        ray.get(telling.fail.remote(rank, Failure(error, socket.gethostname())))
        raise


class _Progress(TrainerCallback):
    """Reports the progress of training."""

    def __init__(self, telling: Any) -> None:
        self._telling = telling
        self._loss: float | None = None

    def on_log(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Store the loss."""
        logs = kwargs.get("logs") or {}
        self._loss = float(logs["loss"]) if "loss" in logs else self._loss

    def on_train_begin(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Report the first step, or that of the checkpoint."""
        self._tell(state)

    def on_step_end(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Report a step."""
        self._tell(state)

    def _tell(self, state: TrainerState) -> None:
        if state.is_world_process_zero:
            self._telling.step.remote(state.global_step, state.max_steps, self._loss)
