"""Where the files of refreshes lie."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path

from st_clp.files import remove_leftovers_in


@dataclass(frozen=True)
class Layout:
    """The folder of a run's refreshes.

    Args:
        folder: The folder; all processes of a training must see the same one.
    """

    folder: Path

    def negatives(self, step: int) -> Path:
        """The generation that the weights after so many steps mined; that of step 0 is what training began with."""
        return self.folder / "negatives" / f"step-{step:08d}"

    def snapshot(self, step: int) -> Path:
        """The weights that train, as they were after so many steps."""
        return self.folder / "snapshots" / f"step-{step:08d}.safetensors"

    @property
    def frozen(self) -> Path:
        """The weights that do not train."""
        return self.folder / "snapshots" / "frozen.safetensors"

    @property
    def embeddings(self) -> Path:
        """The embeddings of the weights that mined last, so that mining that was stopped goes on."""
        return self.folder / "embeddings"

    @property
    def journal(self) -> Path:
        """The history as it is now, newer than that of a checkpoint."""
        return self.folder / "refreshes.json"

    @property
    def log(self) -> Path:
        """What the process that mines beside the training prints."""
        return self.folder / "mining.log"

    def remove_leftovers(self) -> None:
        """Remove what killed processes left unfinished."""
        for folder in (self.folder, self.folder / "negatives", self.folder / "snapshots"):
            remove_leftovers_in(folder)

    def clear(self) -> None:
        """Remove what an earlier run left."""
        for name in ("negatives", "snapshots", "embeddings"):
            shutil.rmtree(self.folder / name, ignore_errors=True)
        self.journal.unlink(missing_ok=True)
        self.log.unlink(missing_ok=True)

    def remove_before(self, step: int) -> None:
        """Remove the generations that are older than that of a step, but for what training began with."""
        for path in (self.folder / "negatives").glob("step-*"):
            number = path.name.removeprefix("step-").partition(".")[0]
            if number.isdigit() and 0 < int(number) < step:
                shutil.rmtree(path, ignore_errors=True)
