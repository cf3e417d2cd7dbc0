"""Refresh the hard negatives while training goes on.

Xiong et al. (2021), Approximate Nearest Neighbor Negative Contrastive Learning for Dense Text Retrieval,
arXiv:2007.00808: the negatives come from the model as it is, not as it was before training.
"""

from __future__ import annotations

import inspect
import logging
import shutil
import time
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from sentence_transformers import SentenceTransformer
from transformers import TrainerCallback

from st_clp.data import Collection
from st_clp.mining.miner import mine
from st_clp.mining.options import MiningOptions
from st_clp.mining.refresh import snapshot
from st_clp.mining.refresh.background import BackgroundMiner
from st_clp.mining.refresh.collating import Negatives, RefreshingCollator, generation_folder
from st_clp.mining.refresh.dataset import columns_to_refresh, mining_options_of, named, to_train_on
from st_clp.mining.refresh.generation import is_whole, mine_generation, read_account, write_first
from st_clp.mining.refresh.history import History, Refresh, used_after_checkpoint, write_journal
from st_clp.mining.refresh.processes import HEARTBEAT, Processes
from st_clp.mining.refresh.worker import Job

if TYPE_CHECKING:
    from datasets import Dataset, DatasetDict

logger = logging.getLogger(__name__)

STATE = "st_clp.refreshes"
"""Where in the Trainer's state, and so in a checkpoint, the history is kept."""


