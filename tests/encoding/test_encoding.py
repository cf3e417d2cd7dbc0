"""Encoding in a stream, and the fingerprint."""

from __future__ import annotations

import copy
import logging
import os
import platform
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Dense, Pooling, Router, Transformer
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.hooks import RemovableHandle
from transformers import Qwen3Config, Qwen3Model

from st_clp import upcycle
from st_clp.encoding import (
    attention,
    encode,
    encode_documents,
    encode_queries,
    model_fingerprint,
    packing,
    working_model,
)

TEXTS = ["a big river", "the old lake of the north", "fire", "who was king?", "one two three four five six", "bird"]


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    order=st.permutations(range(12)),
    window=st.integers(1, 13),
    batch_size=st.none() | st.integers(1, 5),
    ahead=st.booleans(),
)
def test_a_stream_gives_the_models_own_embeddings_in_order(
    tiny_model: SentenceTransformer, order: list[int], window: int, batch_size: int | None, ahead: bool
) -> None:
    texts = [" ".join(TEXTS[: 1 + i % 6]) + f" {i}" for i in order]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(encode, "reads_ahead", lambda device: ahead)
        chunks = list(encode_documents(tiny_model, iter(texts), batch_size=batch_size, window=window, dtype="model"))
    assert [len(chunk) for chunk in chunks[:-1]] == [window] * (len(chunks) - 1)
    np.testing.assert_allclose(np.concatenate(chunks), tiny_model.encode_document(texts), atol=1e-5)


def test_prompts_are_used(tiny_model: SentenceTransformer) -> None:
    tiny_model.prompts = {"query": "who was ", "document": "the book of "}
    np.testing.assert_allclose(
        encode_queries(tiny_model, ["king"], dtype="model"),
        tiny_model.encode(["who was king"], show_progress_bar=False),
        atol=1e-6,
    )
    np.testing.assert_allclose(
        next(encode_documents(tiny_model, ["king"], dtype="model")), tiny_model.encode(["the book of king"]), atol=1e-6
    )


def test_no_queries_give_an_empty_array(tiny_model: SentenceTransformer) -> None:
    assert encode_queries(tiny_model, []).shape == (0, 32)


def test_fingerprint_changes_with_everything_an_embedding_depends_on(
    tiny_model: SentenceTransformer, make_tiny_model: Callable[..., SentenceTransformer]
) -> None:
    first = model_fingerprint(tiny_model)
    tiny_model.encode(TEXTS)  # using the tokenizer must not change it
    assert model_fingerprint(tiny_model) == first
    seen = {first, model_fingerprint(make_tiny_model(seed=1))}
    # The same weights under other settings give other embeddings.
    tiny_model[0].model.config.num_attention_heads = 2
    seen.add(model_fingerprint(tiny_model))
    tiny_model[0].model.config.num_attention_heads = 4
    tiny_model[1].pooling_mode = "cls"
    seen.add(model_fingerprint(tiny_model))
    tiny_model.max_seq_length = 32
    seen.add(model_fingerprint(tiny_model))
    tiny_model.prompts = {"query": "x"}
    seen.add(model_fingerprint(tiny_model))
    tiny_model.truncate_dim = 16
    seen.add(model_fingerprint(tiny_model))
    with torch.no_grad():
        next(tiny_model.parameters())[0, 0] += 1
    seen.add(model_fingerprint(tiny_model))
    tiny_model.bfloat16()
    seen.add(model_fingerprint(tiny_model))
    assert len(seen) == 9


def cosines(found: np.ndarray, expected: np.ndarray) -> np.ndarray:
    lengths = np.linalg.norm(found, axis=1) * np.linalg.norm(expected, axis=1)
    return (found * expected).sum(axis=1) / lengths


def tiny_decoder(folder: Path, tokenized_by: SentenceTransformer) -> SentenceTransformer:
    """A decoder that is padded on the left and pooled by its last token, as the large embedding models are."""
    torch.manual_seed(0)
    tokenizer = tokenized_by.tokenizer
    config = Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
    )
    Qwen3Model(config).save_pretrained(folder)
    tokenizer.padding_side = "left"
    tokenizer.save_pretrained(folder)
    transformer = Transformer(str(folder), max_seq_length=64)
    pooling = Pooling(transformer.get_embedding_dimension(), "lasttoken")
    return SentenceTransformer(modules=[transformer, pooling], device="cpu")


