"""The training stage of a run, in one process or in each of several: prepare the model, train, average, save.

Several processes share the run's folder: all of them prepare and train, the first one writes.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sentence_transformers import SentenceTransformer, SentenceTransformerTrainer
from transformers import TrainerCallback, TrainerState
from transformers.trainer import TRAINER_STATE_NAME

from st_clp.data import Collection
from st_clp.losses.document_batches import Near, near_documents
from st_clp.memory import HAND_BACK_EVERY, hand_back_freed_memory
from st_clp.mining.rows import TrainingRow, read_rows, to_dataset
from st_clp.options import HERE, EvaluationOptions
from st_clp.refresh import AnceCallback, plot_refreshes
from st_clp.run.averaging import ChosenShare, WeightAverage, choose_share, hold_out
from st_clp.run.folder import RunDirectory, slug
from st_clp.run.modelling import compiled_layers, load_base_model, prepare_model, stored_precision
from st_clp.run.splits import in_turn, settle_batches
from st_clp.run.training import make_refresh, make_trainer
from st_clp.settings import RunSettings


class _HandBack(TrainerCallback):
    """Returns freed memory to the system every few steps, and when training ends.

    The sizes of activations differ from batch to batch, and only some of the blocks that glibc keeps fit the next one:
    within some hundred steps a process holds twice what it uses. New pages cost time, so this is not done after every
    step (``benchmarks/README.md``).
    """

    def on_step_end(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        if state.global_step % HAND_BACK_EVERY == 0:
            hand_back_freed_memory()

    def on_train_end(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        hand_back_freed_memory()


class _RemoveCheckpoints(TrainerCallback):
    """Removes the checkpoints of the previous part of a training as soon as this part has one."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def on_save(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        if state.is_world_process_zero:
            for checkpoint in self._folder.glob("checkpoint-*"):
                shutil.rmtree(checkpoint, ignore_errors=True)


