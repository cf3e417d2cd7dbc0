"""Bases whose weights are stored in half precision, as many are on the Hub: trained in float32, saved as they were."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from sentence_transformers import SentenceTransformer

from st_clp import load
from st_clp.run.ablation.study import Ablation, ablate
from st_clp.run.stages import run
from tests.toy import settings_of


@pytest.fixture(params=[torch.bfloat16, torch.float16], ids=str)
def bases(request: pytest.FixtureRequest, tiny_model_path: Path, tmp_path: Path) -> tuple[Path, Path, torch.dtype]:
    """A base in half precision, the same weights in float32, and the former's precision."""
    half = SentenceTransformer(str(tiny_model_path), device="cpu").to(request.param)
    half.save(str(tmp_path / "half"))
    half.float().save(str(tmp_path / "whole"))
    return tmp_path / "half", tmp_path / "whole", request.param


@pytest.mark.parametrize("experts", [0, 2])
def test_it_trains_as_in_float32_and_is_saved_as_the_base_is(
    bases: tuple[Path, Path, torch.dtype],
    experts: int,
    collection_path: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    half, whole, kind = bases
    said = []
    for base in (half, whole):
        settings = settings_of(
            base, collection_path, tmp_path / f"{base.name} trained", experts=experts, encode_dtype="bfloat16", epochs=1
        )
        run(settings)
        said.append("trained in float32" in capsys.readouterr().out)
    assert said == [True, False]
    found, expected = (load(tmp_path / f"{base.name} trained", device="cpu") for base in (half, whole))
    before = dict(SentenceTransformer(str(half), device="cpu").named_parameters())
    for (name, one), other in zip(found.named_parameters(), expected.parameters(), strict=True):
        assert (one.dtype, other.dtype) == (kind, torch.float32), name
        assert torch.equal(one, other.to(kind)), name
        if name.endswith("intermediate.dense.weight"):
            assert (one != before[name]).float().mean() > 0.9, name


def test_an_ablation_evaluates_what_a_run_would_save(
    bases: tuple[Path, Path, torch.dtype], collection_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    evaluated: list[SentenceTransformer] = []
    original = Ablation._evaluate

    def evaluate(self: object, model: SentenceTransformer, *given: object, **named: object) -> None:
        evaluated.append(model)
        original(self, model, *given, **named)

    monkeypatch.setattr(Ablation, "_evaluate", evaluate)
    half, _, kind = bases
    settings = settings_of(half, collection_path, tmp_path / "out", experts=0, learning_rate=None, training_arg={})
    ablate(settings, seeds=1, learning_rates=[3e-3], variants=None)
    assert len(evaluated) > 2
    for model in evaluated:
        assert {parameter.dtype for parameter in model.parameters()} == {kind}
