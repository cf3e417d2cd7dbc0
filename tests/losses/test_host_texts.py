"""What the host knows of a batch: a step that never waits for the device, and passes planned there as on a CPU."""

from __future__ import annotations

import contextlib
import random
from typing import Any

import pytest
import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.losses import AdaptiveLayerLoss, MatryoshkaLoss

from st_clp import CLPLoss, train_only, upcycle
from st_clp.encoding.attention import masks_unread
from st_clp.losses import passes
from st_clp.losses.host_texts import KEY, HostTexts
from st_clp.moe import grouped
from st_clp.moe.routing import Router

LONG = "the big river of the north is one lake and two mountain in the west of the old stone " * 2
QUERIES = ["which river", "who was king", LONG, "what is bread", "where is the lake", "when was peace"]
DOCUMENTS = ["the river", "the king of war is old", "bread", LONG, "one lake two lake three lake", "bread"]
COLUMNS = [QUERIES, DOCUMENTS, DOCUMENTS[::-1], QUERIES[::-1]]


def told(model: SentenceTransformer, device: str = "cpu", columns: list[list[str]] = COLUMNS) -> list[dict[str, Any]]:
    """The columns on a device, as the Trainer gives them to a loss after plan_on_host."""
    features = [model.preprocess(column) for column in columns]
    texts = [HostTexts.of(column) for column in features]
    assert None not in texts
    return [{**moved(column, device), KEY: known} for column, known in zip(features, texts, strict=True)]


def moved(features: dict[str, Any], device: str) -> dict[str, Any]:
    return {name: value.to(device) if isinstance(value, torch.Tensor) else value for name, value in features.items()}


def passes_of(model: SentenceTransformer) -> list[tuple[int, int]]:
    """A list that gets the shape of every forward pass from now on."""
    shapes: list[tuple[int, int]] = []
    model.register_forward_pre_hook(lambda _, arguments: shapes.append(tuple(arguments[0]["input_ids"].shape)))
    return shapes


@pytest.fixture
def meta(monkeypatch: pytest.MonkeyPatch) -> str:
    """A device whose tensors have shapes alone: whoever reads a value of them fails, as the host would have to wait."""
    for name, instead in {"autocast": contextlib.nullcontext, "is_autocast_enabled": lambda *device: False}.items():
        monkeypatch.setattr(torch, name, lambda *args, made=instead, **kwargs: made())
    monkeypatch.setattr(grouped, "GROUPED_DEVICES", ("meta",))
    return "meta"


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"encode_once": True},
        {"penalty": "contrastive", "margin": 0.1},
        {"in_batch_negatives": False},
        {
            "directions": ("query_to_doc", "query_to_query", "doc_to_query", "doc_to_doc"),
            "hardness_mode": "all_negatives",
        },
    ],
    ids=str,
)
def test_nothing_in_a_step_waits_for_the_device(
    settings: dict[str, Any], meta: str, tiny_model: SentenceTransformer
) -> None:
    model = tiny_model.train()
    columns = told(model, meta)
    model.to(meta)
    with masks_unread(model):
        CLPLoss(model, **settings)(columns).backward()
    assert all(one.grad is not None for one in model[0].model.encoder.parameters())


def test_nothing_in_a_mixture_waits_either(meta: str, tiny_model: SentenceTransformer) -> None:
    model = upcycle(tiny_model, 2).train()
    train_only(model, "moe")
    columns = told(model, meta)
    model.bfloat16().to(meta)
    routers = [module for module in model.modules() if isinstance(module, Router)]
    assert routers
    for router in routers:
        router.balance.calibrated = True  # the first pass of a training has to look whether it is
    with masks_unread(model):
        CLPLoss(model, encode_once=True)(columns).backward()


@pytest.mark.parametrize("missing", ["the texts", "the masks"])
def test_it_would_wait_without_either(missing: str, meta: str, tiny_model: SentenceTransformer) -> None:
    columns = told(tiny_model, meta)
    tiny_model.to(meta)
    if missing == "the texts":
        columns = [{name: value for name, value in column.items() if name != KEY} for column in columns]
    with (
        masks_unread(tiny_model) if missing == "the texts" else contextlib.nullcontext(),
        pytest.raises((RuntimeError, NotImplementedError), match="meta tensor"),
    ):
        CLPLoss(tiny_model, encode_once=True)(columns)


@pytest.mark.gpu
@pytest.mark.parametrize("settings", [{}, {"encode_once": True}], ids=str)
def test_on_a_card_nothing_in_a_step_waits(settings: dict[str, Any], tiny_model: SentenceTransformer) -> None:
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    model = tiny_model.train().to("cuda")
    loss, columns = CLPLoss(model, **settings), told(model, "cuda")
    labels = torch.ones(len(QUERIES), 1, device="cuda")
    with masks_unread(model), torch.autocast("cuda", torch.bfloat16):
        loss(columns, labels).backward()  # the first step allocates and chooses kernels
        torch.cuda.set_sync_debug_mode("error")
        try:
            loss(columns, labels).backward()
        finally:
            torch.cuda.set_sync_debug_mode("default")


