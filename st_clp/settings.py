"""The settings of a run: the options of all its stages."""

from __future__ import annotations

import difflib
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import yaml

from st_clp.declaring import option
from st_clp.files import read_mapping, shown, write_text
from st_clp.option_values import SettingsError
from st_clp.options import (
    DataOptions,
    EncodingOptions,
    ExpertOptions,
    LossOptions,
    MiningSettings,
    QuerySettings,
    RefreshOptions,
    TrainingClusterOptions,
    TrainingOptions,
)

__all__ = ["RunSettings", "SettingsError"]


# A dataclass has the fields of its last base first.
@dataclass(frozen=True)
class RunSettings(
    TrainingClusterOptions,
    RefreshOptions,
    TrainingOptions,
    ExpertOptions,
    LossOptions,
    QuerySettings,
    MiningSettings,
    EncodingOptions,
    DataOptions,
):
    """Everything that a run depends on. What each setting does is in ``st-clp run --help`` and the stages' classes.

    Raises:
        SettingsError: A value is invalid.
    """

    cross_encoder: str | None = option(
        None,
        "A cross-encoder (a folder or a name on the Hub) that rescores the candidates.",
        group=MiningSettings.group,
    )
    negative_queries: str = option(
        "judgments",
        "The sources of queries for negatives; the first one that has a query for a document is used: judgments, "
        "local:MODEL (a folder or a name on the Hub), openai:MODEL (any endpoint with that API), sentence (a part of "
        "one of the document's sentences), title (or the first sentence). title*0.3 sets another weight.",
        group=QuerySettings.group,
    )
    query_store: str | None = option(
        None,
        "The SQLite file for generated queries, so that nothing is paid for twice. By default queries.sqlite in the "
        "output folder (under run/ for a run).",
        group=QuerySettings.group,
        changes_results=False,
    )

    def _check(self) -> None:
        if self.refresh_every is None and self.refresh_async:
            raise SettingsError("refresh_async needs refresh_every, a number of steps or epoch")
        if self.of_documents and self.refresh_every is not None:
            raise SettingsError(
                "refresh_every mines the rows' negatives again, but with batches=documents rows have no negatives of "
                "their own; leave one of the two out"
            )
        if self.of_documents and not self.in_batch_negatives:
            raise SettingsError(
                "with batches=documents all negatives are in-batch negatives, so in_batch_negatives=False leaves none; "
                "use batches=rows"
            )
        if self.of_documents and self.negative_queries != "judgments":
            raise SettingsError(
                f"negative_queries={self.negative_queries} is for the penalty, which batches=documents does not "
                "have; use batches=rows, or leave negative_queries out"
            )

    @property
    def peak_learning_rate(self) -> float:
        """``learning_rate``, with its default filled in."""
        if self.learning_rate is not None:
            return self.learning_rate
        if self.what_trains == "all":
            return 2e-5
        return 3e-4 if self.of_documents else 1e-4

    @property
    def names_penalty(self) -> bool:
        """Whether a setting of the penalty, or of the queries that it reads, is another than by default."""
        names = ("penalty_weight", "penalty", "queries_per_negative", "negative_queries")
        return any(getattr(self, name) != self.__dataclass_fields__[name].default for name in names)

    @property
    def negatives_in_rows(self) -> int:
        """How many negatives a row is trained with; in batches of documents they only say which of these are near."""
        return 0 if self.of_documents else self.num_negatives

    @property
    def queries_in_rows(self) -> int:
        """How many queries each of these negatives is trained with."""
        return self.queries_per_negative if self.negatives_in_rows else 0

    @staticmethod
    def as_recorded(values: Mapping[str, Any]) -> dict[str, Any]:
        """The settings that a run or an ablation has recorded; what its version did not record yet is filled in."""
        return {"average_with_base": None, "batches": "rows", "sentence_queries": 0, **values}

    def require(self, *names: str) -> None:
        """Raise a SettingsError that names the first of these settings that is empty."""
        for name in names:
            if not getattr(self, name):
                flag = "--" + name.replace("_", "-")
                raise SettingsError(f"no {name}: give {flag} (or {name}: in the --config file)")

    def to_dict(self) -> dict[str, Any]:
        """All settings, by name."""
        return asdict(self)

    def differences(self, other: RunSettings) -> dict[str, tuple[Any, Any]]:
        """Setting to (this value, the other's) where they differ."""
        mine, theirs = self.to_dict(), other.to_dict()
        return {name: (mine[name], theirs[name]) for name in mine if mine[name] != theirs[name]}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], *, where: str = "settings") -> RunSettings:
        """Settings from a mapping.

        Raises:
            SettingsError: A name is not a setting (the message suggests the nearest one), or a value is invalid.
        """
        known = [item.name for item in fields(cls)]
        for name in values:
            if name not in known:
                nearest = difflib.get_close_matches(str(name), known, n=1)
                advice = f"; did you mean {nearest[0]}?" if nearest else f"; the settings are {', '.join(known)}"
                raise SettingsError(f"{where}: there is no setting {shown(name)}{advice}")
        return cls(**values)

    @classmethod
    def read_yaml(cls, path: str | os.PathLike[str]) -> dict[str, Any]:
        """The settings that a YAML file gives; dashes in names count as underscores.

        Raises:
            SettingsError: The file does not exist or is not a YAML mapping.
        """
        content = "settings, a line each, such as: model: BAAI/bge-m3"
        values = read_mapping(path, "configuration file", content, SettingsError)
        return {str(name).replace("-", "_"): value for name, value in values.items()}

    def write_yaml(self, path: Path) -> None:
        """Write all settings, so that the file can be given as ``--config``."""
        write_text(path, yaml.safe_dump(self.to_dict(), sort_keys=False, allow_unicode=True))
