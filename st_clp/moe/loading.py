"""Open a saved model without running any code that lies in its folder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from sentence_transformers import SentenceTransformer
from torch import nn

from st_clp.files import read_json
from st_clp.moe.transformer import MoETransformer

OWN_CLASSES: dict[str, type[nn.Module]] = {
    "st_clp.MoETransformer": MoETransformer,
    "st_clp.moe.MoETransformer": MoETransformer,  # as versions up to 0.2.0 wrote it
}
"""The module classes of st_clp that a saved model may name."""


def load(path: str | Path, device: str | None = None, **kwargs: Any) -> SentenceTransformer:
    """Open a saved model, trusting the classes of sentence-transformers and st_clp and no others.

    ``SentenceTransformer(path, trust_remote_code=True)`` opens it too, but that would also run any Python file that
    came with the folder; this never does.

    Args:
        path: The folder of a saved model.
        device: Where to put it; None chooses as SentenceTransformer does.
        **kwargs: Passed on to ``SentenceTransformer``; ``trust_remote_code`` is refused.

    Raises:
        ValueError: If the model names a class of another origin; the message names it.
        FileNotFoundError: If there is no saved model at ``path``.
    """
    folder = Path(path)
    if kwargs.pop("trust_remote_code", False):
        raise ValueError(
            "st_clp.load trusts st_clp's own classes only. To run a model's own code, having read it, use "
            "SentenceTransformer(path, trust_remote_code=True)."
        )
    if not (folder / "modules.json").is_file():
        raise FileNotFoundError(f"{folder} holds no saved model: there is no modules.json in it.")
    foreign = [reference for reference in _class_references(folder) if not _trusted(reference)]
    if foreign:
        raise ValueError(
            f"{folder} names the module class {', '.join(sorted(set(foreign)))}, which belongs neither to "
            "sentence-transformers nor to st_clp, so it was not loaded. If you know and trust it, open the model with "
            "SentenceTransformer(path, trust_remote_code=True)."
        )
    return SentenceTransformer._load_with_module_classes(str(folder), OWN_CLASSES, device=device, **kwargs)


def _trusted(reference: str) -> bool:
    return reference in OWN_CLASSES or reference.startswith("sentence_transformers.")


def _class_references(folder: Path) -> list[str]:
    """Return every module class that the folder names, those inside Router modules included."""
    file = folder / "modules.json"
    modules = _read(file)
    if not isinstance(modules, list) or not all(isinstance(module, dict) and "type" in module for module in modules):
        raise ValueError(f"{file} is not what a model has there: a list of modules, each with its type; save it again")
    references = [str(module["type"]) for module in modules]
    for config in folder.rglob("router_config.json"):
        types = read_json(config).get("types", {})
        references += [str(reference) for reference in types.values()] if isinstance(types, dict) else []
    return references


def _read(file: Path) -> Any:
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{file} is not valid JSON: {error}") from None
