"""The stages of a run: the settings that each depends on, and the record that a finished one leaves."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from st_clp.declaring import Options, names_of
from st_clp.files import content_digest, read_json, require_field, write_json
from st_clp.options import (
    DataOptions,
    EncodingOptions,
    ExpertOptions,
    LossOptions,
    MiningSettings,
    QuerySettings,
    RefreshOptions,
    TrainingOptions,
)
from st_clp.settings import RunSettings

logger = logging.getLogger(__name__)

EVALUATE_BEFORE, MINE, TRAIN, EVALUATE_AFTER = STAGES = ("evaluate-before", "mine", "train", "evaluate-after")

# The first stage whose result depends on the options of a class; a few have another than the rest of theirs.
_OF_A_CLASS: dict[type[Options], str] = {
    DataOptions: EVALUATE_BEFORE,
    EncodingOptions: EVALUATE_BEFORE,
    MiningSettings: MINE,
    QuerySettings: MINE,
    LossOptions: TRAIN,
    ExpertOptions: TRAIN,
    TrainingOptions: TRAIN,
    RefreshOptions: TRAIN,
}
_OF_A_SETTING = {
    "seed": EVALUATE_BEFORE,  # it draws the queries that are held out
    **dict.fromkeys(("max_train_queries", "cross_encoder", "negative_queries"), MINE),
}

SCORES = {"scores": dict}
# What a record holds besides its seconds and outputs.
_FIELDS: dict[str, dict[str, Any]] = {
    EVALUATE_BEFORE: SCORES,
    MINE: {"accounts": dict},
    TRAIN: {
        "trainable_parameters": int,
        "all_parameters": int,
        "rows": dict,
        "steps": int,
        "bf16": bool,
        "history": list,
        "refreshes": list,
    },
    EVALUATE_AFTER: {**SCORES, "expert_usage": (dict, type(None))},
}


def first_stage(setting: str) -> str | None:
    """The first stage whose result depends on this setting; None where no result does."""
    if not RunSettings.__dataclass_fields__[setting].metadata["changes_results"]:
        return None
    if setting in _OF_A_SETTING:
        return _OF_A_SETTING[setting]
    return next(stage for cls, stage in _OF_A_CLASS.items() if setting in names_of(cls))


class StageRecords:
    """What the finished stages of a run have left: their results, and the sizes and digests of the files they wrote.

    Args:
        folder: Where the records are.
        root: The run's output folder, which the files' names begin at.
    """

    def __init__(self, folder: Path, root: Path) -> None:
        self._folder = folder
        self._root = root

    def file(self, name: str) -> Path:
        """Where the record of a stage is."""
        return self._folder / f"{name}.json"

    def write(self, name: str, result: dict[str, Any], outputs: Iterable[Path]) -> None:
        """Note that a stage is finished.

        Args:
            name: The stage.
            result: What goes into the report, as JSON.
            outputs: The files that it wrote.
        """
        noted = {
            path.relative_to(self._root).as_posix(): {"size": path.stat().st_size, "digest": content_digest(path)}
            for path in sorted(outputs)
        }
        write_json(self.file(name), {**result, "outputs": noted})

    def read(self, name: str) -> dict[str, Any] | None:
        """The result of a stage; None where it is not finished, or its record cannot be used, which is said."""
        record = self._read(name)
        return None if record is None else {key: value for key, value in record.items() if key != "outputs"}

    def outputs(self, name: str) -> dict[str, Any] | None:
        """The noted outputs of a stage, name to size and digest; None where none were noted."""
        return (self._read(name) or {}).get("outputs")

    def _read(self, name: str) -> dict[str, Any] | None:
        file = self.file(name)
        try:
            record = read_json(file)
            for field, kind in _FIELDS.get(name, {}).items():
                require_field(record, field, kind, str(file))
            require_field(record, "seconds", float, str(file))
            for collection, scores in record.get("scores", {}).items():
                for metric in require_field(record["scores"], collection, dict, str(file)):
                    require_field(scores, metric, float, f"{file}: {collection}", least=0, most=1)
            for output in require_field({"outputs": {}, **record}, "outputs", dict, str(file)).values():
                if not isinstance(output, dict) or set(output) != {"size", "digest"}:
                    raise ValueError(f"{file}: an output without size and digest")
        except FileNotFoundError:
            return None
        except ValueError as error:
            logger.warning("%s; the stage is done again", error)
            return None
        return record

    def forget(self, name: str) -> None:
        """Let a stage be done again."""
        self.file(name).unlink(missing_ok=True)

    def missing_and_changed(self, name: str, needed: Iterable[Path]) -> tuple[list[str], list[str]]:
        """(outputs of a finished stage that are gone, those whose content is another now), as they are to be shown.

        Args:
            name: The stage.
            needed: What must be there of a stage whose record, by version 0.1.0, notes no outputs.
        """
        noted = self.outputs(name)
        if noted is None:
            return [str(path) for path in needed if not path.is_file()], []
        missing, changed = [], []
        for relative, was in noted.items():
            path = self._root / relative
            if not path.is_file():
                missing.append(str(path))
            elif path.stat().st_size != was["size"]:
                changed.append(f"{path} ({path.stat().st_size} bytes, {was['size']} when it was written)")
            elif content_digest(path) != was["digest"]:
                changed.append(f"{path} (the same size, but another content than was written)")
        return missing, changed