class AnceCallback(TrainerCallback):
    """Mine the hard negatives of a training set anew while it is trained on, with the model as it is then.

    Every ``every`` steps the current weights mine, and the batches after that have the new negatives, their queries
    and the weights of these. Rows, their order and their number stay as they are, and so does what the Trainer's
    sampler does: a batch sampler without duplicates looks at the negatives that training began with.

    Synchronously, training stands still while the model mines. Asynchronously (as in the ANCE paper), a copy of the
    weights is mined by another process, and training goes on with the negatives that it has: what was begun at step s
    is used from step s + ``lag``, or as soon after as it is there. A fixed lag is what makes a run repeatable.

    A run that is resumed from a checkpoint, in the middle of a refresh too, has the same batches as one that was not
    stopped: the checkpoint says which negatives are in use, and the refresh that was under way is taken up from the
    same weights. (A resumed run waits for it at the step where it is due. Where mining takes longer than ``lag``, the
    step at which it was used is known if it was used before the run was stopped.)

    A refresh that fails, because the disk is full or the process was killed, is logged as an error and counted, and
    training goes on with the negatives it has. The next refresh tries again.

    Among several processes (DDP) the first one mines and all use what it found; they must share the folder.

    Args:
        collections: The collection that the rows were mined from; or a mapping of names to collections.
        rows: The rows that training begins with, from :func:`st_clp.mine_hard_negatives` with
            ``output_details=True``; or a mapping with the same names as ``collections``.
        every: Steps between two refreshes; or ``"epoch"``.
        options: What to mine. None: as many negatives and queries as the rows have, and the defaults otherwise. Give
            the options that the rows were mined with.
        asynchronous: Mine in another process while training goes on.
        lag: Asynchronous: after how many steps the negatives are used. None: as many as lie between refreshes.
            0: as soon as they are there, which no other run will repeat.
        threads: Asynchronous on a processor: threads to mine with. While training on a processor, it has as many
            fewer, from its first step to its last, so that the two do not disturb each other.
        device: Asynchronous: what to mine on. None: a GPU that training does not use, or else what it uses.
        folder: Where negatives, snapshots and embeddings are kept while they are needed. None: ``ance`` in the
            Trainer's ``output_dir``.
        **mining: Further arguments of :func:`st_clp.mining.mine`: ``dtype``, ``batch_size``, ``cross_encoder`` …

    Attributes:
        train_dataset: What to give the Trainer: the rows, with their numbers in a column ``row``; a ``DatasetDict``
            where there are several collections.
        refreshes: What became of each refresh (a list of dictionaries): the ``step`` whose weights mined, its
            ``status``, the step from which it was ``used_from``, its ``age`` in steps by then, ``seconds`` of mining,
            the share of negatives that ``changed``, ``mean_positive_score`` and ``mean_negative_score``, the share of
            negatives ``above_positive`` (which may be answers), and the same for each of the ``collections``. The
            first entry is about the rows that training began with. :func:`st_clp.mining.plot_refreshes` draws it.
        log: Called with the account of each refresh. Set it to ``trainer.log`` to have the account sent wherever the
            Trainer reports to; by default it goes to ``trainer.state.log_history`` alone. Every log of the Trainer
            gets ``negatives_age``, how many steps ago the negatives in use were mined.

    Raises:
        ValueError: An option is out of range, or rows and collections do not belong together.

    Example::

        rows = mine_hard_negatives(model, train, num_negatives=4, output_details=True)
        ance = AnceCallback(train, rows, every=500, asynchronous=True)
        trainer = SentenceTransformerTrainer(
            model=model, args=args, train_dataset=ance.train_dataset, loss=CLPLoss(model), callbacks=[ance]
        )
        trainer.train()
    """

    def __init__(
        self,
        collections: Collection | Mapping[str, Collection],
        rows: Dataset | Mapping[str, Dataset],
        *,
        every: int | Literal["epoch"] = "epoch",
        options: MiningOptions | None = None,
        asynchronous: bool = False,
        lag: int | None = None,
        threads: int = 1,
        device: str | None = None,
        folder: str | Path | None = None,
        **mining: Any,
    ) -> None:
        if every != "epoch" and (not isinstance(every, int) or isinstance(every, bool) or every < 1):
            raise ValueError(f'every must be a number of steps, at least 1, or "epoch", got {every!r}')
        if (lag is not None and lag < 0) or threads < 1:
            raise ValueError(f"lag must be at least 0 and threads at least 1, got lag={lag} and threads={threads}")
        known = inspect.signature(mine).parameters.keys() - {"model", "collection", "options", "store_dir"}
        for name in mining.keys() - known:
            raise ValueError(f"AnceCallback knows no {name!r}, and mine takes {', '.join(sorted(known))}")
        self._collections, self._rows = named(collections, rows)
        self._options = mining_options_of(self._rows, options)
        self._every, self._asynchronous, self._lag = every, asynchronous, lag
        self._threads, self._device = threads, device
        self._given_folder = Path(folder) if folder is not None else None
        self._mining = mining
        self._history = History()
        self._background: BackgroundMiner | None = None
        self._threads_before: int | None = None
        self.log: Callable[[dict[str, float]], None] | None = None
        self.train_dataset: Dataset | DatasetDict = to_train_on(self._rows)

    @property
    def refreshes(self) -> list[dict[str, Any]]:
        """What became of each refresh."""
        return [refresh.describe() for refresh in self._history.refreshes]

    # --- what the Trainer calls

    def on_train_begin(
        self, args: Any, state: Any, control: Any, model: Any = None, train_dataloader: Any = None, **kwargs: Any
    ) -> None:
        """Prepare the folder, or take up what a checkpoint says."""
        if getattr(args, "fsdp", None) or getattr(args, "deepspeed", None):
            raise ValueError(
                "AnceCallback needs the whole model in each process: it cannot work with FSDP or DeepSpeed"
            )
        self._model: SentenceTransformer = model
        self._folder = self._given_folder or Path(args.output_dir) / "ance"
        self._processes = Processes()
        self._mining_shown = {"show_progress_bar": not args.disable_tqdm, **self._mining}
        self._negatives = Negatives(self._folder, len(self._collections), columns_to_refresh(self._rows))
        stored = state.stateful_callbacks.get(STATE) if state.global_step else None
        if self._processes.first:
            self._prepare_folder(anew=stored is None)
        self._processes.share(None)  # none reads before the first has written
        if self._asynchronous and self._processes.first:
            self._background = self._make_background()
            self._background.start()
        self._leave_threads()
        self._take_up(stored, state)
        self._keep(state)
        self._collator = self._collate_with_negatives(train_dataloader)

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """See that the batch has the negatives that are in use."""
        if self._collator.given != self._negatives.step:
            raise RuntimeError(
                f"step {state.global_step + 1} was given negatives of step {self._collator.given}, though those of "
                f"step {self._negatives.step} are in use: this version of accelerate moves batches to the device at "
                "another time than AnceCallback knows"
            )

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Use a refresh that is due, and begin one."""
        step = state.global_step
        pending = self._history.pending
        if pending is not None and step >= pending.due:
            self._use_if_ready(pending, state)
        between = self._steps_between(state)
        if between is not None and step < state.max_steps:
            self._begin(step, step + (between if self._lag is None else self._lag), state)

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Remove negatives that neither this run nor any checkpoint needs."""
        if not self._processes.first:
            return
        checkpoints = [path.name.rpartition("-")[2] for path in Path(args.output_dir).glob("checkpoint-*")]
        oldest = min((int(step) for step in checkpoints if step.isdigit()), default=state.global_step)
        needed = self._history.in_use_at(oldest)
        for path in (self._folder / "negatives").glob("step-*"):
            step = path.name.removeprefix("step-").partition(".")[0]
            if path.is_dir() and step.isdigit() and 0 < int(step) < needed:
                shutil.rmtree(path, ignore_errors=True)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        """Say how old the negatives in use are, in steps."""
        if logs is None:
            return
        logs["negatives_age"] = state.global_step - self._history.current.step
        if state.log_history:
            state.log_history[-1]["negatives_age"] = logs["negatives_age"]

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """End the process beside, and count a refresh that came too late."""
        if self._background is not None:
            self._background.stop()
        if self._threads_before is not None:
            torch.set_num_threads(self._threads_before)
        if self._processes.first:
            shutil.rmtree(self._folder / "embeddings", ignore_errors=True)
        pending = self._history.pending
        if pending is not None:
            pending.status = "unused"
            logger.warning("the refresh of step %d was not used: training ended first", pending.step)
            self._drop_snapshot(pending)
            self._keep(state)

    # --- beginning

    def _prepare_folder(self, *, anew: bool) -> None:
        if anew:
            for name in ("negatives", "snapshots"):
                shutil.rmtree(self._folder / name, ignore_errors=True)
            self._journal.unlink(missing_ok=True)
        self._folder.mkdir(parents=True, exist_ok=True)
        if not is_whole(generation_folder(self._folder, 0)):
            write_first(generation_folder(self._folder, 0), self._rows)

    def _take_up(self, stored: list[dict[str, Any]] | None, state: Any) -> None:
        """The history as the checkpoint has it, or a new one."""
        step = state.global_step
        if stored is None:
            first = Refresh(0, "first", due=0, used_from=0)
            first.take(read_account(generation_folder(self._folder, 0)))
            self._history.refreshes = [first]
            return
        self._history = History.from_json(stored)
        current = self._history.current
        try:
            self._negatives.use(current.step)
        except FileNotFoundError as error:
            raise RuntimeError(
                f"step {step} was trained with the negatives of step {current.step}, but {error}: resume with the "
                "folder that the run had, or start anew"
            ) from error
        pending = self._history.pending
        if pending is None:
            return
        used = used_after_checkpoint(self._journal, pending.step)
        if used is not None and used > step:
            pending.due = used
        # What was not used when the run was stopped is used when it is due, as if the run had not been stopped.
        pending.waits = pending.due > step
        if self._processes.first and not is_whole(generation_folder(self._folder, pending.step)):
            logger.info("taking up the refresh of step %d", pending.step)
            self._try(pending, lambda: self._mine_beside(pending))
        pending.error = self._processes.share(pending.error)
        self._settle(pending, state)

    def _collate_with_negatives(self, loader: Any) -> RefreshingCollator:
        if type(loader).__name__ == "DataLoaderDispatcher":
            raise ValueError("AnceCallback cannot work with dispatch_batches: each process must read its own rows")
        base = getattr(loader, "base_dataloader", loader)
        inner = base.collate_fn
        collator = RefreshingCollator(inner, self._negatives)
        base.collate_fn = collator
        return collator

    def _make_background(self) -> BackgroundMiner:
        frozen = self._folder / "snapshots" / "frozen.safetensors"
        snapshot.write_frozen(self._model, frozen)
        device = self._device or _free_device(self._model.device)
        mining = {"show_progress_bar": False, **self._mining}
        job = Job(
            snapshot.skeleton(self._model),
            frozen,
            dict(self._collections),
            self._options,
            mining,
            device,
            self._threads,
            self._folder / "embeddings",
        )
        return BackgroundMiner(job, self._folder / "mining.log")

    def _leave_threads(self) -> None:
        """Give the process beside its share of the processor, from the first step to the last.

        A sum over another number of threads can differ in its last bit, so the number must not change in between.
        """
        self._threads_before = None
        beside = torch.device(self._device or _free_device(self._model.device))
        if self._asynchronous and self._model.device.type == beside.type == "cpu":
            self._threads_before = torch.get_num_threads()
            torch.set_num_threads(max(1, self._threads_before - self._threads))

    # --- a refresh

    def _steps_between(self, state: Any) -> int | None:
        """How many steps lie between refreshes, at a step where one begins; None at the others."""
        step = state.global_step
        if self._every == "epoch":
            epoch = float(state.epoch or 0)
            return step // int(epoch) if epoch.is_integer() and epoch >= 1 else None
        return self._every if step % self._every == 0 else None

    def _begin(self, step: int, due: int, state: Any) -> None:
        pending = self._history.pending
        if pending is not None:
            logger.warning(
                "step %d: no refresh, for that of step %d is still mining; refresh less often, or with more threads",
                step,
                pending.step,
            )
            return
        if self._asynchronous and due >= state.max_steps:
            return  # no batch would come after it
        refresh = Refresh(step, "mining", due=due if self._asynchronous else step)
        self._history.refreshes.append(refresh)
        if self._asynchronous:
            if self._processes.first:
                self._try(refresh, lambda: self._snapshot_and_mine(refresh))
            refresh.error = self._processes.share(refresh.error)
            self._settle(refresh, state)
        else:
            self._use_if_ready(refresh, state)

    def _snapshot_and_mine(self, refresh: Refresh) -> None:
        snapshot.write_trained(self._model, self._snapshot(refresh))
        self._mine_beside(refresh)

    def _mine_beside(self, refresh: Refresh) -> None:
        if self._background is None:  # begun asynchronously, resumed synchronously
            raise RuntimeError("it was under way in another process, and this run refreshes synchronously")
        if not self._snapshot(refresh).is_file():
            raise FileNotFoundError(f"the weights that it was to mine with are not in {self._snapshot(refresh)}")
        self._background.mine(
            self._snapshot(refresh),
            previous=generation_folder(self._folder, self._history.current.step),
            folder=generation_folder(self._folder, refresh.step),
        )

    def _mine_now(self, refresh: Refresh) -> None:
        with snapshot.random_state_kept():
            mine_generation(
                snapshot.detached_copy(self._model),
                self._collections,
                self._options,
                self._mining_shown,
                previous=generation_folder(self._folder, self._history.current.step),
                folder=generation_folder(self._folder, refresh.step),
                stores=self._folder / "embeddings",
            )

    def _use_if_ready(self, refresh: Refresh, state: Any) -> None:
        """Use the negatives of a refresh from the next step on, if they are there. All processes do the same."""

        def outcome() -> dict[str, Any]:
            if refresh.error is None:
                self._try(refresh, lambda: self._finish(refresh))
            ready = refresh.error is None and is_whole(generation_folder(self._folder, refresh.step))
            return {"ready": ready, "error": refresh.error}

        if self._asynchronous and not refresh.waits:
            found = self._processes.share(outcome() if self._processes.first else None)
        else:
            found = self._processes.from_first(outcome)
        refresh.error = found["error"]
        if found["ready"]:
            refresh.status, refresh.used_from = "used", state.global_step
            refresh.take(read_account(generation_folder(self._folder, refresh.step)))
            self._negatives.use(refresh.step)
        self._settle(refresh, state)

    def _settle(self, refresh: Refresh, state: Any) -> None:
        """Keep what became of a refresh, and say it where it is over."""
        if refresh.error is not None:
            refresh.status = "failed"
        self._keep(state)
        if refresh.status != "mining":
            self._drop_snapshot(refresh)
            self._say(refresh, state)

    def _finish(self, refresh: Refresh) -> None:
        """Mine, or look whether the process beside has mined; wait for it where this run must."""
        if is_whole(generation_folder(self._folder, refresh.step)) and self._asynchronous:
            return
        if not self._asynchronous:
            self._mine_now(refresh)
        elif self._background is not None:
            while not self._background.ready() and refresh.waits:
                time.sleep(HEARTBEAT)

    def _try(self, refresh: Refresh, work: Callable[[], None]) -> None:
        """Do what may fail without ending the training; the refresh then says why."""
        try:
            work()
        except Exception as error:  # whatever it is, training can go on without it
            logger.debug("%s", traceback.format_exc())
            refresh.error = f"{type(error).__name__}: {error}"

    # --- what is left behind

    @property
    def _journal(self) -> Path:
        return self._folder / "refreshes.json"

    def _snapshot(self, refresh: Refresh) -> Path:
        return self._folder / "snapshots" / f"step-{refresh.step:08d}.safetensors"

    def _drop_snapshot(self, refresh: Refresh) -> None:
        if self._processes.first:
            self._snapshot(refresh).unlink(missing_ok=True)

    def _keep(self, state: Any) -> None:
        """Put the history where the next checkpoint takes it from, and where a killed run finds it."""
        state.stateful_callbacks[STATE] = self._history.to_json()
        if self._processes.first:
            try:
                write_journal(self._journal, self._history)
            except OSError as error:
                logger.error("%s cannot be written: %s", self._journal, error)

    def _say(self, refresh: Refresh, state: Any) -> None:
        if not self._processes.first:
            return
        if refresh.status == "failed":
            current = self._history.current.step
            logger.error(
                "the refresh of step %d failed, and training goes on with the negatives of step %d: %s",
                refresh.step,
                current,
                refresh.error,
            )
            values: dict[str, float] = {"refresh_failed": 1.0}
        else:
            described = refresh.describe()
            kept = sum(account["kept"] for account in refresh.collections.values())
            if kept:
                logger.warning("%d rows were not mined again and keep the negatives that they had", kept)
            names = ("age", "seconds", "changed", "mean_positive_score", "mean_negative_score", "above_positive")
            values = {f"refresh_{name}": round(described[name], 4) for name in names if described[name] is not None}
        if self.log is not None:
            self.log(dict(values))
        else:
            state.log_history.append({**values, "epoch": state.epoch, "step": state.global_step})


def _free_device(used: torch.device) -> str:
    """A GPU that training does not use, or else what it uses."""
    if used.type != "cuda":
        return str(used)
    distributed = torch.distributed
    processes = distributed.get_world_size() if distributed.is_available() and distributed.is_initialized() else 1
    number = torch.cuda.device_count()
    return f"cuda:{number - 1}" if number > processes else str(used)