def test_passes_are_planned_by_what_they_cost_there(
    meta: str, tiny_model: SentenceTransformer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One pass for queries and documents where passes are dear; otherwise as many as it takes, of rounded widths."""
    columns = told(tiny_model, meta)
    lengths = [int(length) for column in columns for length in column[KEY].lengths]
    tiny_model.to(meta)
    shapes = passes_of(tiny_model)
    for cost, number in ((passes.PassCost(0, 4096), 1), (passes.PassCost(8, multiple=8), 2)):
        monkeypatch.setattr(passes, "ON_GPU", cost)
        shapes.clear()
        with masks_unread(tiny_model):
            CLPLoss(tiny_model)(columns)
        assert len(shapes) == number
        assert sum(rows for rows, _ in shapes) == len(lengths) == 24
        assert max(width for _, width in shapes) == max(lengths)
        assert all(width % cost.multiple == 0 or width == max(lengths) for _, width in shapes)
    shapes.clear()
    with masks_unread(tiny_model):
        CLPLoss(tiny_model)([{name: value for name, value in column.items() if name != KEY} for column in columns])
    assert [rows for rows, _ in shapes] == [12, 12]  # queries, and documents


def gradients(model: SentenceTransformer) -> torch.Tensor:
    return torch.cat([one.grad.flatten() for one in model.parameters() if one.grad is not None])


@pytest.mark.parametrize("cost", [passes.ON_CPU, passes.ON_GPU, passes.PassCost(8, multiple=8)], ids=str)
@pytest.mark.parametrize("settings", [{}, {"encode_once": True, "penalty": "contrastive"}], ids=str)
def test_the_loss_and_its_gradients_do_not_depend_on_the_plan(
    settings: dict[str, Any], cost: Any, tiny_model: SentenceTransformer, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny_model.double()
    found = []
    for planned in (False, True):
        monkeypatch.setattr(passes, "ON_CPU", cost if planned else passes.PassCost(0, 4096))
        columns = told(tiny_model) if planned else [tiny_model.preprocess(column) for column in COLUMNS]
        tiny_model.zero_grad()
        value = CLPLoss(tiny_model, **settings)(columns)
        value.backward()
        found.append((value.detach(), gradients(tiny_model)))
    torch.testing.assert_close(found[1], found[0], rtol=1e-9, atol=1e-10)


def test_columns_with_different_prompts_have_passes_of_their_own(tiny_model: SentenceTransformer) -> None:
    """Pooling may leave the prompt out, by its length, which then belongs to all texts of a pass."""
    tiny_model[1].include_prompt = False
    columns = [[1, 2, 3, 4], [1, 2, 3, 4]]
    texts = [[f"river {number}" for number in numbers] for numbers in columns]
    prompts = ["the query of the king: ", "the text: "]
    features = [tiny_model.preprocess(column, prompt=prompt) for column, prompt in zip(texts, prompts, strict=True)]
    shapes = passes_of(tiny_model)
    value = CLPLoss(tiny_model, queries_per_negative=0)(features)
    assert [rows for rows, _ in shapes] == [4, 4]
    shapes.clear()
    CLPLoss(tiny_model, queries_per_negative=0)([tiny_model.preprocess(column) for column in texts])
    assert [rows for rows, _ in shapes] == [8]
    queries, documents = (
        tiny_model.encode(column, prompt=prompt, convert_to_tensor=True)
        for column, prompt in zip(texts, prompts, strict=True)
    )
    scores = 50 * torch.nn.functional.normalize(queries, dim=1) @ torch.nn.functional.normalize(documents, dim=1).T
    torch.testing.assert_close(value, torch.nn.functional.cross_entropy(scores, torch.arange(4)), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("wrapped", [MatryoshkaLoss, AdaptiveLayerLoss, None])
def test_what_was_told_serves_a_loss_that_is_called_again_with_the_same_columns(
    wrapped: Any, tiny_model: SentenceTransformer
) -> None:
    found = []
    for planned in (False, True):
        loss: Any = CLPLoss(tiny_model, encode_once=True)
        if wrapped is not None:
            loss = wrapped(tiny_model, loss, **({"matryoshka_dims": [32, 16]} if wrapped is MatryoshkaLoss else {}))
        columns = told(tiny_model) if planned else [tiny_model.preprocess(column) for column in COLUMNS]
        for _ in range(2):
            random.seed(0)  # by which AdaptiveLayerLoss draws layers
            found.append(loss(columns, None))
        assert all((KEY in column) is planned for column in columns)
    for value in found[1:]:
        torch.testing.assert_close(value, found[0])


def test_adaptive_layers_of_pairs_with_a_document_twice(tiny_model: SentenceTransformer) -> None:
    found = []
    for once in (False, True):
        loss = AdaptiveLayerLoss(tiny_model, CLPLoss(tiny_model, encode_once=once))
        random.seed(0)
        found.append(loss([tiny_model.preprocess(QUERIES), tiny_model.preprocess(DOCUMENTS)], None))
    torch.testing.assert_close(*found)


def test_what_was_told_of_a_batch_that_was_split_since_is_not_believed(tiny_model: SentenceTransformer) -> None:
    """As DataParallel splits batches: tensors by rows, all else as it is."""
    half = [
        {name: value[:3] if isinstance(value, torch.Tensor) else value for name, value in column.items()}
        for column in told(tiny_model)
    ]
    expected = CLPLoss(tiny_model)([tiny_model.preprocess(column[:3]) for column in COLUMNS])
    torch.testing.assert_close(CLPLoss(tiny_model)(half), expected)
