"""Saving mixtures: in a form that other loaders refuse, with a card that says how to open it; and the paper's format.

Without precautions transformers would load the encoder's folder with random weights in every feed-forward and merely
log it. So the config gives a sentence as the name of its weights file, which transformers refuses and prints.

An adapter library saves only its adapters, assuming that the model below can be loaded again; but the experts and
routers of a new mixture exist in memory only. So the encoder is written as if it had none, and each adapter beside it
in the library's own format.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.model_card import SentenceTransformerModelCardData
from torch import Tensor, nn

from st_clp.files import read_json, write_json
from st_clp.moe.configuration import CONFIG_KEY, MoESettings
from st_clp.moe.convert import expert_layers

INSTALL = """
This model has a mixture of experts of [st-clp](https://pypi.org/project/st-clp/), which must be installed as well:

```bash
pip install -U st-clp
```

`trust_remote_code=True` allows its class to be imported from there; `st_clp.load(path)` opens a folder without it.

"""

_plain_snippet = SentenceTransformerModelCardData.generate_usage_snippet


def forget_card(model: SentenceTransformer) -> None:
    """Discard the card that the model came with, which describes another model, so that saving writes a new one."""
    model._model_card_text = None


def _usage_snippet(data: SentenceTransformerModelCardData) -> str:
    """The usage snippet of a model card that can open a mixture."""
    snippet = _plain_snippet(data)
    if data.model is None or not expert_layers(data.model):
        return snippet
    opened = re.sub(r'SentenceTransformer\("([^"]*)"\)', r'SentenceTransformer("\1", trust_remote_code=True)', snippet)
    return INSTALL + opened


def write_own_snippets() -> None:
    """Let the cards of all mixtures have a snippet that opens them, however they were loaded and saved.

    Cards are written by the model, which does not know what its modules need, hence this patch.
    """
    setattr(SentenceTransformerModelCardData, "generate_usage_snippet", _usage_snippet)  # noqa: B010


HOW_TO_OPEN = (
    "this folder holds a mixture of experts of st-clp (pip install st-clp); open it with st_clp.load(path), or with "
    "SentenceTransformer(path, trust_remote_code=True) where st-clp is installed"
)
WEIGHTS_KEY = "transformers_weights"
"""The key of ``config.json`` under which transformers looks for the name of the weights file."""
ADAPTERS_KEY = "st_clp_adapters"
"""The key of ``config.json`` with the names of the adapters, and which of them are active."""
ADAPTERS = "adapters"
"""The folder of the adapters, one folder each."""

CODE_FILE = "st_clp.py"
CODE = '''"""Names the class of this model, which is part of st-clp. Where that is missing: pip install st-clp

SentenceTransformer(path, trust_remote_code=True) reads this file first and says which package it needs.
"""

import os
import sys

if __name__ == "st_clp":  # Python was started in this folder and found this file in place of the package
    _here = os.path.dirname(os.path.abspath(__file__))
    sys.path[:] = [place for place in sys.path if os.path.abspath(place) != _here]
    del sys.modules["st_clp"]

from st_clp import MoETransformer
'''
"""A file of the model's folder. Its import is what makes transformers say what to install; it holds no class itself, so
that objects are pickled, and saved again, under the class of the package."""


def close_to_others(folder: str | Path, encoder: nn.Module) -> None:
    """Complete the saved config: how to open the folder, what to install, and the adapters."""
    path = Path(folder) / "config.json"
    config = read_json(path)
    config[WEIGHTS_KEY] = HOW_TO_OPEN
    config.pop(ADAPTERS_KEY, None)
    if adapters := adapter_configs(encoder):
        config[ADAPTERS_KEY] = {"names": sorted(adapters), "active": _active_adapters(encoder)}
    write_json(path, config, indent=2)
    here = Path(folder)
    # sentence-transformers names a module's own folder after its class, and looks for the file in the model's folder
    for place in (here, here.parent) if here.name.endswith("_MoETransformer") else (here,):
        (place / CODE_FILE).write_text(CODE, encoding="utf-8")


def open_to_us(config: Any) -> dict[str, Any]:
    """Undo :func:`close_to_others` on a loaded config; return its entry on adapters."""
    if getattr(config, WEIGHTS_KEY, None) == HOW_TO_OPEN or hasattr(config, "st_clp_moe"):
        config.__dict__.pop(WEIGHTS_KEY, None)
    found: dict[str, Any] = config.__dict__.pop(ADAPTERS_KEY, None) or {}
    return found


def adapter_configs(encoder: nn.Module) -> dict[str, Any]:
    """Return the adapters of an encoder and their PEFT configs by name; none where there are none."""
    return dict(getattr(encoder, "peft_config", None) or {}) if _wrappers(encoder) else {}


def check_writable(encoder: nn.Module) -> None:
    """Refuse, before any weights are written, an encoder whose adapters are mixed into its weights.

    Raises:
        ValueError: Such an adapter would be applied twice after loading.
    """
    if any(getattr(module, "merged", False) for module in _wrappers(encoder).values() if adapter_configs(encoder)):
        raise ValueError(
            "The adapters are merged into the weights and are there beside them as well, so a saved model would apply "
            "them twice. Unmerge them, or delete them, which keeps the merged weights (model.delete_adapter), and save "
            "then. No weights were written."
        )


def check_bare(encoder: nn.Module, purpose: str) -> None:
    """Refuse an encoder with adapters where they would be lost.

    Raises:
        ValueError: There are adapters; ``purpose`` names the operation that does not support them.
    """
    if _wrappers(encoder):
        raise ValueError(
            f"The model has adapters, which would be lost in {purpose}. Merge them into the weights (merge() of every "
            "adapter layer, then model.delete_adapter) or delete them, save the model, open it again and repeat this."
        )


def unwrapped(encoder: nn.Module) -> Any:
    """Return transformers' own encoder from inside what ``peft.get_peft_model`` has wrapped around it."""
    base = getattr(encoder, "get_base_model", None)
    return base() if callable(base) else encoder


@contextmanager
def without_adapters(encoder: Any) -> Iterator[dict[str, Tensor] | None]:
    """Context in which transformers saves ``encoder`` as a plain one, with the weights' names without adapters.

    Yields:
        The weights, or None where there are no adapters.
    """
    wrappers = _wrappers(encoder)
    if not wrappers:
        yield None
        return
    loaded = encoder._hf_peft_config_loaded
    encoder._hf_peft_config_loaded = False
    try:
        yield _own_weights(encoder, wrappers)
    finally:
        encoder._hf_peft_config_loaded = loaded


def save_adapters(encoder: nn.Module, folder: str | Path) -> None:
    """Write every adapter of ``encoder`` to ``folder``, in PEFT's format."""
    root = Path(folder)
    (root / "adapter_config.json").unlink(missing_ok=True)  # of a former save: it would send a reader elsewhere
    if not adapter_configs(encoder):
        return
    from peft import get_peft_model_state_dict

    for name, config in adapter_configs(encoder).items():
        target = root / ADAPTERS / name
        target.mkdir(parents=True, exist_ok=True)
        weights = get_peft_model_state_dict(encoder, adapter_name=name)
        own = {f"base_model.model.{key}": value.detach().cpu().contiguous() for key, value in weights.items()}
        save_file(own, target / "adapter_model.safetensors", metadata={"format": "pt"})
        config.save_pretrained(str(target))


def load_adapters(encoder: Any, folder: str | Path, found: dict[str, Any]) -> None:
    """Load the adapters that ``found`` names (from :func:`open_to_us`) into ``encoder``."""
    if not found.get("names"):
        return
    from peft import set_peft_model_state_dict

    for name in found["names"]:
        if Path(name).name != name:
            raise ValueError(f"{folder}: config.json names an adapter {name!r}, which is no folder's name.")
        encoder.load_adapter(str(Path(folder) / name), adapter_name=name)
        # transformers 5.17 leaves out the modules that are trained whole
        saved = load_file(Path(folder) / name / "adapter_model.safetensors")
        own = {key.removeprefix("base_model.model."): value for key, value in saved.items()}
        set_peft_model_state_dict(encoder, own, adapter_name=name)
    active = found.get("active") or []
    if active:
        encoder.set_adapter(active if len(active) > 1 else active[0])
    else:
        encoder.disable_adapters()


def _active_adapters(encoder: nn.Module) -> list[str]:
    layers: list[Any] = [module for module in _wrappers(encoder).values() if hasattr(module, "active_adapters")]
    if any(getattr(module, "disable_adapters", False) is True for module in layers):
        return []
    return list(dict.fromkeys(str(name) for module in layers for name in module.active_adapters))


def _wrappers(encoder: nn.Module) -> dict[str, nn.Module]:
    """Return the modules that an adapter library has wrapped around the encoder's own, by path."""
    try:
        from peft.tuners.tuners_utils import BaseTunerLayer
        from peft.utils.other import AuxiliaryTrainingWrapper
    except ImportError:
        return {}
    kinds = (BaseTunerLayer, AuxiliaryTrainingWrapper)
    return {name: module for name, module in encoder.named_modules() if isinstance(module, kinds)}


def _own_weights(encoder: nn.Module, wrappers: dict[str, nn.Module]) -> dict[str, Tensor]:
    """The encoder's weights without adapters, under their original names."""
    inner = {
        path: "base_layer" if hasattr(module, "base_layer") else "original_module" for path, module in wrappers.items()
    }
    own = {}
    for name, value in encoder.state_dict().items():
        kept: list[str] = []
        parts = name.split(".")
        place = 0
        while place < len(parts):
            path = ".".join(parts[:place])
            if path in inner:
                if parts[place] != inner[path]:
                    break
            else:
                kept.append(parts[place])
            place += 1
        else:
            own[".".join(kept)] = value
    return own


# The paper's published checkpoints: these keys in the encoder's config.json, and every layer converted. The weights are
# called encoder.layer.L.intermediate.dense.experts.E.{weight,bias} and ….dense.gate.weight, as they are here too.
REFERENCE_KEYS = ("moe", "num_experts", "num_experts_per_tok", "only_train")


def is_reference_config(config: Any) -> bool:
    """Whether an encoder's config is a published checkpoint's."""
    return getattr(config, CONFIG_KEY, None) is None and getattr(config, "moe", None) is not None


def take_reference_settings(config: Any, path: str | Path) -> MoESettings:
    """Read the mixture's settings from a published checkpoint's config, and remove their keys from it.

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
    """Refuse a mixture that cannot be written in the reference's format.

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
