"""A tiny real cross-encoder, and the small training that the tests of refreshed negatives share."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
import torch
from sentence_transformers import CrossEncoder, SentenceTransformer
from transformers import BertConfig, BertForSequenceClassification


@pytest.fixture(scope="session")
def refresh_run() -> ModuleType:
    """The module ``refresh_run.py``, which is a script of its own too."""
    path = Path(__file__).parent / "refresh_run.py"
    spec = importlib.util.spec_from_file_location("refresh_run", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["refresh_run"] = module
    spec.loader.exec_module(module)
    return module


def build_cross_encoder(model: SentenceTransformer, folder: Path, num_labels: int = 1) -> CrossEncoder:
    torch.manual_seed(0)
    tokenizer = model.tokenizer
    config = BertConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=32,
        num_labels=num_labels,
        initializer_range=0.5,  # its scores differ by more than the last digit
    )
    BertForSequenceClassification(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return CrossEncoder(str(folder), device="cpu")


@pytest.fixture
def make_cross_encoder(tiny_model: SentenceTransformer, tmp_path: Path) -> Callable[..., CrossEncoder]:
    """Build one with the tiny model's tokenizer: ``make_cross_encoder(num_labels=2)``."""
    return lambda num_labels=1: build_cross_encoder(tiny_model, tmp_path / f"cross {num_labels}", num_labels)


@pytest.fixture
def cross_encoder(make_cross_encoder: Callable[..., CrossEncoder]) -> CrossEncoder:
    return make_cross_encoder()
