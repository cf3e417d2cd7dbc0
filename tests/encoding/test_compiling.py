"""Encoding with a compiled transformer: the same embeddings, and the same bytes whatever was encoded before."""

from __future__ import annotations

import copy
import functools
import logging
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from sentence_transformers import SentenceTransformer
from torch._dynamo.utils import counters

from st_clp import Collection, upcycle
from st_clp.encoding import EmbeddingStore, attention, building, compiling, encode_documents, working_model

TEXTS = ["a big river", "the old lake of the north", "fire", "who was king?", "one two three four five six", "bird"]
LONG = [" ".join(TEXTS[: 1 + i % 6]) + f" {i}" for i in range(41)]

needs_a_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="there is no C++ compiler")

# MODEL FILE: what comes of a window in a process that encoded nothing before it.
ALONE = """
import sys
import numpy as np
from sentence_transformers import SentenceTransformer
from st_clp.encoding import encode_documents
from test_compiling import LONG
model = SentenceTransformer(sys.argv[1], device="cpu")
np.save(sys.argv[2], next(encode_documents(model, LONG[20:], window=20, dtype="bfloat16", compile=True)))
"""


def encoded(model: SentenceTransformer, texts: list[str], **options: object) -> np.ndarray:
    return np.concatenate(list(encode_documents(model, texts, window=20, **options)))


@needs_a_compiler
def test_compiled_it_gives_the_models_own_embeddings_and_the_same_bytes_in_every_process(
    tiny_model: SentenceTransformer, tiny_model_path: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING, logger="st_clp"):
        found = encoded(tiny_model, LONG, dtype="bfloat16", compile=True)
    assert "compiled" not in caplog.text
    expected = tiny_model.encode_document(LONG)
    assert (found * expected).sum(axis=1).min() > 0.999
    # Kernels of its own, or nothing was compiled: they round otherwise.
    assert (found != encoded(tiny_model, LONG, dtype="bfloat16")).any()
    # The last window is a text by itself, which is not compiled; the one before it follows another or comes first.
    command = [sys.executable, "-c", ALONE, str(tiny_model_path), str(tmp_path / "alone.npy")]
    subprocess.run(command, check=True, cwd=Path(__file__).parent)
    np.testing.assert_array_equal(np.load(tmp_path / "alone.npy"), found[20:40])


SIZES = {"vocab_size": 99, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
ARCHITECTURES: dict[str, dict[str, int]] = {
    "Bert": {},
    "ModernBert": {"global_attn_every_n_layers": 2, "local_attention": 6, "cls_token_id": 2, "sep_token_id": 3},
    "MPNet": {},
    "Qwen3": {"num_key_value_heads": 2, "head_dim": 8},
}


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_batches_of_every_shape_are_served_by_one_graph(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Were there a graph for some shapes, what a batch meets would depend on those before it."""
    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(
        **SIZES, **ARCHITECTURES[name], max_position_embeddings=64, pad_token_id=1, bos_token_id=2, eos_token_id=3
    )
    model = getattr(transformers, f"{name}Model")(config).eval()
    expected = copy.deepcopy(model)
    attention.use_batched_products(model)
    # What differs by shape is decided before kernels are made, which takes the time.
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))
    forward = compiling.by_shape(model.forward)
    counters.clear()
    for texts, width in ((8, 50), (4, 30), (16, 17), (2, 2), (1, 20), (3, 1)):
        for padding in (0, width - 1):
            kept = torch.ones(texts, width, dtype=torch.long)
            kept[-1, width - padding :] = 0
            ids = torch.where(kept.bool(), torch.randint(4, 99, kept.shape), 1)
            with torch.inference_mode():
                found, right = (f(input_ids=ids, attention_mask=kept).last_hidden_state for f in (forward, expected))
            torch.testing.assert_close(found[kept.bool()], right[kept.bool()], atol=1e-5, rtol=1e-5)
    assert counters["stats"]["unique_graphs"] == 1


def test_what_cannot_be_compiled_encodes_without_and_says_so(
    tiny_model: SentenceTransformer, caplog: pytest.LogCaptureFixture
) -> None:
    upcycle(tiny_model, num_experts=2)  # which expert has how many tokens is known only when it runs
    with caplog.at_level(logging.WARNING, logger="st_clp"):
        found = encoded(tiny_model, LONG, compile=True)
    assert "this model cannot be compiled here, so it encodes without (" in caplog.text
    np.testing.assert_array_equal(found, encoded(tiny_model, LONG))
    assert "forward" not in vars(tiny_model[0].model)  # the model is as it was


def test_a_missing_compiler_costs_no_embedding(
    tiny_model: SentenceTransformer, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch._inductor.config as inductor

    monkeypatch.setattr(inductor.cpp, "cxx", ("no-such-compiler",))
    torch.compiler.reset()
    with caplog.at_level(logging.WARNING, logger="st_clp"):
        found = encoded(tiny_model, LONG, compile=True)
    assert "this model cannot be compiled here" in caplog.text
    np.testing.assert_array_equal(found, encoded(tiny_model, LONG))


def test_a_store_compiles_after_so_many_texts_of_the_corpus(
    tiny_model: SentenceTransformer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[str] = []

    def compiling_at(model: SentenceTransformer, run: Callable[..., object]) -> bool:
        seen.append("compiled")
        return False

    original = tiny_model.preprocess

    def preprocess(texts: list[str], **options: object) -> object:
        seen.append(f"{len(texts)} texts")
        if len(seen) == stop_at:
            raise KeyboardInterrupt
        return original(texts, **options)

    def build(number: int, name: str, **options: object) -> list[str]:
        seen.clear()
        documents = {f"d{i}": f"a river and {i}" for i in range(number)}
        collection = Collection.from_dict(documents, {"q": "fire"}, {"q": {"d0": 1}}, name="c")
        EmbeddingStore.build(tiny_model, collection, tmp_path / name, show_progress_bar=False, **options)
        return list(seen)

    stop_at = 0
    monkeypatch.setattr(tiny_model, "preprocess", preprocess)
    monkeypatch.setattr(working_model, "compile_transformers", compiling_at)
    monkeypatch.setattr(building, "COMPILE_AFTER", 20)
    monkeypatch.setattr(building, "window_size", lambda model: 10)
    window = ["10 texts"]
    assert build(20, "few") == window * 2
    assert build(25, "many") == [*window * 2, "5 texts", "compiled"]
    assert build(25, "many") == []
    assert build(45, "many") == ["5 texts", *window, "5 texts"]  # brought up to date
    assert build(45, "never", compile=False) == [*window * 4, "5 texts"]
    assert build(15, "at once", compile=True) == ["10 texts", "compiled", "5 texts"]
    # What was stopped goes on as it would have: compiled from the same text on, and at once where that is behind.
    for stop_at, rest in ((2, [*window * 2, "compiled", *window]), (5, [*window, "compiled"])):
        with pytest.raises(KeyboardInterrupt):
            build(40, f"stopped {stop_at}")
        assert seen.count("compiled") == (stop_at == 5)
        done, stop_at = stop_at, 0
        assert build(40, f"stopped {done}") == rest