@dataclass(frozen=True)
class TrainingStage:
    """The training stage of a run.

    Attributes:
        settings: The run's.
        directory: The run's folder, with the mined rows.
        collections: The collections that the rows were mined from.
        say: Called with lines for the user, in the first process only.
        progress: Shows progress in place of the Trainer's own bar.
    """

    settings: RunSettings
    directory: RunDirectory
    collections: Sequence[Collection]
    say: Callable[[str], None]
    progress: TrainerCallback | None = None

    def run(self, model: SentenceTransformer) -> dict[str, Any]:
        """Train the base model in place, and save it in the run's folder.

        Returns:
            The report's entries; empty in all processes but the first.
        """
        collections = {slug(collection.name): collection for collection in self.collections}
        rows = {name: read_rows(self.directory.rows_file(collection.name)) for name, collection in collections.items()}
        settings = settle_batches(self.settings, (row.query_id for found in rows.values() for row in found))
        stored = stored_precision(model)
        trainable = prepare_model(model, settings)
        held_out: dict[str, list[TrainingRow]] = {}
        if settings.share_of_trained == "auto":
            parts = {name: hold_out(found, settings.seed) for name, found in rows.items()}
            rows, held_out = ({name: part[which] for name, part in parts.items()} for which in (0, 1))
        refresh = make_refresh(collections, rows, settings, self.directory.query_store_of(settings))
        turns = in_turn(rows, settings)
        states: list[TrainerState] = []
        for number, turn in enumerate(turns):
            if state := self._finished_before(number):
                states.append(state)
                continue
            trainer = self._trainer(model, turn, number, settings, refresh=refresh, before=states)
            first = trainer.is_world_process_zero()
            if first:
                self.say(_asked_alone(turn) if number else str(trainable))
                if stored.is_half() and not number:
                    self.say(f"trained in float32; saved in {stored}, as the base is")
            self._train(trainer, number, settings, refresh)
            states.append(trainer.state)
            if number + 1 < len(turns):
                trainer.save_state()
        if not first:
            return {}
        averaged = self._average(model, held_out, rows)
        stored.restore(model)
        model.save(str(self.directory.path))
        return {
            "what": trainable.what,
            "trainable_parameters": trainable.trainable,
            "all_parameters": trainable.total,
            "rows": {name: len(found) for name, found in rows.items()},
            "batches": settings.batches,
            "steps": sum(state.global_step for state in states),
            "bf16": trainer.args.bf16,
            "history": _losses(states),
            "refreshes": self._refreshes(refresh),
            "averaged": averaged,
        }

    def _finished_before(self, part: int) -> TrainerState | None:
        """The state at the end of a part that a stopped run had finished; None if the part has to be trained.

        Its weights are in the next part's checkpoints.
        """
        ended = self.directory.checkpoints_of(part) / TRAINER_STATE_NAME
        if not ended.is_file() or self.directory.last_checkpoint(part + 1) is None:
            return None
        return TrainerState.load_from_json(str(ended))

    def _trainer(
        self,
        model: SentenceTransformer,
        rows: Mapping[str, Sequence[TrainingRow]],
        part: int,
        settings: RunSettings,
        *,
        refresh: AnceCallback | None,
        before: Sequence[TrainerState],
    ) -> SentenceTransformerTrainer:
        datasets = {
            name: to_dataset(
                found, num_negatives=settings.negatives_in_rows, queries_per_negative=settings.queries_in_rows
            )
            for name, found in rows.items()
        }
        return make_trainer(
            model,
            datasets,
            settings,
            self.directory.checkpoints_of(part),
            near=_near(rows) if settings.of_documents else None,
            refresh=refresh,
            progress=self.progress,
            before=_losses(before),
        )

    def _train(
        self, trainer: SentenceTransformerTrainer, part: int, settings: RunSettings, refresh: AnceCallback | None
    ) -> None:
        """Train, from the last checkpoint if there is one."""
        checkpoint = self.directory.last_checkpoint(part)
        if trainer.is_world_process_zero():
            if settings.of_documents and not part:
                self.say("batches of documents: each comes with its own queries, so there is no penalty term")
            if checkpoint is not None:
                self.say(f"going on from {checkpoint.name}")
        if part:
            trainer.add_callback(_RemoveCheckpoints(self.directory.checkpoints_of(part - 1)))
        model = trainer.model
        if model.device.type == "cpu":
            trainer.add_callback(_HandBack())
        try:
            with compiled_layers(model) if settings.compile_layers else nullcontext():
                trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
        finally:
            if refresh is not None:
                refresh.close()

    def _average(
        self, model: SentenceTransformer, held_out: dict[str, list[TrainingRow]], rows: dict[str, list[TrainingRow]]
    ) -> dict[str, Any] | None:
        """Average the weights with the base's; return the choice and its reasons, None if nothing is averaged."""
        settings = self.settings
        share = settings.share_of_trained
        if share == 1:
            return None
        averaging = WeightAverage(model, load_base_model(settings.model, max_seq_length=settings.max_seq_length))
        if share == "auto":
            options = EvaluationOptions.of(settings, write_csv=False, **HERE)
            chosen = choose_share(model, averaging, held_out, rows, options)
        else:
            averaging.set(share)
            chosen = ChosenShare(share, {}, 0)
        self.say(str(chosen))
        return chosen.to_dict()

    def _refreshes(self, refresh: AnceCallback | None) -> list[dict[str, Any]]:
        """The statistics of each refresh, also plotted; empty if negatives were mined once."""
        if refresh is None:
            return []
        failed = sum(found["status"] == "failed" for found in refresh.refreshes)
        used = sum(found["status"] == "used" for found in refresh.refreshes)
        self.say(f"negatives refreshed {used} times" + (f"; {failed} refreshes failed" if failed else ""))
        try:
            plot_refreshes(refresh.refreshes, self.directory.work / "refreshes.png")
        except (ModuleNotFoundError, ValueError) as error:
            self.say(f"no picture of the refreshes: {error}")
        return refresh.refreshes


def _near(rows: Mapping[str, Sequence[TrainingRow]]) -> Near:
    """Similar documents: those that were mined as negatives for each other's queries."""
    every = [row for found in rows.values() for row in found]
    negatives = [[negative.text for negative in row.negatives] for row in every]
    return near_documents([row.positive for row in every], negatives)


def _asked_alone(rows: Mapping[str, Sequence[TrainingRow]]) -> str:
    return f"second part: only the {sum(map(len, rows.values())):,} rows of queries that people asked"


def _losses(states: Sequence[TrainerState]) -> list[dict[str, Any]]:
    """Log entries with a loss, with steps and epochs counted across all parts of a training."""
    found, steps, epochs = [], 0, 0.0
    for state in states:
        for entry in state.log_history:
            if "loss" in entry:
                found.append({**entry, "step": entry["step"] + steps, "epoch": entry["epoch"] + epochs})
        steps, epochs = steps + state.global_step, epochs + (state.epoch or 0.0)
    return found
