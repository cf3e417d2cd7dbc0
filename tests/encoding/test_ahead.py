"""What an accelerator is fed with: token lists, windows tokenised ahead, batches as large as its memory allows."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Normalize, Pooling, Router

from st_clp.encoding import ahead, encode, encode_documents, encode_queries
from st_clp.encoding.ahead import LEAST_TOKENS, MOST_TOKENS, TokenBudget, tokenised_ahead, tokens_that_fit
from st_clp.encoding.attention import known_padding, make_mask, use_known_padding
from st_clp.encoding.token_lists import ListPreprocess, ListWindow, TokenLists

TEXTS = [" ".join(["river", "king", "a", "cat"][: 1 + number % 4] * (1 + number % 9)) for number in range(60)]


def lists_of(model: SentenceTransformer, task: str = "document", prompt: str | None = None) -> TokenLists | None:
    def preprocess(texts: list[str]) -> dict[str, Any]:
        return model.preprocess(texts, prompt=prompt, task=task)

    return TokenLists.of(model, preprocess, task, prompt, TEXTS)


def same(found: dict[str, Any], expected: dict[str, Any]) -> bool:
    return set(found) == set(expected) and all(
        torch.equal(found[name], value) if isinstance(value, torch.Tensor) else found[name] == value
        for name, value in expected.items()
    )


@settings(max_examples=50, deadline=None)
@given(
    batches=st.lists(
        st.lists(st.text("ab k\u0301ä\u4e2d \n", max_size=40), min_size=1, max_size=5), min_size=1, max_size=4
    ),
    prompt=st.sampled_from([None, "the king: "]),
    task=st.sampled_from([None, "query"]),
    side=st.sampled_from(["right", "left"]),
)
def test_a_trainings_batches_are_those_of_the_models_own_preprocessing(
    tiny_model_path: Path, batches: list[list[str]], prompt: str | None, task: str | None, side: str
) -> None:
    model = SentenceTransformer(str(tiny_model_path), device="cpu")
    model.max_seq_length = 12
    model.tokenizer.padding_side = side
    model[1].include_prompt = False
    preprocess = ListPreprocess(model)
    for texts in batches:
        assert same(preprocess(texts, prompt=prompt, task=task), model.preprocess(texts, prompt=prompt, task=task))
    assert list(preprocess._lists) == [(prompt, task)]
    assert preprocess._lists[prompt, task] is not None


def test_other_inputs_and_options_of_a_training_are_the_models_own(tiny_model: SentenceTransformer) -> None:
    preprocess = ListPreprocess(tiny_model)
    assert same(preprocess(["a river"] * 2, max_length=2), tiny_model.preprocess(["a river"] * 2, max_length=2))
    pairs = [["a river", "a king"], ["a cat", "a lake"]]
    assert same(preprocess(pairs), tiny_model.preprocess(pairs))
    assert not preprocess._lists


@pytest.fixture
def fed_ahead(monkeypatch: pytest.MonkeyPatch) -> None:
    """Feed this processor as an accelerator."""
    monkeypatch.setattr(encode, "reads_ahead", lambda device: True)


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("prompt", [None, "find: "])
def test_lists_give_the_models_own_features(tiny_model: SentenceTransformer, side: str, prompt: str | None) -> None:
    tiny_model.tokenizer.padding_side = side
    tiny_model.max_seq_length = 12
    lists = lists_of(tiny_model, prompt=prompt)
    assert lists is not None

    @settings(max_examples=40, deadline=None)
    @given(st.lists(st.lists(st.sampled_from(["cat", "river", "x", "日本", ""]), max_size=20), min_size=1, max_size=6))
    def are_equal(words: list[list[str]]) -> None:
        texts = [" ".join(each) for each in words]
        expected = tiny_model.preprocess(texts, prompt=prompt, task="document")
        rows = lists(texts)
        found = lists.features(rows, max(map(len, rows)))
        assert found.keys() == expected.keys()
        for name, value in expected.items():
            assert torch.equal(found[name], value) if isinstance(value, torch.Tensor) else found[name] == value

    are_equal()


def test_a_model_whose_features_say_more_is_left_to_its_own_preprocessing(tiny_model: SentenceTransformer) -> None:
    original = tiny_model.preprocess

    def with_more(texts: list[str], **options: Any) -> dict[str, Any]:
        return {**original(texts, **options), "bbox": torch.zeros(len(texts), 4)}

    def with_types(texts: list[str], **options: Any) -> dict[str, Any]:
        features = original(texts, **options)
        return {**features, "token_type_ids": torch.ones_like(features["input_ids"])}

    assert lists_of(tiny_model) is not None
    for other in (with_more, with_types):
        tiny_model.preprocess = other  # type: ignore[method-assign]
        assert lists_of(tiny_model) is None


@pytest.mark.usefixtures("fed_ahead")
@pytest.mark.parametrize("dtype", ["model", "bfloat16"])
def test_fed_ahead_a_model_gives_its_own_embeddings(tiny_model: SentenceTransformer, dtype: Any) -> None:
    tiny_model.prompts = {"query": "find: ", "document": ""}
    expected = tiny_model.encode_document(TEXTS)
    found = np.concatenate(list(encode_documents(tiny_model, iter(TEXTS), window=16, dtype=dtype)))
    np.testing.assert_allclose(found, expected, atol=1e-5 if dtype == "model" else 0.02)
    queries = encode_queries(tiny_model, TEXTS, dtype=dtype)
    np.testing.assert_allclose(queries, tiny_model.encode_query(TEXTS), atol=1e-5 if dtype == "model" else 0.02)


@pytest.mark.usefixtures("fed_ahead")
def test_each_route_of_a_router_is_fed_with_its_own_tokens(
    make_tiny_model: Callable[..., SentenceTransformer],
) -> None:
    first, second = make_tiny_model(seed=1), make_tiny_model(seed=2)
    second.max_seq_length = 7
    router = Router.for_query_document([first[0]], [second[0]])
    model = SentenceTransformer(modules=[router, Pooling(32, "mean"), Normalize()], device="cpu")
    assert lists_of(model, "query") is not None
    found = np.concatenate(list(encode_documents(model, TEXTS, dtype="model")))
    np.testing.assert_allclose(found, model.encode_document(TEXTS), atol=1e-5)
    np.testing.assert_allclose(encode_queries(model, TEXTS, dtype="model"), model.encode_query(TEXTS), atol=1e-5)


@pytest.mark.usefixtures("fed_ahead")
def test_short_texts_fill_a_batch_across_a_whole_window(
    tiny_model: SentenceTransformer, monkeypatch: pytest.MonkeyPatch
) -> None:
    original, shapes = tiny_model.forward, []

    def forward(features: dict[str, Any], **options: Any) -> dict[str, Any]:
        shapes.append(tuple(features["input_ids"].shape))
        return original(features, **options)

    monkeypatch.setattr(tiny_model, "forward", forward)
    for name in ("CPU_WINDOW", "CPU_TOKENS"):
        monkeypatch.setattr(encode, name, 16_384)
    encode_queries(tiny_model, ["cat"] * 3000, dtype="model")
    assert shapes == [(3000, 3)]


@settings(max_examples=60, deadline=None)
@given(
    lengths=st.lists(st.integers(0, 30), min_size=1, max_size=50),
    tokens=st.integers(1, 200),
    batch_size=st.none() | st.integers(1, 9),
)
def test_batches_of_a_window_hold_each_text_once_and_no_more_tokens_than_asked(
    lengths: list[int], tokens: int, batch_size: int | None
) -> None:
    tokenizer = SimpleNamespace(pad_token_id=0, padding_side="right")
    template = {"input_ids": torch.zeros(1, 1), "attention_mask": torch.zeros(1, 1)}
    rows = [np.arange(1, length + 1) for length in lengths]
    window = ListWindow(rows, TokenLists(tokenizer, "", None, template))
    position, seen = 0, []
    while position < len(window):
        batch = window.batch(position, tokens, batch_size)
        assert batch.tokens == batch.features["input_ids"].numel()
        assert batch.tokens <= tokens or len(batch) == 1
        assert batch_size is None or len(batch) <= batch_size
        assert batch.padded == (not bool(batch.features["attention_mask"].all()))
        for place, ids, mask in zip(
            batch.rows, batch.features["input_ids"], batch.features["attention_mask"], strict=True
        ):
            assert ids[mask.bool()].tolist() == rows[place].tolist()
        seen += batch.rows.tolist()
        position += len(batch)
    assert sorted(seen) == list(range(len(lengths)))


def test_an_error_in_the_texts_comes_after_the_windows_before_it(tiny_model: SentenceTransformer) -> None:
    def windows() -> Iterator[list[str]]:
        yield ["cat"]
        yield []
        yield ["king", "a"]
        raise OSError("the file has ended early")

    found = tokenised_ahead(windows(), lambda texts: lists_of(tiny_model), tiny_model.preprocess)
    assert [0 if window is None else len(window) for window in itertools.islice(found, 3)] == [1, 0, 2]
    with pytest.raises(OSError, match="ended early"):
        next(found)


def test_a_window_is_put_together_in_order_from_many_threads(
    tiny_model: SentenceTransformer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ahead, "PIECE", 3)
    lists = lists_of(tiny_model)
    assert lists is not None
    (window,) = tokenised_ahead(iter([TEXTS]), lambda texts: lists, tiny_model.preprocess)
    assert isinstance(window, ListWindow)
    assert window.lengths.tolist() == [len(row) for row in lists(TEXTS)]


@given(st.integers(1, 1 << 40), st.integers(1, 1 << 40), st.integers(1, 1 << 20))
def test_a_batch_takes_its_share_of_the_free_memory(free: int, taken: int, tokens: int) -> None:
    found = tokens_that_fit(free, taken, tokens)
    assert LEAST_TOKENS <= found <= MOST_TOKENS
    if LEAST_TOKENS < found < MOST_TOKENS:
        assert 100 * found * taken <= ahead.SHARE * free * tokens < 100 * (found + 1) * taken


def test_the_first_batches_say_how_large_the_others_are(monkeypatch: pytest.MonkeyPatch) -> None:
    gigabyte = 1 << 30
    card = {
        "memory_allocated": lambda device: 2 * gigabyte,
        "max_memory_allocated": lambda device: 6 * gigabyte,
        "memory_reserved": lambda device: 7 * gigabyte,
        "mem_get_info": lambda device: (9 * gigabyte, 80 * gigabyte),
    }
    for name, answer in card.items():
        monkeypatch.setattr(torch.cuda, name, answer)
    budget = TokenBudget(torch.device("cuda"))
    budget.learn(100, budget.allocated())  # too few to tell
    assert budget.tokens == LEAST_TOKENS
    budget.learn(32_768, budget.allocated())  # 4 GiB for these, 14 GiB free: 70 % of which is 2.45 times as many
    assert budget.tokens == int(0.7 * 14 / 4 * 32_768)
    budget.shrink(budget.tokens)
    halved = budget.tokens
    budget.learn(32_768, 0)
    assert budget.tokens == halved == int(0.7 * 14 / 4 * 32_768) // 2
    assert TokenBudget(torch.device("cpu")).allocated() == 0


def test_who_puts_a_batch_together_says_whether_it_is_padded(tiny_model_path: Path) -> None:
    model = SentenceTransformer(str(tiny_model_path), device="cpu")
    expected = model.encode_document(TEXTS)
    alike = model.encode_document(["a cat", "the king"])
    assert use_known_padding(model[0].model)
    np.testing.assert_allclose(model.encode_document(TEXTS), expected, atol=1e-6)
    with known_padding(False):
        np.testing.assert_allclose(model.encode_document(["a cat", "the king"]), alike, atol=1e-6)
        assert make_mask(attention_mask=torch.ones(2, 3), mask_function=_bidirectional()) is None
    mask = make_mask(attention_mask=torch.tensor([[1, 1, 0]]), mask_function=_bidirectional())
    assert mask is not None
    assert mask.tolist() == [[[[True, True, False]]]]


def _bidirectional() -> Any:
    from transformers.masking_utils import bidirectional_mask_function

    return bidirectional_mask_function


def test_attention_that_is_not_pytorchs_own_is_left_alone(tiny_model: SentenceTransformer) -> None:
    tiny_model[0].model.set_attn_implementation("eager")
    assert not use_known_padding(tiny_model[0].model)
    assert tiny_model[0].model.config._attn_implementation == "eager"
