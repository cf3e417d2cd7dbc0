"""The variants of an ablation: a name and the changes to a run's settings."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from evaluators.runs import file_part
from st_clp.files import read_mapping
from st_clp.settings import RunSettings, SettingsError

BASE = "base"  # the model as it is, which is a row of every table

# Settings that all variants share, so that they differ only in their changes.
SHARED = (
    "model",
    "collection",
    "output",
    "eval_collection",
    "train_split",
    "eval_split",
    "holdout",
    "max_train_queries",
    "text_field",
    "max_seq_length",
    "learning_rate",
    "seed",
    "encode_dtype",
    "encode_batch_size",
)

# As in the paper: asked queries, in batches of rows.
_ASKED = {"sentence_queries": 0, "batches": "rows", "experts": 0}
_WHOLE = {**_ASKED, "train": "all", "average_with_base": "1"}
_PLAIN = {**_WHOLE, "penalty_weight": 0.0}
_DEFAULT: dict[str, dict[str, Any]] = {
    "pairs": {**_PLAIN, "num_negatives": 0},
    # No score is that low, so all candidates are refused and random documents replace them.
    "random": {
        **_PLAIN,
        "range_min": 0,
        "range_max": 1,
        "min_score": None,
        "max_score": -1e9,
        "on_shortage": "random",
    },
    "ance": _PLAIN,
    "clp": _WHOLE,
    "clp-intermediate": {**_WHOLE, "train": "intermediate"},
    "clp-moe": {**_ASKED, "experts": 2, "train": "moe", "average_with_base": "1"},
    "averaged": {**_ASKED, "train": "intermediate", "average_with_base": "auto"},
    "sentences": {"experts": 0, "train": "intermediate", "average_with_base": "auto"},
}


@dataclass(frozen=True)
class Variant:
    """A row of the table.

    Attributes:
        name: Its name, also used in file names.
        settings: The run's settings.
        changes: Its changes to the shared settings.
    """

    name: str
    settings: RunSettings
    changes: Mapping[str, Any]


def default_variants(settings: RunSettings) -> list[Variant]:
    """The rows of the paper's table and ours: pairs, random negatives, ANCE, CLP, what trains, averaging."""
    return make_variants(settings, _DEFAULT, "the built-in variants")


def read_variants(path: str | Path, settings: RunSettings) -> list[Variant]:
    """Read variants from a YAML file: names to changes of the settings.

    Raises:
        SettingsError: The file cannot be read, or a variant is invalid.
    """
    found = read_mapping(
        path, "file of variants", "names and what each changes, such as `ance: {penalty_weight: 0}`", SettingsError
    )
    if not found:
        raise SettingsError(f"{path} names no variant")
    return make_variants(settings, found, str(path))


def make_variants(settings: RunSettings, changes: Mapping[Any, Any], where: str) -> list[Variant]:
    """Variants by name.

    Args:
        settings: The shared settings.
        changes: Name to the variant's changes.
        where: Their origin, for messages.

    Raises:
        SettingsError: A name or value is invalid, or is shared by all variants.
    """
    variants = []
    for name, own in changes.items():
        if not isinstance(name, str) or file_part(name) != name or name == BASE:
            raise SettingsError(
                f"{where}: {name!r} cannot be a variant's name: it stands in file names, and {BASE} is the model as it "
                "is"
            )
        own = own or {}
        if not isinstance(own, dict):
            raise SettingsError(f"{where}: {name} must map settings to values")
        own = {str(key).replace("-", "_"): value for key, value in own.items()}
        for key in own:
            if key in SHARED:
                raise SettingsError(
                    f"{where}: {name} changes {key}, which all variants share; learning rates are searched for each "
                    "(--learning-rates)"
                    if key == "learning_rate"
                    else f"{where}: {name} changes {key}, which all variants share"
                )
        read = RunSettings.from_dict({**settings.to_dict(), **own}, where=f"{where}: {name}")
        _require_trainable(name, read)
        variants.append(Variant(name, read, own))
    return variants


# Training arguments that the ablation's loop supports.
ARGUMENTS = ("weight_decay", "max_grad_norm", "adam_beta1", "adam_beta2", "adam_epsilon")


def _require_trainable(name: str, settings: RunSettings) -> None:
    for argument in settings.training_arg:
        if argument not in ARGUMENTS:
            raise SettingsError(
                f"{name}: an ablation trains by a loop of its own, which minds the training arguments "
                f"{', '.join(ARGUMENTS)} and not {argument}"
            )
    if settings.steps_between_refreshes not in (None, "epoch"):
        raise SettingsError(f"{name}: an ablation mines again after each epoch or never: refresh_every=epoch")
    if settings.refresh_async:
        raise SettingsError(f"{name}: an ablation mines in between, not beside: leave refresh_async out")


def with_rate(variant: Variant, learning_rate: float, seed: int) -> RunSettings:
    """The variant's settings with this learning rate and seed."""
    return dataclasses.replace(variant.settings, learning_rate=learning_rate, seed=seed)
