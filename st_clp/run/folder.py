"""The folder of a run: its settings, its finished stages, and the files to resume from."""

from __future__ import annotations

import hashlib
import logging
import re
import shlex
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from st_clp.declaring import Options, names_of
from st_clp.files import UNFINISHED, content_digest, read_json, require_field, write_json
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
from st_clp.settings import RunSettings, SettingsError

if TYPE_CHECKING:
    from evaluators.evaluation import Evaluation


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
    TrainingClusterOptions: TRAIN,
    RefreshOptions: TRAIN,
}
_OF_A_SETTING = {
    "seed": EVALUATE_BEFORE,  # it draws the queries that are held out
    **dict.fromkeys(("max_train_queries", "sentence_queries", "cross_encoder", "negative_queries"), MINE),
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
    """The records of a run's finished stages: their results, and the sizes and digests of the files they wrote.

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
        """(missing outputs of a finished stage, those with changed content), as shown to the user.

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


WORK = "run"
SETTINGS = "settings.yaml"
QUERY_STORE = "queries.sqlite"


class RunDirectory:
    """A run's output folder: the model at its root, everything about the run under ``run/``.

    A stage's result is written when the stage is finished, so a run that was stopped goes on with the first
    stage that has none.

    Args:
        path: The output folder.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.work = self.path / WORK
        self.records = StageRecords(self.work / "stages", self.path)

    @property
    def settings_file(self) -> Path:
        """The settings that the run was started with."""
        return self.work / SETTINGS

    @property
    def begun(self) -> bool:
        """Whether the folder holds a run."""
        return self.settings_file.is_file() and not self._nothing_computed()

    def started_settings(self) -> dict[str, Any]:
        """The settings that the run was started with, by name.

        Raises:
            SettingsError: There is no run to resume, or its settings cannot be read.
        """
        if not self.begun:
            raise SettingsError(f"{self.path} holds no run to resume")
        try:
            return RunSettings.as_recorded(RunSettings.read_yaml(self.settings_file))
        except SettingsError as error:
            raise SettingsError(
                f"{error}; the run cannot go on without its settings: replace it with --overwrite"
            ) from error

    def prepare(self, settings: RunSettings, *, resume: bool = False, overwrite: bool = False) -> dict[str, Any]:
        """Make the folder, or refuse one that is not to be used.

        Returns:
            What :meth:`check` returns.

        Raises:
            SettingsError: As :meth:`check`.
            OSError: The folder cannot be written.
        """
        changed = self.check(settings, resume=resume, overwrite=overwrite)
        if not resume and self.begun:
            self._clear()
        self.work.mkdir(parents=True, exist_ok=True)
        settings.write_yaml(self.settings_file)
        return changed

    def check(
        self, settings: RunSettings, *, resume: bool = False, overwrite: bool = False
    ) -> dict[str, tuple[Any, Any]]:
        """Refuse a folder that is not to be used, and change nothing.

        Returns:
            For a run that is resumed, the settings that are others now: name to (what it was, what it is).

        Raises:
            SettingsError: The folder exists and neither ``resume`` nor ``overwrite`` was asked for; ``resume``
                finds settings that what is computed does not have; ``overwrite`` finds something that is no run.
        """
        if resume and self.begun:
            return self._changed_settings(settings)
        occupied = self.path.exists() and (not self.path.is_dir() or any(self.path.iterdir()))
        if not occupied or self._nothing_computed():
            return {}
        if not self.settings_file.is_file():
            raise SettingsError(f"{self.path} exists and is not the folder of a run; name another --output")
        if not overwrite:
            raise SettingsError(
                f"{self.path} holds a run already: go on with it by --resume, replace it by --overwrite, "
                "or name another --output"
            )
        return {}

    def _nothing_computed(self) -> bool:
        """Whether the folder is what a start left that could not write its settings, or an overwriting that stopped."""
        if not self.work.is_dir() or [entry.name for entry in self.path.iterdir()] != [WORK]:
            return False
        return all(
            entry.name.startswith(QUERY_STORE)
            or (entry.name.startswith(f"{SETTINGS}.") and entry.name.endswith(UNFINISHED))
            or (entry.name == SETTINGS and entry.stat().st_size == 0)
            for entry in self.work.iterdir()
        )

    def _clear(self) -> None:
        """Remove everything but the queries that were generated: they may have been paid for."""
        kept = set(self.work.glob(f"{QUERY_STORE}*"))
        # Records first: none may speak of files that are gone. Settings last: with them the folder is known as a run's.
        first, last = self.work / "stages", self.settings_file
        others = [path for path in [*self.work.iterdir(), *self.path.iterdir()] if path not in (first, last)]
        for path in [first, *others, last]:
            if path == self.work or path in kept:
                continue
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            else:
                path.unlink(missing_ok=True)

    def _changed_settings(self, settings: RunSettings) -> dict[str, tuple[Any, Any]]:
        started = RunSettings.from_dict(self.started_settings(), where=str(self.settings_file))
        differences = started.differences(settings)
        differences.pop("output", None)  # the folder may have been moved
        last = self._last_begun_stage()
        blocking = [name for name in differences if (stage := first_stage(name)) and STAGES.index(stage) <= last]
        if not blocking:
            return differences
        text = "; ".join(f"{name} was {differences[name][0]!r}, now {differences[name][1]!r}" for name in blocking)
        advice = ""
        if all(STAGES.index(first_stage(name) or TRAIN) > self._last_finished_stage() for name in blocking):
            advice = f", or remove {self.checkpoints} to train from the beginning with the new ones"
        raise SettingsError(
            f"{self.path} was started with other settings ({text}), and what is computed depends on them. Resume with "
            f"the same ones, or only with: st-clp run --output {shlex.quote(str(self.path))} --resume{advice}"
        )

    def _last_finished_stage(self) -> int:
        return max((number for number, name in enumerate(STAGES) if self.finished(name) is not None), default=-1)

    def _last_begun_stage(self) -> int:
        """The number of the last stage of which something is computed that another setting would change."""
        training = STAGES.index(TRAIN) if self.last_checkpoint() is not None else -1
        return max(self._last_finished_stage(), training)

    def stage(
        self, name: str, work: Callable[[], dict[str, Any]], outputs: Callable[[], Iterable[Path]]
    ) -> dict[str, Any]:
        """The result of a stage: read where it is finished, otherwise computed and written.

        Args:
            name: The stage's name, a file name.
            work: Computes the result, which must go into JSON.
            outputs: The files that it wrote.
        """
        if (done := self.finished(name)) is not None:
            logger.info("%s: finished before", name)
            return done
        result = work()
        self.records.write(name, result, outputs())
        return result

    def finished(self, name: str) -> dict[str, Any] | None:
        """The result of a stage that is finished; None of one that is not."""
        return self.records.read(name)

    def model_files(self) -> list[Path]:
        """The files of the model that was saved in the folder; its card, which is completed later, is none of them."""
        own = {self.path / "README.md", self.path / "report.json"}
        return [
            path
            for path in self.path.rglob("*")
            if path.is_file() and self.work not in path.parents and path not in own
        ]

    @property
    def checkpoints(self) -> Path:
        """Where the Trainer keeps its checkpoints."""
        return self.work / "checkpoints"

    def checkpoints_of(self, part: int) -> Path:
        """Those of one part of a training that has several: the first is number 0."""
        return self.checkpoints / f"part-{part + 1}" if part else self.checkpoints

    @property
    def query_store(self) -> Path:
        """Where generated queries are kept."""
        return self.work / QUERY_STORE

    def query_store_of(self, settings: RunSettings) -> str | Path:
        """Where these settings keep generated queries."""
        return settings.query_store or self.query_store

    def rows_file(self, collection_name: str) -> Path:
        """Where the rows are that were mined from a collection."""
        return self.work / "mined" / f"{slug(collection_name)}.jsonl"

    def mined_files(self) -> list[Path]:
        """The files of mined rows that are there."""
        return sorted((self.work / "mined").glob("*.jsonl"))

    def store(self, when: str, corpus_name: str) -> Path:
        """Where the embeddings of a corpus are kept."""
        return self.work / "embeddings" / when / slug(corpus_name)

    def evaluation(self, when: str) -> Path:
        """Where an evaluation is saved: ``"before"`` or ``"after"`` training."""
        return self.work / "evaluations" / when

    def last_checkpoint(self, part: int | None = None) -> Path | None:
        """The newest checkpoint that is whole: of one part of the training, or of the last part that has any."""
        for number in (1, 0) if part is None else (part,):
            # The trainer writes its state last, so a checkpoint with a state is whole.
            whole = [path.parent for path in self.checkpoints_of(number).glob("checkpoint-*/trainer_state.json")]
            if whole:
                return max(whole, key=lambda path: int(path.name.rpartition("-")[2]))
        return None


def evaluations_of(folder: str | Path) -> list[Evaluation]:
    """The evaluations in a folder: one that was saved there, or those of a run before and after training.

    Raises:
        EvaluationError: There are none, or one is broken.
    """
    from evaluators.evaluation import read_evaluation  # which the command line need not wait for

    directory = RunDirectory(folder)
    if not directory.settings_file.is_file():
        return [read_evaluation(folder)]
    found = [directory.evaluation(when) for when in ("before", "after")]
    return [read_evaluation(path) for path in found if path.is_dir()]


def slug(name: str) -> str:
    """A name as one path component: readable, and different for different names."""
    readable = re.sub(r"[^A-Za-z0-9.]+", "-", name).strip("-.")[-60:]
    return f"{readable}-{hashlib.blake2b(name.encode(), digest_size=4).hexdigest()}".lstrip("-")
