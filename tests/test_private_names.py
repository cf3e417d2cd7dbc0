"""Private names of other libraries: each is used in one place, and a new release that lacks it is told of here."""

from __future__ import annotations

import ast
import importlib
import inspect
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import evaluators
import st_clp

# Documented, in spite of their names.
PUBLIC = {"_asdict", "_replace", "_exit"}
# name -> (the one file that may use it, where it is found, the parameters that are relied on)
KNOWN: dict[str, tuple[str, str, tuple[str, ...]]] = {
    "_create_minibatch": ("st_clp/losses/gradcache.py", "sentence_transformers.base.losses.gradcache", ()),
    "_get_batch_size": ("st_clp/losses/gradcache.py", "sentence_transformers.base.losses.gradcache", ()),
    "_minibatch_ranges": ("st_clp/losses/gradcache.py", "sentence_transformers.base.losses.gradcache", ()),
    "_load_with_module_classes": (
        "st_clp/moe/upcycling.py",
        "class sentence_transformers SentenceTransformer",
        ("device",),
    ),
    "_model_card_text": ("st_clp/moe/saving.py", "a model", ()),
    "_keep_in_fp32_modules_strict": ("st_clp/moe/transformer.py", "class transformers PreTrainedModel", ()),
    "_registered": ("st_clp/data/sources/irds.py", "class ir_datasets registry", ()),
    "_linear_pointwise": ("st_clp/encoding/packing.py", "torch.ops.mkldnn", ()),
    "_reorder_linear_weight": ("st_clp/encoding/packing.py", "torch.ops.mkldnn", ()),
    "_utils": ("st_clp/memory.py", "torch.utils.data", ()),
    "_validate_mini_batch_num_tokens": (
        "st_clp/losses/gradcache.py",
        "sentence_transformers.base.losses.gradcache",
        (),
    ),
    "_attn_implementation": ("st_clp/encoding/attention.py", "class transformers PreTrainedConfig", ()),
    "_hf_peft_config_loaded": ("st_clp/moe/saving.py", "class transformers PreTrainedModel", ()),
    "_version": ("st_clp/moe/balance.py", "class torch Tensor", ()),
    "_gradient_checkpointing_func": ("st_clp/moe/context.py", "text of transformers.modeling_utils", ()),
    "_compiled_call_impl": ("st_clp/run/modelling.py", "class torch.nn Module", ()),
    "_modules": ("st_clp/moe/upcycling.py", "torch.nn.Module", ()),
}


def uses(file: Path) -> Iterator[str]:
    """Private names in a file that are not of the object itself, nor of ours."""
    tree = ast.parse(file.read_text(encoding="utf-8"))
    own = {node.name for node in ast.walk(tree) if isinstance(node, (ast.FunctionDef, ast.ClassDef))}
    own |= {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute) and is_self(node.value)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and not is_self(node.value) and node.attr not in own:
            yield node.attr
        elif isinstance(node, ast.ImportFrom) and not (node.module or "").startswith(("st_clp", "evaluators", "__")):
            yield from (name.name for name in node.names)
            yield from (node.module or "").split(".")


def is_self(node: ast.expr) -> bool:
    return isinstance(node, ast.Name) and node.id in ("self", "cls", "other")


def test_each_private_name_is_used_in_its_one_place() -> None:
    found: dict[str, set[str]] = {}
    for package in (st_clp, evaluators):
        folder = Path(package.__file__).parent
        for file in folder.rglob("*.py"):
            for name in uses(file):
                if name.startswith("_") and not name.startswith("__") and name not in PUBLIC:
                    found.setdefault(name, set()).add(file.relative_to(folder.parent).as_posix())
    assert found == {name: {place} for name, (place, _, _) in KNOWN.items()}


@pytest.mark.parametrize("name", KNOWN)
def test_the_name_is_there_and_takes_what_we_give_it(name: str, tiny_model: object) -> None:
    place, where, parameters = KNOWN[name]
    advice = f"{where} has no {name} in this release: mend {place}, or leave the release out in setup.cfg"
    if where.startswith("text of "):
        assert name in inspect.getsource(importlib.import_module(where.removeprefix("text of "))), advice
        return
    if where in ("a model", "torch.nn.Module"):
        owner: object = tiny_model
    elif where == "torch.ops.mkldnn":
        if not torch.backends.mkldnn.is_available():
            pytest.skip("this torch has no oneDNN")
        owner = torch.ops.mkldnn
    else:
        kind, _, rest = where.partition("class ")
        module, _, attribute = rest.partition(" ") if not kind else (where, "", "")
        owner = importlib.import_module(module)
        owner = getattr(owner, attribute) if attribute else owner
    assert hasattr(owner, name) or name in dir(owner), advice
    if parameters:
        signature = inspect.signature(getattr(owner, name))
        takes_all = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in signature.parameters.values())
        assert takes_all or set(parameters) <= set(signature.parameters), advice
