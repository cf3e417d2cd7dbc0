"""Training with sentence-transformers' Trainer, and its arguments."""

from __future__ import annotations

import dataclasses
import difflib
import logging
import os
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args, get_type_hints

from sentence_transformers import (
    SentenceTransformer,
    SentenceTransformerTrainer,
    SentenceTransformerTrainingArguments,
)
from sentence_transformers.base.modules import Dense, Router
from sentence_transformers.sentence_transformer.modules import BoW
from transformers import PrinterCallback, ProgressCallback, TrainerCallback

from st_clp.declaring import names_of
from st_clp.distributed import has_room
from st_clp.encoding import hardware_has_bf16
from st_clp.files import shown
from st_clp.losses import DocumentBatchSampler
from st_clp.losses.document_batches import Near
from st_clp.mining import TrainingRow
from st_clp.mining.rows import to_dataset
from st_clp.option_values import read_number
from st_clp.options import HERE, ClusterOptions, MiningOptions, QueryOptions, RefreshOptions
from st_clp.refresh import AnceCallback
from st_clp.run.modelling import column_kinds, load_cross_encoder, make_loss
from st_clp.run.planning import plan_on_host
from st_clp.settings import RunSettings, SettingsError

if TYPE_CHECKING:
    from datasets import Dataset, DatasetDict

    from st_clp.data import Collection

logger = logging.getLogger(__name__)

# The Trainer accepts lower values silently and then trains nothing, or fails with a division by zero.
LEAST_ARGUMENTS = {
    "gradient_accumulation_steps": 1,
    "per_device_train_batch_size": 1,
    "dataloader_num_workers": 0,
    "save_steps": 1e-9,
    "save_total_limit": 1,
    "learning_rate": 0,
    "weight_decay": 0,
    "max_grad_norm": 0,
    "warmup_steps": 0,
    "num_train_epochs": 1e-9,
}


def make_trainer(
    model: SentenceTransformer,
    datasets: Mapping[str, Dataset],
    settings: RunSettings,
    checkpoints: Path,
    *,
    near: Near | None = None,
    refresh: AnceCallback | None = None,
    progress: TrainerCallback | None = None,
    before: Sequence[Mapping[str, Any]] = (),
) -> SentenceTransformerTrainer:
    """The Trainer of a run. Each collection is a separate dataset, so that a batch holds one language.

    Args:
        model: The model, converted, with frozen weights where it does not train.
        datasets: Collection name to training rows in CLPLoss's columns.
        settings: The run's settings.
        checkpoints: Folder for checkpoints.
        near: Similar documents, for batches of documents.
        refresh: Refreshes the negatives; its ``train_dataset`` is trained on.
        progress: Shows progress in place of the Trainer's own bar and lines.
        before: The losses logged in earlier parts of the training, for the model's card.

    Raises:
        SettingsError: A training argument cannot be used here.
    """
    from datasets import DatasetDict

    rows: Dataset | DatasetDict = next(iter(datasets.values())) if len(datasets) == 1 else DatasetDict(dict(datasets))
    columns = [name for name in next(iter(datasets.values())).column_names if name != "label"]
    steps = number_of_steps(settings, map(len, datasets.values()))
    arguments = make_arguments(model, settings, checkpoints, columns, steps=steps)
    if settings.of_documents and "batch_sampler" not in settings.training_arg:
        arguments.batch_sampler = _NearDocuments(near or {})
    trainer = SentenceTransformerTrainer(
        model=model,
        args=arguments,
        train_dataset=rows if refresh is None else refresh.train_dataset,
        loss=make_loss(model, settings),
        callbacks=[refresh] if refresh is not None else None,
    )
    looks_for_nan = arguments.logging_nan_inf_filter  # --training-arg has the last word
    plan_on_host(trainer)
    arguments.logging_nan_inf_filter = looks_for_nan
    trainer.add_callback(EarlierLosses(before))
    if refresh is not None:
        refresh.log = trainer.log
    bar = trainer.pop_callback(ProgressCallback)
    if progress is not None:
        trainer.remove_callback(PrinterCallback)
        trainer.add_callback(progress)
    elif bar is not None:
        trainer.add_callback(LossInProgressBar)
    return trainer


