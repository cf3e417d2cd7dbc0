"""Encoding with a compiled transformer: the same embeddings, and the same bytes whatever was encoded before."""

from __future__ import annotations

import copy
import functools
import logging
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from sentence_transformers import SentenceTransformer
from torch._dynamo.utils import counters

from st_clp import Collection, upcycle
from st_clp.encoding import EmbeddingStore, attention, building, compiling, encode_documents

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
    tiny_model: SentenceTransformer, caplog: pytest.LogCaptureFixture
) -> None:
    import torch._inductor.config as inductor

    torch.compiler.reset()
    with inductor.patch({"cpp.cxx": ("no-such-compiler",)}), caplog.at_level(logging.WARNING, logger="st_clp"):
        found = encoded(tiny_model, LONG, compile=True)
    assert "this model cannot be compiled here" in caplog.text
    np.testing.assert_array_equal(found, encoded(tiny_model, LONG))


@needs_a_compiler
def test_a_compiled_store_that_was_stopped_ends_as_one_that_was_not(
    tiny_model: SentenceTransformer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    documents = {f"d{i}": text for i, text in enumerate(LONG)}
    collection = Collection.from_dict(documents, {"q": "fire"}, {"q": {"d0": 1}}, name="c")
    monkeypatch.setattr(building, "window_size", lambda model: 10)

    def build(name: str, compile: bool) -> np.ndarray:
        store = EmbeddingStore.build(
            tiny_model, collection, tmp_path / name, dtype="bfloat16", compile=compile, show_progress_bar=False
        )
        return np.concatenate(list(store.blocks()))

    undisturbed = build("undisturbed", compile=True)
    preprocess, windows = tiny_model.preprocess, 0

    def stopping(texts: list[str], **options: object) -> object:
        nonlocal windows
        windows += texts[0] in documents.values()
        if windows == 3:
            raise KeyboardInterrupt
        return preprocess(texts, **options)

    with monkeypatch.context() as stopped:
        stopped.setattr(tiny_model, "preprocess", stopping)
        with pytest.raises(KeyboardInterrupt):
            build("stopped", compile=True)
    np.testing.assert_array_equal(build("stopped", compile=True), undisturbed)
    assert (build("plain", compile=False) != undisturbed).any()
