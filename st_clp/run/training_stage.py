"""The training stage of a run, in one process or in each of several: prepare the model, train, average, save.

Several processes have the run's folder in common. All of them prepare and train; the first one writes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

from sentence_transformers import SentenceTransformer, SentenceTransformerTrainer
from transformers import TrainerCallback, TrainerState

from st_clp.data import Collection
from st_clp.losses.document_batches import Near, near_documents
from st_clp.memory import hand_back_freed_memory
from st_clp.mining.rows import TrainingRow, read_rows, to_dataset
from st_clp.options import HERE, EvaluationOptions
from st_clp.refresh import AnceCallback, plot_refreshes
from st_clp.run.averaging import ChosenShare, WeightAverage, choose_share, hold_out
from st_clp.run.folder import RunDirectory, slug
from st_clp.run.modelling import compiled_layers, load_base_model, prepare_model
from st_clp.run.splits import settle_batches
from st_clp.run.training import make_refresh, make_trainer
from st_clp.settings import RunSettings

HAND_BACK_EVERY = 25  # steps


class _HandBack(TrainerCallback):
    """Hands freed memory back now and then.

    What the layers keep for the backward pass has other sizes in every batch, and of what glibc keeps of it only some
    fits the next: in some hundred steps a process comes to hold twice what it uses. New pages cost time, so it is not
    done after every step (``benchmarks/README.md``).
    """

    def on_step_end(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        if state.global_step % HAND_BACK_EVERY == 0:
            hand_back_freed_memory()


@dataclass(frozen=True)
class TrainingStage:
    """What is trained, and on what.

    Attributes:
        settings: The run's.
        directory: The run's, with the mined rows in it.
        collections: What the rows were mined from.
        say: Called with lines for the user, by the first process alone.
        progress: Shows progress in place of the Trainer's own bar.
    """

    settings: RunSettings
    directory: RunDirectory
    collections: Sequence[Collection]
    say: Callable[[str], None]
    progress: TrainerCallback | None = None

    def run(self, model: SentenceTransformer) -> dict[str, Any]:
        """Train the base model, which is changed by it, and save it in the run's folder.

        Returns:
            What the report says of it; in all but the first of several processes nothing.
        """
        collections = {slug(collection.name): collection for collection in self.collections}
        rows = {name: read_rows(self.directory.rows_file(collection.name)) for name, collection in collections.items()}
        settings = settle_batches(self.settings, (row.query_id for found in rows.values() for row in found))
        trainable = prepare_model(model, settings)
        held_out: dict[str, list[TrainingRow]] = {}
        if settings.share_of_trained == "auto":
            parts = {name: hold_out(found, settings.seed) for name, found in rows.items()}
            rows, held_out = ({name: part[which] for name, part in parts.items()} for which in (0, 1))
        datasets = {
            name: to_dataset(
                found, num_negatives=settings.negatives_in_rows, queries_per_negative=settings.queries_in_rows
            )
            for name, found in rows.items()
        }
        refresh = make_refresh(collections, rows, settings, self.directory.query_store_of(settings))
        trainer = make_trainer(
            model,
            datasets,
            settings,
            self.directory.checkpoints,
            near=_near(rows) if settings.of_documents else None,
            refresh=refresh,
            progress=self.progress,
        )
        first = trainer.is_world_process_zero()
        if first:
            self.say(str(trainable))
        self._train(trainer, settings, refresh)
        if not first:
            return {}
        averaged = self._average(model, held_out, rows)
        model.save(str(self.directory.path))
        return {
            "what": trainable.what,
            "trainable_parameters": trainable.trainable,
            "all_parameters": trainable.total,
            "rows": {name: len(dataset) for name, dataset in datasets.items()},
            "batches": settings.batches,
            "steps": trainer.state.global_step,
            "bf16": trainer.args.bf16,
            "history": [entry for entry in trainer.state.log_history if "loss" in entry],
            "refreshes": self._refreshes(refresh),
            "averaged": averaged,
        }

    def _train(self, trainer: SentenceTransformerTrainer, settings: RunSettings, refresh: AnceCallback | None) -> None:
        """Train, from the last checkpoint where there is one."""
        checkpoint = self.directory.last_checkpoint()
        if trainer.is_world_process_zero():
            if settings.of_documents:
                self.say("batches of documents: each is there with its own queries, and there is no further penalty")
            if checkpoint is not None:
                self.say(f"going on from {checkpoint.name}")
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
        """Average the weights with the base's as the settings have it; what was chosen and why, None where nothing."""
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
        """The account of each refresh, drawn too; empty where negatives were mined once."""
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
    """Which documents are near one another: those that were mined as negatives for another's queries."""
    every = [row for found in rows.values() for row in found]
    negatives = [[negative.text for negative in row.negatives] for row in every]
    return near_documents([row.positive for row in every], negatives)
