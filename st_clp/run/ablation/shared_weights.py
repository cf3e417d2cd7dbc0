"""What a training left, kept for the variants that train alike and differ in what becomes of the weights."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from sentence_transformers import SentenceTransformer
from torch import Tensor

from st_clp.files import read_json, whole_folder, write_json
from st_clp.run.ablation.loop import Trained
from st_clp.run.ablation.variants import Variant
from st_clp.run.modelling import prepare_model
from st_clp.settings import RunSettings

# What the trained weights do not depend on.
AFTERWARDS = ("average_with_base", "output")


class SharedWeights:
    """Trained weights by the settings that they depend on; only of trainings that more than one variant has.

    Args:
        folder: Where to keep them until :meth:`clear`.
        variants: All variants.
    """

    def __init__(self, folder: Path, variants: Sequence[Variant]) -> None:
        self._folder = folder
        times = Counter(_trained_alike(variant.settings, ("learning_rate", "seed")) for variant in variants)
        self._shared = {key for key, number in times.items() if number > 1}

    def load(self, model: SentenceTransformer, settings: RunSettings) -> Trained | None:
        """Make the model what such a training left; None, and the model as it was, where none was kept."""
        place = self._place(settings)
        if not (place / "trained.json").is_file():
            return None
        prepare_model(model, settings)
        kept = load_file(place / "weights.safetensors")
        with torch.no_grad():
            for name, tensor in _changed(model).items():
                tensor.copy_(kept[name])
        model.eval()
        return Trained(**read_json(place / "trained.json"))

    def keep(self, model: SentenceTransformer, settings: RunSettings, trained: Trained) -> None:
        """Keep what a training left, where another variant has the same."""
        if _trained_alike(settings, ("learning_rate", "seed")) not in self._shared:
            return
        with whole_folder(self._place(settings)) as folder:
            weights = {name: tensor.detach().cpu().contiguous() for name, tensor in _changed(model).items()}
            save_file(weights, folder / "weights.safetensors")
            write_json(folder / "trained.json", asdict(trained))

    def clear(self) -> None:
        """Remove all: every variant has what it needs."""
        shutil.rmtree(self._folder, ignore_errors=True)

    def _place(self, settings: RunSettings) -> Path:
        return self._folder / _trained_alike(settings)


def _trained_alike(settings: RunSettings, also: Sequence[str] = ()) -> str:
    """A name that settings share whose trainings are the same; ``also`` names more that may differ."""
    what = {name: value for name, value in settings.to_dict().items() if name not in (*AFTERWARDS, *also)}
    return hashlib.blake2b(json.dumps(what, sort_keys=True).encode(), digest_size=8).hexdigest()


def _changed(model: SentenceTransformer) -> dict[str, Tensor]:
    """What training changes: the weights that train, and what is counted beside them."""
    trained: dict[str, Tensor] = {name: weight for name, weight in model.named_parameters() if weight.requires_grad}
    return trained | dict(model.named_buffers())