LONG = [" ".join(TEXTS[: 1 + i % 6]) + f" {i}" for i in range(40)]


@pytest.mark.parametrize("dtype", ["model", "bfloat16", "auto"])
@pytest.mark.parametrize("kind", ["plain", "left padding", "mixture of experts", "dense head", "truncated", "router"])
def test_every_pipeline_gives_the_models_own_embeddings(
    make_tiny_model: Callable[..., SentenceTransformer], tmp_path: Path, kind: str, dtype: str
) -> None:
    model = make_tiny_model()
    if kind == "left padding":
        model = tiny_decoder(tmp_path / "decoder", model)
    if kind == "mixture of experts":
        upcycle(model, num_experts=2)
    if kind == "dense head":
        model = SentenceTransformer(modules=[*list(model)[:2], Dense(32, 8)], device="cpu")
    if kind == "truncated":
        model.truncate_dim = 12
    if kind == "router":
        other = make_tiny_model(seed=1)
        router = Router.for_query_document([*list(model)], [*list(other)])
        model = SentenceTransformer(modules=[router], device="cpu")
    precise = dtype == "model"
    for found, expected in (
        (np.concatenate(list(encode_documents(model, LONG, dtype=dtype))), model.encode_document(LONG)),
        (encode_queries(model, LONG, dtype=dtype), model.encode_query(LONG)),
    ):
        assert found.shape == expected.shape
        assert found.dtype == np.float32
        assert cosines(found, expected).min() > (0.9999 if precise else 0.999)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}  # the model is as it was


def test_a_hook_that_came_with_a_model_from_another_process_is_called(
    tiny_model: SentenceTransformer, monkeypatch: pytest.MonkeyPatch
) -> None:
    called = []
    monkeypatch.setattr(RemovableHandle, "next_id", 0)
    tiny_model[0].register_forward_hook(lambda *arguments: called.append(1))
    monkeypatch.setattr(RemovableHandle, "next_id", 0)  # as it is in a process where nobody has registered any
    encode_queries(tiny_model, ["a river"], dtype="bfloat16")
    assert called


def test_bfloat16_really_computes_in_bfloat16(tiny_model: SentenceTransformer) -> None:
    found = encode_queries(tiny_model, LONG, dtype="bfloat16")
    assert np.abs(found - tiny_model.encode_query(LONG)).max() > 1e-5


def test_a_training_model_is_not_copied_with_its_trainer(tiny_model: SentenceTransformer) -> None:
    class Trainer:
        def __deepcopy__(self, memo: object) -> None:
            raise AssertionError("the trainer and its data were copied")

    tiny_model.model_card_data.trainer = Trainer()
    encode_queries(tiny_model, ["fire"], dtype="bfloat16")


class OwnEncoder(SentenceTransformer):
    """A model that encodes in its own way."""

    def encode_document(self, inputs: list[str], **options: object) -> np.ndarray:
        return 2 * np.asarray(super().encode_document(inputs, **options))


