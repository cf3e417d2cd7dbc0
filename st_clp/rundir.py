"""The folder of a run: its settings, its finished stages, and what to go on from."""

from __future__ import annotations

import hashlib
import json
import logging
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from evaluators.evaluation import Evaluation, read_evaluation
from st_clp.settings import RunSettings, SettingsError

logger = logging.getLogger(__name__)

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

    @property
    def settings_file(self) -> Path:
        """The settings that the run was started with."""
        return self.work / SETTINGS

    def prepare(self, settings: RunSettings, *, resume: bool = False, overwrite: bool = False) -> None:
        """Make the folder, or refuse one that is not to be used.

        Raises:
            SettingsError: The folder exists and neither ``resume`` nor ``overwrite`` was asked for; ``resume``
                finds other settings; ``overwrite`` finds something that is no run.
            OSError: The folder cannot be written.
        """
        begun = self.settings_file.is_file()
        if resume and begun:
            self._require_same(settings)
            return
        occupied = self.path.exists() and (not self.path.is_dir() or any(self.path.iterdir()))
        if occupied and not begun:
            raise SettingsError(f"{self.path} exists and is not the folder of a run; name another --output")
        if occupied and not overwrite:
            raise SettingsError(
                f"{self.path} holds a run already: go on with it by --resume, replace it by --overwrite, "
                "or name another --output"
            )
        if occupied:
            self._clear()
        self.work.mkdir(parents=True, exist_ok=True)
        settings.write_yaml(self.settings_file)

    def _clear(self) -> None:
        """Remove everything but the queries that were generated: they may have been paid for."""
        kept = set(self.work.glob(f"{QUERY_STORE}*"))
        for path in [*self.path.iterdir(), *self.work.iterdir()]:
            if path == self.work or path in kept:
                continue
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            else:
                path.unlink()

    def _require_same(self, settings: RunSettings) -> None:
        started = RunSettings.from_dict(RunSettings.read_yaml(self.settings_file), where=str(self.settings_file))
        differences = started.differences(settings)
        differences.pop("output", None)  # the folder may have been moved
        if differences:
            text = "; ".join(f"{name} was {then!r}, now {now!r}" for name, (then, now) in differences.items())
            raise SettingsError(
                f"{self.path} was started with other settings ({text}). Resume with the same ones, "
                f"or only with: st-clp run --output {self.path} --resume"
            )

    def stage(self, name: str, work: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """The result of a stage: read where it is finished, otherwise computed and written.

        Args:
            name: The stage's name, a file name.
            work: Computes the result, which must go into JSON.
        """
        file = self.work / "stages" / f"{name}.json"
        if (done := self.finished(name)) is not None:
            logger.info("%s: finished before", name)
            return done
        result = work()
        write_json(file, result)
        return result

    def finished(self, name: str) -> dict[str, Any] | None:
        """The result of a stage that is finished; None of one that is not."""
        file = self.work / "stages" / f"{name}.json"
        try:
            return json.loads(file.read_text(encoding="utf-8"))
        except FileNotFoundError:
            return None
        except ValueError:
            logger.warning("%s cannot be read; the stage is done again", file)
            return None

    @property
    def query_store(self) -> Path:
        """Where generated queries are kept."""
        return self.work / QUERY_STORE

    def store(self, when: str, corpus_name: str) -> Path:
        """Where the embeddings of a corpus are kept."""
        return self.work / "embeddings" / when / slug(corpus_name)

    def evaluation(self, when: str) -> Path:
        """Where an evaluation is saved: ``"before"`` or ``"after"`` training."""
        return self.work / "evaluations" / when

    def last_checkpoint(self) -> Path | None:
        """The newest checkpoint that was written to its end."""
        # The trainer writes its state last, so a checkpoint with a state is whole.
        whole = [path.parent for path in (self.work / "checkpoints").glob("checkpoint-*/trainer_state.json")]
        return max(whole, key=lambda path: int(path.name.rpartition("-")[2]), default=None)


def evaluations_of(folder: str | Path) -> list[Evaluation]:
    """The evaluations in a folder: one that was saved there, or those of a run before and after training.

    Raises:
        EvaluationError: There are none, or one is broken.
    """
    directory = RunDirectory(folder)
    if not directory.settings_file.is_file():
        return [read_evaluation(folder)]
    found = [directory.evaluation(when) for when in ("before", "after")]
    return [read_evaluation(path) for path in found if path.is_dir()]


def slug(name: str) -> str:
    """A name as one path component: readable, and different for different names."""
    readable = re.sub(r"[^A-Za-z0-9.]+", "-", name).strip("-.")[-60:]
    return f"{readable}-{hashlib.blake2b(name.encode(), digest_size=4).hexdigest()}".lstrip("-")


def write_json(path: Path, content: Any) -> None:
    """Write JSON so that the file appears whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(path.name + ".partial")
    beside.write_text(json.dumps(content, indent=1, ensure_ascii=False), encoding="utf-8")
    beside.replace(path)