class _NearDocuments:
    """Makes the sampler of each collection. Pickled without its texts: checkpoints contain the arguments."""

    def __init__(self, near: Near) -> None:
        self._near = near

    def __call__(self, dataset: Dataset, **arguments: Any) -> DocumentBatchSampler:
        return DocumentBatchSampler(dataset, near=self._near, **arguments)

    def __reduce__(self) -> tuple[Any, ...]:
        return _NearDocuments, ({},)


def number_of_steps(settings: RunSettings, rows: Iterable[int]) -> int:
    """About how many steps a training takes on so many rows of each collection, in batches of one collection."""
    together = settings.rows_in_batch * (settings.train_workers or 1)
    return max(1, int(sum(number // together + 1 for number in rows) * settings.number_of_epochs))


def make_refresh(
    collections: Mapping[str, Collection],
    rows: Mapping[str, Iterable[TrainingRow]],
    settings: RunSettings,
    query_store: str | os.PathLike[str],
) -> AnceCallback | None:
    """The callback that refreshes the negatives; None if they are mined once.

    Args:
        collections: Name to collection.
        rows: Name to the rows that training begins with.
        settings: The run's settings.
        query_store: The store of generated queries.
    """
    if settings.steps_between_refreshes is None:
        return None
    datasets = {
        name: to_dataset(
            found,
            num_negatives=settings.num_negatives,
            queries_per_negative=settings.queries_per_negative,
            details=True,
        )
        for name, found in rows.items()
    }
    return AnceCallback(
        collections,
        datasets,
        options=MiningOptions.of(settings),
        refresh=RefreshOptions.of(settings),
        dtype=settings.encode_dtype,
        batch_size=settings.encode_batch_size,
        **_where_to_mine(settings),
        cross_encoder=load_cross_encoder(settings.cross_encoder),
        negative_queries=settings.negative_queries,
        query_options=QueryOptions.for_negatives(settings),
        query_store=query_store,
    )


def _where_to_mine(settings: RunSettings) -> dict[str, Any]:
    """The options of the cluster if it has room besides the training; otherwise those of the leading process."""
    if settings.ray is None or not has_room(settings):
        return HERE
    return {name: getattr(settings, name) for name in names_of(ClusterOptions)}


class LossInProgressBar(ProgressCallback):
    """The Trainer's progress bar with the loss in it, instead of a line for each logged step."""

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        """Show the latest loss."""
        if self.training_bar is not None and logs and "loss" in logs:
            self.training_bar.set_postfix(loss=f"{float(logs['loss']):.3f}")


class EarlierLosses(TrainerCallback):
    """Adds the losses of earlier parts of the training to the model card.

    Args:
        before: Entries of earlier parts. Those logged before a stop are in the checkpoint.
    """

    def __init__(self, before: Sequence[Mapping[str, Any]]) -> None:
        self._before = before

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        """Add the losses; those of a stopped training come from the checkpoint's state."""
        model.model_card_data.training_logs = [
            {"Epoch": entry["epoch"], "Step": entry["step"], "Training Loss": entry["loss"]}
            for entry in [*self._before, *state.log_history]
            if "loss" in entry
        ]


def make_arguments(
    model: SentenceTransformer, settings: RunSettings, checkpoints: Path, columns: list[str], *, steps: int
) -> SentenceTransformerTrainingArguments:
    """The Trainer's arguments; ``settings.training_arg`` overrides everything."""
    bf16 = settings.bf16 if settings.bf16 is not None else hardware_has_bf16(model.device)
    arguments: dict[str, Any] = {
        "output_dir": str(checkpoints),
        "num_train_epochs": settings.number_of_epochs,
        "per_device_train_batch_size": settings.rows_in_batch,
        "learning_rate": settings.peak_learning_rate,
        "warmup_steps": settings.warmup,
        "bf16": bf16,
        "use_cpu": model.device.type == "cpu",
        "seed": settings.seed,
        "data_seed": settings.seed,
        "logging_steps": max(1, steps // 50),
        # About ten checkpoints a training, so that little is lost when it is stopped.
        "save_strategy": "steps",
        "save_steps": max(1, steps // 10),
        "save_total_limit": 2,
        "report_to": "none",
        # With it the Trainer would wait for the device in every step, to filter NaN losses.
        "logging_nan_inf_filter": model.device.type == "cpu",
        "prompts": column_kinds(columns, model.prompts.get("query"), model.prompts.get("document")),
    }
    if any(isinstance(module, Router) for module in model.modules()):
        arguments["router_mapping"] = column_kinds(columns, "query", "document")
    try:
        return SentenceTransformerTrainingArguments(**{**arguments, **read_training_arguments(settings)})
    except SettingsError:
        raise
    except Exception as error:  # of whatever reads the argument: transformers, accelerate, torch
        raise _unusable_arguments(error) from error


def read_training_arguments(settings: RunSettings) -> dict[str, Any]:
    """Read ``settings.training_arg``, with numbers of the declared types.

    Raises:
        SettingsError: An argument is unknown (the message suggests the nearest one) or has the wrong type.
    """
    kinds = get_type_hints(SentenceTransformerTrainingArguments)
    found = {}
    for name, value in settings.training_arg.items():
        if name not in kinds:
            nearest = difflib.get_close_matches(name, kinds, n=1)
            advice = f"; did you mean {nearest[0]}?" if nearest else ""
            raise SettingsError(f"training_arg: SentenceTransformerTrainingArguments has no {name!r}{advice}")
        found[name] = _read_argument(name, kinds[name], value)
    return found


def _read_argument(name: str, kind: Any, value: Any) -> Any:
    kinds = get_args(kind) or (kind,)
    wanted = next((one for one in (float, int, bool) if one in kinds), None)
    if wanted is None or str in kinds or (value is None and type(None) in kinds):
        return value
    try:
        read = value if wanted is bool else read_number(f"training_arg: {name}", wanted, value)
    except ValueError as error:
        raise SettingsError(str(error)) from None
    if not isinstance(read, wanted) or (wanted is not bool and isinstance(read, bool)):
        raise SettingsError(f"training_arg: {name} must be of the kind {wanted.__name__}, got {shown(value)}")
    if read < LEAST_ARGUMENTS.get(name, read):
        raise SettingsError(f"training_arg: {name} must be at least {LEAST_ARGUMENTS[name]}, got {read}")
    return read


def check_training_arguments(settings: RunSettings) -> None:
    """Build a Trainer with the run's arguments and a tiny model, so that errors in them are found at once.

    Raises:
        SettingsError: An argument is unknown or cannot be used.
    """
    from datasets import Dataset

    if "output_dir" in read_training_arguments(settings):
        raise SettingsError("training_arg: output_dir is the run's own; name the run's folder with --output")
    # A trial must not create a repository.
    trial = dataclasses.replace(settings, training_arg={**settings.training_arg, "push_to_hub": False})
    columns = ["anchor", "positive", "negative_1", "negative_query_1"]
    model = SentenceTransformer(modules=[BoW(vocab=["a"]), Dense(1, 1)])
    with tempfile.TemporaryDirectory() as folder:
        arguments = make_arguments(model, trial, Path(folder), columns, steps=100)
        try:
            trainer = SentenceTransformerTrainer(
                model=model,
                args=arguments,
                train_dataset=Dataset.from_dict({name: ["a"] * settings.rows_in_batch for name in columns}),
                loss=make_loss(model, trial),
            )
            next(iter(trainer.get_train_dataloader()))
            trainer.create_optimizer_and_scheduler(100)
        except Exception as error:  # of whatever reads the argument: transformers, accelerate, torch
            raise _unusable_arguments(error) from error


def _unusable_arguments(error: Exception) -> SettingsError:
    reason = " ".join(str(error).split()) or type(error).__name__
    return SettingsError(f"the training arguments cannot be used: {reason}")
