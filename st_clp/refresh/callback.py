"""The callback that refreshes hard negatives during training.

Xiong et al. (2021), Approximate Nearest Neighbor Negative Contrastive Learning for Dense Text Retrieval,
arXiv:2007.00808: the negatives come from the model as it is, not as it was before training.
"""

from __future__ import annotations

import inspect
import logging
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from sentence_transformers import SentenceTransformer
from transformers import TrainerCallback

from st_clp.data import Collection
from st_clp.declaring import shows, takes
from st_clp.mining.miner import mine
from st_clp.options import MiningOptions, RefreshOptions
from st_clp.refresh.generations import is_whole, write_first
from st_clp.refresh.history import MEASURES, Refresh
from st_clp.refresh.mining_process import InProcessMiner, Miner, MiningJob, SubprocessMiner, free_device
from st_clp.refresh.refresher import Processes, Refresher
from st_clp.refresh.rows_in_use import Layout, Negatives, RefreshingCollator
from st_clp.refresh.training_set import columns_to_refresh, mining_options_of, named, to_train_on

if TYPE_CHECKING:
    from datasets import Dataset, DatasetDict

logger = logging.getLogger(__name__)

STATE = "st_clp.refreshes"
"""Where in the Trainer's state, and so in a checkpoint, the history is kept."""