def test_a_model_with_its_own_encode_is_asked_itself(tiny_model_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    model = OwnEncoder(str(tiny_model_path), device="cpu")
    with caplog.at_level(logging.WARNING, logger="st_clp"):
        found = np.concatenate(list(encode_documents(model, LONG, window=7, dtype="bfloat16")))
    np.testing.assert_allclose(found, model.encode_document(LONG), atol=1e-5)
    assert "encodes by its own encode method" in caplog.text


def test_running_out_of_memory_shrinks_the_batches(
    tiny_model: SentenceTransformer, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    original, sizes = tiny_model.forward, []

    def forward(features: dict[str, torch.Tensor], **options: object) -> dict[str, torch.Tensor]:
        if features["input_ids"].numel() > 100:
            raise torch.OutOfMemoryError("out of memory")
        sizes.append(features["input_ids"].numel())
        return original(features, **options)

    expected = tiny_model.encode_document(LONG)
    monkeypatch.setattr(tiny_model, "forward", forward)
    with caplog.at_level(logging.WARNING, logger="st_clp"):
        found = np.concatenate(list(encode_documents(tiny_model, LONG, dtype="model")))
    np.testing.assert_allclose(found, expected, atol=1e-5)
    assert max(sizes) <= 100
    assert "going on with batches of" in caplog.text
    # A single text that does not fit cannot be helped.
    tiny_model.max_seq_length = 512
    with pytest.raises(torch.OutOfMemoryError):
        next(encode_documents(tiny_model, ["a " * 200]))


def test_running_out_of_memory_in_a_models_own_encode_shrinks_the_batches_too(
    tiny_model_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = OwnEncoder(str(tiny_model_path), device="cpu")
    expected, original, sizes = model.encode_document(LONG), model.forward, []

    def forward(features: dict[str, torch.Tensor], **options: object) -> dict[str, torch.Tensor]:
        if len(features["input_ids"]) > 5:
            raise torch.OutOfMemoryError("out of memory")
        sizes.append(len(features["input_ids"]))
        return original(features, **options)

    monkeypatch.setattr(model, "forward", forward)
    found = np.concatenate(list(encode_documents(model, LONG, window=20, dtype="model")))
    np.testing.assert_allclose(found, expected, atol=1e-5)
    assert max(sizes) == 4


def test_batches_are_filled_by_tokens(tiny_model: SentenceTransformer, monkeypatch: pytest.MonkeyPatch) -> None:
    original, shapes = tiny_model.forward, []

    def forward(features: dict[str, torch.Tensor], **options: object) -> dict[str, torch.Tensor]:
        shapes.append(tuple(features["input_ids"].shape))
        assert bool(features["attention_mask"][:, 0].all())
        return original(features, **options)

    monkeypatch.setattr(tiny_model, "forward", forward)
    monkeypatch.setattr(encode, "CPU_TOKENS", 64)
    next(encode_documents(tiny_model, LONG))
    assert sum(rows for rows, _ in shapes) == len(LONG)
    assert all(rows * width <= 64 for rows, width in shapes)
    assert max(rows for rows, _ in shapes) > min(rows for rows, _ in shapes)


def test_misuse_is_refused(tiny_model: SentenceTransformer) -> None:
    with pytest.raises(ValueError, match="dtype must be one of auto, model, bfloat16, got 'fp8'"):
        encode_queries(tiny_model, ["fire"], dtype="fp8")
    with pytest.raises(ValueError, match="batch_size must be at least 1, got 0"):
        encode_queries(tiny_model, ["fire"], batch_size=0)
    with pytest.raises(ValueError, match="window must be at least 1, got 0"):
        encode_documents(tiny_model, ["fire"], window=0)
    for one in ("a single text", b"bytes"):
        with pytest.raises(TypeError, match="texts must be several texts"):
            encode_queries(tiny_model, one)


@pytest.mark.parametrize("ahead", [False, True])
@pytest.mark.parametrize("wrong", [None, 3, ["fire"], float("nan")])
def test_what_is_no_text_is_refused_after_the_windows_before_it(
    tiny_model: SentenceTransformer, wrong: object, ahead: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(encode, "reads_ahead", lambda device: ahead)
    windows = encode_documents(tiny_model, [*["fire"] * 5, wrong], window=2)
    assert [len(next(windows)) for _ in range(2)] == [2, 2]
    with pytest.raises(TypeError, match=f"text 5 is no text but of type {type(wrong).__name__}"):
        next(windows)


@settings(max_examples=25, deadline=None)
@given(
    batch=st.integers(1, 3),
    queries=st.integers(1, 9),
    keys=st.integers(1, 9),
    kind=st.sampled_from(["none", "keys", "square"]),
    width=st.sampled_from([4, 8]),
    together=st.sampled_from([1, 40, packing.SCORES]),
    seed=st.integers(0, 100),
)
def test_attention_by_products_is_attention(
    batch: int, queries: int, keys: int, kind: str, width: int, together: int, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    query, key, value = (torch.randn(batch, 2, n, width, generator=generator) for n in (queries, keys, keys))
    mask = None
    if kind != "none":
        mask = torch.rand(batch, 1, 1 if kind == "keys" else queries, keys, generator=generator) < 0.6
        mask[..., 0] = True
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(packing, "SCORES", together)
        found, _ = packing.attend(torch.nn.Identity(), query, key, value, mask, scaling=0.3)
    expected = torch.nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=0.3)
    torch.testing.assert_close(found, expected.transpose(1, 2), atol=1e-5, rtol=1e-5)


@settings(max_examples=40, deadline=None)
@given(
    keys=st.integers(1, 9),
    size=st.sampled_from([0.1, 1.0, 30.0, 300.0, 3000.0]),
    shift=st.sampled_from([0.0, -400.0, 400.0]),
    masked=st.booleans(),
    seed=st.integers(0, 99),
)
def test_scores_of_any_size_are_attended_to_rightly(
    keys: int, size: float, shift: float, masked: bool, seed: int
) -> None:
    """Powers that are too great or too small for their numbers are left to softmax."""
    torch.manual_seed(seed)
    query, key, value = (torch.randn(2, 3, keys, 8) for _ in range(3))
    query, value = query * size, value * 50
    query[..., 0], key[..., 0] = shift, 1.0  # moves all scores of a row alike
    mask = torch.ones(2, 1, 1, keys, dtype=torch.bool)
    mask[0, ..., 1:] = not masked
    query, key, value = (states.bfloat16().float() for states in (query, key, value))
    expected = torch.nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=0.5)
    found, _ = packing.attend(torch.nn.Identity(), query, key, value, mask, scaling=0.5)
    torch.testing.assert_close(found, expected.transpose(1, 2), atol=2e-3, rtol=1e-3)
    narrow, _ = packing.attend(
        torch.nn.Identity(), query.bfloat16(), key.bfloat16(), value.bfloat16(), mask, scaling=0.5
    )
    assert narrow.isfinite().all()
    if size * 4 + abs(shift) < 8:  # where bfloat16 tells scores apart
        torch.testing.assert_close(narrow.float(), expected.transpose(1, 2), atol=3.0, rtol=0.05)


@pytest.mark.parametrize(
    ("score", "value", "by_softmax"),
    [(0.0, 1, False), (150.0, 1, False), (300.0, 1, True), (150.0, 1e30, True), (-180.0, 1, True), (-400.0, 1, True)],
)
def test_softmax_is_only_taken_where_it_must_be(
    monkeypatch: pytest.MonkeyPatch, score: float, value: float, by_softmax: bool
) -> None:
    """It takes as long as both products."""
    taken: list[int] = []
    softmax = torch.softmax
    monkeypatch.setattr(torch, "softmax", lambda *states, **options: taken.append(1) or softmax(*states, **options))
    query, key = torch.full((1, 1, 4, 1), score).bfloat16(), torch.ones(1, 1, 6, 1).bfloat16()
    values = torch.arange(6.0).view(1, 1, 6, 1).bfloat16() * value
    found, _ = packing.attend(torch.nn.Identity(), query, key, values, None, scaling=0.5)
    torch.testing.assert_close(found.float(), torch.full((1, 4, 1, 1), 2.5 * value), rtol=0.01, atol=0)
    assert bool(taken) == by_softmax


class Largest(TorchDispatchMode):
    """Remembers how many numbers the largest tensor had that an operation made."""

    numbers = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        if isinstance(made, torch.Tensor):
            self.numbers = max(self.numbers, made.untyped_storage().nbytes() // made.element_size())
        return made


@pytest.mark.parametrize("square", [False, True])
def test_attention_to_a_long_text_holds_the_scores_of_a_few_heads(square: bool) -> None:
    heads, length = 12, 1500
    states = torch.randn(1, heads, length, 4).bfloat16()
    kept = torch.ones(1, 1, length if square else 1, length, dtype=torch.bool)
    with Largest() as largest:
        packing.attend(torch.nn.Identity(), states, states, states, kept)
    assert length**2 <= largest.numbers <= packing.SCORES < heads * length**2


def test_batches_are_smaller_where_the_states_are_wider(
    tiny_model: SentenceTransformer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a processor a batch's widest states stay within a block, in the precision that is computed in."""
    widest = tiny_model[0].model.config.intermediate_size
    sizes: list[int] = []
    forward = working_model.WorkingModel.forward

    def counting(working: working_model.WorkingModel, features: dict[str, torch.Tensor], **options: bool) -> object:
        sizes.append(features["input_ids"].numel())
        return forward(working, features, **options)

    monkeypatch.setattr(working_model.WorkingModel, "forward", counting)
    monkeypatch.setattr(encode, "CPU_BLOCK", 40 * widest * 4)
    largest = {}
    for dtype in ("model", "bfloat16"):
        sizes.clear()
        list(encode_documents(tiny_model, ["the old lake of the north"] * 64, dtype=dtype))
        largest[dtype] = max(sizes)
    assert 20 < largest["model"] <= 40 < largest["bfloat16"] <= 80


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc is told to keep what is freed")
def test_what_a_batch_frees_stays_for_the_next(tiny_model_path: Path) -> None:
    """New pages cost a fault each; where all of these blocks went back, there would be 10,000 new ones every time."""
    script = f"""
import ctypes, resource
from sentence_transformers import SentenceTransformer
from st_clp.encoding import encode_queries

libc = ctypes.CDLL(None)
libc.malloc.restype, libc.memset.argtypes, libc.free.argtypes = (
    ctypes.c_void_p, (ctypes.c_void_p, ctypes.c_int, ctypes.c_size_t), (ctypes.c_void_p,)
)

def use(megabytes, times=4):
    for _ in range(times):
        blocks = [libc.malloc(megabytes << 20) for _ in range(times)]
        for block in blocks:
            libc.memset(block, 1, megabytes << 20)
        for block in blocks:
            libc.free(block)

encode_queries(SentenceTransformer({str(tiny_model_path)!r}, device="cpu"), ["a river"])
use(10)
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
use(10)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("MALLOC_", "GLIBC_"))}
    run = subprocess.run([sys.executable, "-c", script], check=True, capture_output=True, text=True, env=environment)
    assert int(run.stdout) < 5000


SIZES = {"vocab_size": 99, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
ARCHITECTURES: dict[str, dict[str, int | bool]] = {
    "Bert": {},
    "XLMRoberta": {},
    "Electra": {},
    "Albert": {"embedding_size": 16},
    "DistilBert": {"dim": 32, "hidden_dim": 64, "n_layers": 2, "n_heads": 4},
    # Every other layer attends to a neighbourhood alone.
    "ModernBert": {"global_attn_every_n_layers": 2, "local_attention": 6, "cls_token_id": 2, "sep_token_id": 3},
    # Decoders: causal, with a window, with fewer keys than queries.
    "Llama": {},
    "Mistral": {"num_key_value_heads": 4, "sliding_window": 5},
    "Qwen3": {"num_key_value_heads": 2, "head_dim": 8},
    # Those whose attention cannot be chosen are left as they are.
    "MPNet": {},
}


@pytest.mark.parametrize("use", [packing.use_batched_products, attention.use_known_padding])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_another_attention_gives_every_architecture_its_own_embeddings(name: str, use: Any) -> None:
    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(
        **SIZES, **ARCHITECTURES[name], max_position_embeddings=64, pad_token_id=1, bos_token_id=2, eos_token_id=3
    )
    model = getattr(transformers, f"{name}Model")(config).eval()
    changed = copy.deepcopy(model)
    assert use(changed) == (name != "MPNet")
    for mask in (
        [[1] * 12, [1] * 7 + [0] * 5, [1] + [0] * 11],
        [[1] * 12, [0] * 5 + [1] * 7, [0] * 11 + [1]],
        [[1] * 12],
    ):
        kept = torch.tensor(mask)
        ids = torch.where(kept.bool(), torch.randint(4, 99, kept.shape), 1)
        with torch.inference_mode(), attention.known_padding(not bool(kept.all())):
            found, expected = (m(input_ids=ids, attention_mask=kept).last_hidden_state for m in (changed, model))
        torch.testing.assert_close(found[kept.bool()], expected[kept.bool()], atol=1e-5, rtol=1e-5)
    assert model.config._attn_implementation not in (packing.NAME, attention.NAME)  # the original is as it was


def test_the_bfloat16_copy_attends_by_products_and_the_model_does_not(
    tiny_model: SentenceTransformer, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[int] = []
    original = packing.attend

    def counting(*arguments: object, **options: object) -> object:
        seen.append(1)
        return original(*arguments, **options)

    monkeypatch.setattr(packing, "attend", counting)
    monkeypatch.setattr(working_model, "_capabilities", lambda: {"avx512_bf16": True})
    encode_queries(tiny_model, LONG, dtype="auto")
    assert seen
    seen.clear()
    encode_queries(tiny_model, LONG, dtype="model")
    tiny_model.encode_query(LONG)
    monkeypatch.setattr(working_model, "_capabilities", lambda: {"amx_bf16": True})
    encode_queries(tiny_model, LONG, dtype="auto")
    assert not seen
