"""Two processes under DDP with gathering equal one process with the joined batch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from sentence_transformers import SentenceTransformer

from st_clp.losses import CLPLoss
from tests.fresh import run_fresh_script

# Rows 0 to 1 are the first process's, 2 to 3 the second's; the weights in the two differ.
LABELS = torch.tensor([[1.0, 1.0], [0.5, 1.0], [0.0, 0.0], [0.1, 0.0]])
SETTINGS: dict[str, dict[str, Any]] = {
    "cosine": {"settings": {"penalty_weight": 0.4}, "labels": LABELS},
    "contrastive": {"settings": {"penalty_weight": 0.4, "penalty": "contrastive"}, "labels": LABELS},
    "no labels": {"settings": {"penalty": "contrastive", "margin": 0.0}, "labels": None},
    "guide": {"settings": {"penalty": "contrastive"}, "labels": LABELS, "guided": True},
    "all weights 0": {"settings": {}, "labels": LABELS * 0},
    "rows apart": {"settings": {"in_batch_negatives": False, "penalty": "contrastive"}, "labels": LABELS},
    "pairs": {"settings": {}, "labels": None, "columns": 2},
    "directions": {
        "settings": {
            "directions": ("query_to_doc", "query_to_query", "doc_to_query", "doc_to_doc"),
            "hardness_mode": "in_batch_negatives",
            "hardness_strength": 4.0,
        },
        "labels": None,
    },
}
CASES = [
    {"loss": loss, "name": name, "columns": 6, **case}
    for loss in ("CLPLoss", "CachedCLPLoss")
    for name, case in SETTINGS.items()
]


@pytest.fixture(scope="module")
def batch(columns: list[list[str]]) -> list[list[str]]:
    """Four rows; the positive of the last is also the first's, so the same text stands in both processes."""
    rows = [column[:4] for column in columns[:6]]
    rows[1][3] = rows[1][0]
    return rows


@pytest.fixture(scope="module")
def guide_path(tiny_model_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the tiny model with other weights."""
    guide = SentenceTransformer(str(tiny_model_path), device="cpu")
    generator = torch.Generator().manual_seed(3)
    for parameter in guide.parameters():
        parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator)
    folder = tmp_path_factory.mktemp("guide")
    guide.save(str(folder))
    return folder


@pytest.fixture(scope="module")
def results(
    batch: list[list[str]], tiny_model_path: Path, guide_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> list[dict[str, Any]]:
    folder = tmp_path_factory.mktemp("processes")
    cases = [
        {
            **case,
            "settings": {**case["settings"], **({"mini_batch_size": 1} if case["loss"] == "CachedCLPLoss" else {})},
        }
        for case in CASES
    ]
    torch.save(
        {"model": str(tiny_model_path), "guide": str(guide_path), "columns": batch, "cases": cases}, folder / "cases.pt"
    )
    script = Path(__file__).parent / "two_processes.py"
    run_fresh_script(script, folder / "cases.pt", folder / "out.pt")
    return torch.load(folder / "out.pt", weights_only=True)


@pytest.mark.parametrize("index", range(len(CASES)), ids=[f"{case['loss']}-{case['name']}" for case in CASES])
def test_two_processes_equal_one(
    index: int,
    results: list[dict[str, Any]],
    batch: list[list[str]],
    tiny_model: SentenceTransformer,
    guide_path: Path,
    assert_close: Any,
) -> None:
    case = CASES[index]
    model = tiny_model.double().train()
    guide = SentenceTransformer(str(guide_path), device="cpu").double() if case.get("guided") else None
    loss = CLPLoss(model, guide=guide, **case["settings"])
    value = loss([model.preprocess(column) for column in batch[: case["columns"]]], case["labels"])
    value.backward()

    assert_close(results[index]["loss"], value.detach(), rtol=1e-10, atol=1e-12)
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    found = results[index]["gradients"]
    actual, expected = (torch.cat([grads[name].flatten() for name in found]) for grads in (found, gradients))
    assert_close(actual, expected, rtol=1e-8, atol=1e-11)
    assert max(gradient.abs().max() for gradient in gradients.values()) > 1e-4