@shows(refresh=RefreshOptions)
class AnceCallback(TrainerCallback):
    """Refresh the hard negatives of a training set during training, mined with the current model.

    Every ``every`` steps the current weights mine, and later batches have the new negatives, their queries and weights.
    The rows, their order and number, and the Trainer's sampler do not change: a batch sampler without duplicates sees
    the negatives that training began with.

    Synchronously, training waits while the model mines. Asynchronously (as in the ANCE paper), another process mines
    with a copy of the weights, and training continues with the present negatives: a refresh begun at step s is used
    from step s + ``lag``, or as soon after as it is finished. A fixed lag makes runs repeatable.

    A run that is resumed from a checkpoint, even in the middle of a refresh, has the same batches as one that was not
    stopped: the checkpoint records which negatives are in use, and an unfinished refresh is repeated from the same
    weights. The resumed run waits for it at the step where it is due; a refresh that the stopped run had used late,
    because mining took longer than ``lag``, is used at the same step.

    A refresh that fails, because the disk is full or the process was killed, is logged as an error and counted, and
    training continues with the present negatives. The next refresh tries again.

    Among several processes (DDP) the first one mines and all use what it found; they must share the folder.

    Args:
        collections: The collection that the rows were mined from; or a mapping of names to collections.
        rows: The rows that training begins with, from :func:`st_clp.mine_hard_negatives` with
            ``output_details=True``; or a mapping with the same names as ``collections``.
        options: What to mine. None: as many negatives and queries as the rows have, and the defaults otherwise. Give
            the options that the rows were mined with.
        folder: The folder for negatives, snapshots and embeddings. None: ``ance`` in the Trainer's ``output_dir``.
        refresh
        **mining: Further arguments of :func:`st_clp.mining.mine`: ``dtype``, ``batch_size``, ``ray`` …

    Attributes:
        train_dataset: The dataset for the Trainer: the rows, with their numbers in a column ``row``; a ``DatasetDict``
            for several collections.
        refreshes: The outcome of each refresh (a list of dictionaries): the ``step`` whose weights mined, its
            ``status``, the step from which it was ``used_from``, its ``age`` in steps by then, ``seconds`` of mining,
            the share of negatives that ``changed``, ``mean_positive_score`` and ``mean_negative_score``, the share of
            negatives ``above_positive`` (which may be answers), and the same for each of the ``collections``. The first
            entry is about the rows that training began with. :func:`st_clp.mining.plot_refreshes` draws it.
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

    @takes(refresh=RefreshOptions)
    def __init__(
        self,
        collections: Collection | Mapping[str, Collection],
        rows: Dataset | Mapping[str, Dataset],
        *,
        options: MiningOptions | None = None,
        folder: str | Path | None = None,
        refresh: RefreshOptions,
        **mining: Any,
    ) -> None:
        known = inspect.signature(mine).parameters.keys() - {"model", "collection", "options", "store_dir"}
        for name in mining.keys() - known:
            raise ValueError(f"AnceCallback knows no {name!r}, and mine takes {', '.join(sorted(known))}")
        self._collections, self._rows = named(collections, rows)
        self._options = mining_options_of(self._rows, options)
        self._every = refresh.steps_between_refreshes or "epoch"
        self._asynchronous, self._lag = refresh.refresh_async, refresh.refresh_lag
        self._threads, self._device = refresh.refresh_threads, refresh.refresh_device
        self._folder = Path(folder) if folder is not None else None
        self._mining = mining
        self._refresher: Refresher | None = None
        self._threads_before: int | None = None
        self.log: Callable[[dict[str, float]], None] | None = None
        self.train_dataset: Dataset | DatasetDict = to_train_on(self._rows)

    @property
    def refreshes(self) -> list[dict[str, Any]]:
        """The outcome of each refresh."""
        return [refresh.describe() for refresh in self._refresher.history.refreshes] if self._refresher else []

    def on_train_begin(
        self, args: Any, state: Any, control: Any, model: Any = None, train_dataloader: Any = None, **kwargs: Any
    ) -> None:
        """Prepare the folder, or continue from a checkpoint."""
        self.close()
        if getattr(args, "fsdp", None) or getattr(args, "deepspeed", None):
            raise ValueError("AnceCallback needs the whole model in each process: no FSDP and no DeepSpeed")
        layout = self._layout = Layout(self._folder or Path(args.output_dir) / "ance")
        processes = self._processes = Processes()
        self._negatives = Negatives(layout, len(self._collections), columns_to_refresh(self._rows))
        stored = state.stateful_callbacks.get(STATE) if state.global_step else None
        miner = None
        if processes.first:
            if stored is None:
                layout.clear()
            layout.remove_leftovers()
            if not is_whole(layout.negatives(0)):
                write_first(layout.negatives(0), self._rows)
            miner = self._make_miner(model, show_progress_bar=not args.disable_tqdm)
        processes.share(None)  # none reads before the first has written
        self._leave_threads(model)
        self._refresher = Refresher(
            layout,
            processes,
            self._negatives,
            miner,
            asynchronous=self._asynchronous,
            record=lambda history: state.stateful_callbacks.update({STATE: history}),
            report=lambda refresh: self._say(refresh, state),
        )
        if stored is None:
            self._refresher.start()
        else:
            self._refresher.take_up(stored, state.global_step)
        self._collator = _refresh_batches(train_dataloader, self._negatives)

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Make sure that the batch has the negatives in use."""
        if self._collator.given != self._negatives.step:
            raise RuntimeError(
                f"step {state.global_step + 1} was given negatives of step {self._collator.given}, though those of "
                f"step {self._negatives.step} are in use: this version of accelerate moves batches to the device at "
                "another time than AnceCallback knows"
            )

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Use a refresh that is due, and begin the next one."""
        step = state.global_step
        to_be_logged = control.should_log
        self._running.use_what_is_due(step)
        between = self._steps_between(state)
        if between is not None:
            self._running.begin(step, step + (between if self._lag is None else self._lag), state.max_steps)
        # The account of a refresh that is logged counts as this step's log: its loss would be left out, and averaged
        # into the next one's, which a run that is resumed here does not know.
        control.should_log = to_be_logged

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Remove negatives that neither this run nor any checkpoint needs."""
        if self._processes.first:
            checkpoints = [path.name.rpartition("-")[2] for path in Path(args.output_dir).glob("checkpoint-*")]
            oldest = min((int(step) for step in checkpoints if step.isdigit()), default=state.global_step)
            self._layout.remove_before(self._running.history.in_use_at(oldest))

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        """Log the age of the negatives in use, in steps."""
        if logs is None or self._refresher is None:
            return
        logs["negatives_age"] = state.global_step - self._refresher.history.current.step
        if state.log_history:
            state.log_history[-1]["negatives_age"] = logs["negatives_age"]

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """End the background process, and remove files that are no longer needed."""
        self._running.finish()
        self.close()
        if self._processes.first:
            shutil.rmtree(self._layout.embeddings, ignore_errors=True)

    def close(self) -> None:
        """End the background process; only needed after an error in training, to end it at once."""
        if self._refresher is not None:
            self._refresher.close()
        if self._threads_before is not None:
            torch.set_num_threads(self._threads_before)
            self._threads_before = None

    @property
    def _running(self) -> Refresher:
        if self._refresher is None:
            raise RuntimeError("AnceCallback has seen no beginning of a training")
        return self._refresher

    def _make_miner(self, model: SentenceTransformer, *, show_progress_bar: bool) -> Miner:
        mining = {"show_progress_bar": show_progress_bar, **self._mining}
        job = MiningJob(model, self._collections, self._options, mining)
        if not self._asynchronous:
            return InProcessMiner(job, self._layout)
        device = self._device or free_device(model.device)
        return SubprocessMiner(job, self._layout, device=device, threads=self._threads)

    def _leave_threads(self, model: SentenceTransformer) -> None:
        """Leave CPU threads to the background process, from the first step to the last.

        A sum over another number of threads can differ in its last bit, so the number must not change in between.
        """
        beside = torch.device(self._device or free_device(model.device))
        if self._asynchronous and model.device.type == beside.type == "cpu":
            self._threads_before = torch.get_num_threads()
            torch.set_num_threads(max(1, self._threads_before - self._threads))

    def _steps_between(self, state: Any) -> int | None:
        """The number of steps between refreshes, at a step where one begins; None at other steps."""
        step = state.global_step
        if self._every == "epoch":
            epoch = float(state.epoch or 0)
            return step // int(epoch) if epoch.is_integer() and epoch >= 1 else None
        return self._every if step % self._every == 0 else None

    def _say(self, refresh: Refresh, state: Any) -> None:
        """Log the outcome of a refresh."""
        if refresh.status == "unused":
            logger.warning("the refresh of step %d was not used: training ended first", refresh.step)
            return
        if refresh.status == "failed":
            logger.error(
                "the refresh of step %d failed, and training goes on with the negatives of step %d: %s",
                refresh.step,
                self._negatives.step,
                refresh.error,
            )
            values: dict[str, float] = {"refresh_failed": 1.0}
        else:
            described = refresh.describe()
            kept = sum(account["kept"] for account in refresh.collections.values())
            if kept:
                logger.warning("%d rows were not mined again and keep the negatives that they had", kept)
            names = ("age", "seconds", *MEASURES)
            values = {f"refresh_{name}": round(described[name], 4) for name in names if described[name] is not None}
        if self.log is not None:
            self.log(dict(values))
        else:
            state.log_history.append({**values, "epoch": state.epoch, "step": state.global_step})


def _refresh_batches(loader: Any, negatives: Negatives) -> RefreshingCollator:
    """Let a data loader that has not started collate with the negatives in use.

    Raises:
        ValueError: One process reads the rows of all processes.
    """
    if type(loader).__name__ == "DataLoaderDispatcher":
        raise ValueError("AnceCallback cannot work with dispatch_batches: each process must read its own rows")
    base = getattr(loader, "base_dataloader", loader)
    base.collate_fn = collator = RefreshingCollator(base.collate_fn, negatives)
    return collator
