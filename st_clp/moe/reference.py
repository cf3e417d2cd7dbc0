"""The paper's published checkpoints, in both directions.

Their encoder's ``config.json`` has the keys ``moe`` ("intermediate" or "output"), ``num_experts``,
``num_experts_per_tok`` and ``only_train``; every layer is converted. Weights are named
``encoder.layer.L.intermediate.dense.experts.E.{weight,bias}`` and ``….dense.gate.weight``, as they are here too.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from safetensors.torch import save_file

from st_clp.moe.configuration import CONFIG_KEY, MoESettings

REFERENCE_KEYS = ("moe", "num_experts", "num_experts_per_tok", "only_train")


def is_reference_config(config: Any) -> bool:
    """Whether an encoder's config is a published checkpoint's."""
    return getattr(config, CONFIG_KEY, None) is None and getattr(config, "moe", None) is not None


def take_reference_settings(config: Any, path: str | Path) -> MoESettings:
    """Read the mixture's settings from a published checkpoint's config, and take their keys out of it.

    Raises:
        ValueError: If a key is missing, or has a value that the reference does not know.
    """
    if missing := [key for key in REFERENCE_KEYS[:3] if getattr(config, key, None) is None]:
        hint = " It is one of st_clp's own: open it with st_clp.load." if hasattr(config, CONFIG_KEY) else ""
        raise ValueError(f"{path} is not a reference checkpoint: its config.json has no {', '.join(missing)}.{hint}")
    if config.moe not in ("intermediate", "output"):
        raise ValueError(f"{path}: config.json has moe {config.moe!r}; the reference knows intermediate and output.")
    settings = MoESettings(
        num_experts=config.num_experts,
        num_experts_per_tok=config.num_experts_per_tok,
        projection=config.moe,
        layers=tuple(range(config.num_hidden_layers)),
        routing="reference",
        balance="none",
        only_train=getattr(config, "only_train", None),
    )
    for key in REFERENCE_KEYS:
        if hasattr(config, key):
            delattr(config, key)
    return settings


def check_writable_as_reference(encoder: Any, settings: MoESettings) -> None:
    """Refuse a mixture that the reference's layout cannot hold.

    Raises:
        ValueError: If the reference would compute other embeddings from the same weights; the message says why.
    """
    reasons = []
    if encoder.config.model_type != "xlm-roberta":
        reasons.append(f"its encoder is {encoder.config.model_type}, and the reference's is xlm-roberta")
    if settings.projection not in ("intermediate", "output"):
        reasons.append("both projections are mixtures, and the reference converts one")
    if settings.layers != tuple(range(encoder.config.num_hidden_layers)):
        reasons.append("not every layer is converted")
    if any(bool(value.any()) for name, value in encoder.named_buffers() if ".gate.balance_" in name):
        reasons.append("its routers choose with a balance bias, which the reference does not have")
    if reasons:
        raise ValueError(
            "This mixture cannot be written in the reference's layout: " + "; ".join(reasons) + ". model.save keeps "
            "everything; st_clp.to_dense gives a model that any program opens."
        )


def write_reference(encoder: Any, settings: MoESettings, path: str | Path) -> None:
    """Write ``config.json`` and ``model.safetensors`` in the reference's layout; the folder is made if need be."""
    folder = Path(path)
    folder.mkdir(parents=True, exist_ok=True)
    config = {key: value for key, value in encoder.config.to_dict().items() if key != CONFIG_KEY}
    config |= {
        "architectures": [type(encoder).__name__],
        "moe": settings.projection,
        "num_experts": settings.num_experts,
        "num_experts_per_tok": settings.num_experts_per_tok,
        "only_train": settings.only_train or settings.projection,
        "torch_dtype": str(encoder.dtype).removeprefix("torch."),
    }
    text = json.dumps(config, indent=2, sort_keys=True, default=str)
    (folder / "config.json").write_text(text + "\n", encoding="utf-8")
    weights = {
        name: value.detach().cpu().contiguous()
        for name, value in encoder.state_dict().items()
        if ".gate.balance_" not in name
    }
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
