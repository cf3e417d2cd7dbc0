"""The losses inside everything that trains sentence-transformers models, on a tiny real model."""

from __future__ import annotations

import inspect
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset, DatasetDict
from packaging.version import Version
from peft import LoraConfig
from sentence_transformers import (
    InputExample,
    SentenceTransformer,
    SentenceTransformerTrainer,
    SentenceTransformerTrainingArguments,
    __version__,
)
from sentence_transformers.sentence_transformer.losses import (
    AdaptiveLayerLoss,
    MatryoshkaLoss,
    MultipleNegativesRankingLoss,
)
from sentence_transformers.sentence_transformer.modules import Router
from torch import Tensor, nn
from torch.utils.data import DataLoader

from st_clp.losses import CachedCLPLoss, CLPLoss

LOSSES = [CLPLoss, CachedCLPLoss]
NAMES = ["anchor", "positive", "negative", "other_negative", "negative_query", "other_negative_query"]
WEIGHTS = [[1.0, 0.5], [1.0, 1.0], [1.0, 0.0], [0.3, 0.3], [1.0, 1.0]]

Train = Callable[..., Tensor]


def parameters(model: nn.Module) -> Tensor:
    return torch.cat([p.detach().flatten() for p in model.parameters()]).clone()


@pytest.fixture
def rows(columns: list[list[str]]) -> Dataset:
    return Dataset.from_dict(dict(zip(NAMES, columns[:6], strict=True)))


@pytest.fixture
def train(tmp_path: Path) -> Train:
    """Train for three steps of the whole dataset and give the parameters afterwards."""

    def run(model: SentenceTransformer, rows: Any, loss: Any, **arguments: Any) -> Tensor:
        settings = {
            "output_dir": str(tmp_path / "out"),
            "max_steps": 3,
            "per_device_train_batch_size": 5,
            "learning_rate": 1e-3,
            "lr_scheduler_type": "constant",
            "use_cpu": True,
            "report_to": "none",
            "save_strategy": "no",
            "logging_steps": 1,
            "disable_tqdm": True,
            **arguments,
        }
        args = SentenceTransformerTrainingArguments(**settings)
        trainer = SentenceTransformerTrainer(model=model, args=args, train_dataset=rows, loss=loss)
        trainer.train()
        losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
        assert len(losses) == 3
        assert all(torch.tensor(losses).isfinite())
        return parameters(model)

    return run


@pytest.fixture
def fresh(tiny_model_path: Path) -> Callable[[], SentenceTransformer]:
    return lambda: SentenceTransformer(str(tiny_model_path), device="cpu")


@pytest.fixture
def expected(fresh: Callable[[], SentenceTransformer], columns: list[list[str]]) -> Callable[..., Tensor]:
    """The parameters after three steps of a plain torch loop."""

    def run(labels: Tensor | None = None, **settings: Any) -> Tensor:
        model = fresh().train()
        loss = CLPLoss(model, **settings)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.0)
        for _ in range(3):
            optimizer.zero_grad()
            loss([model.preprocess(column) for column in columns[:6]], labels).backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
        return parameters(model)

    return run


def assert_same(trained: Tensor, expected: Tensor, start: Tensor, tolerance: float = 2e-2) -> None:
    """Three steps moved the parameters, and to the same place: Adam's first steps are sensitive to rounding."""
    moved = (expected - start).norm()
    assert moved > 0.05
    assert (trained - expected).norm() < tolerance * moved


@pytest.mark.parametrize("loss_class", LOSSES)
@pytest.mark.parametrize("labelled", [False, True])
@pytest.mark.parametrize("stream", [False, True])
def test_trainer_with_and_without_labels_and_streaming(
    stream: bool, labelled: bool, loss_class: Any, fresh: Any, rows: Dataset, train: Train, expected: Any
) -> None:
    model = fresh()
    start = parameters(model)
    if labelled:
        rows = rows.add_column("label", WEIGHTS)
    data = rows.to_iterable_dataset() if stream else rows
    weights = torch.tensor(WEIGHTS)
    trained = train(model, data, loss_class(model, penalty_weight=0.9))
    assert_same(trained, expected(weights if labelled else None, penalty_weight=0.9), start)
    other = expected(None if labelled else weights, penalty_weight=0.9)
    assert (trained - other).norm() > 0.05 * (trained - start).norm()


@pytest.mark.parametrize("loss_class", LOSSES)
@pytest.mark.parametrize(
    "arguments",
    [
        {"gradient_checkpointing": True},
        {"torch_compile": True, "torch_compile_backend": "eager"},
        {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 5},
    ],
    ids=lambda arguments: next(iter(arguments)),
)
def test_ways_of_training_that_change_nothing(
    arguments: dict[str, Any], loss_class: Any, fresh: Any, rows: Dataset, train: Train, expected: Any
) -> None:
    model = fresh()
    if "gradient_checkpointing" in arguments and Version(__version__) < Version("6.2"):
        # Its own gradient_checkpointing_enable does not know what transformers' Trainer hands it from 5.17 on.
        pytest.skip("sentence-transformers before 6.2: call model.gradient_checkpointing_enable() instead")
    start = parameters(model)
    settings = {"in_batch_negatives": False}  # so that accumulated batches of one are the batch
    assert_same(train(model, rows, loss_class(model, **settings), **arguments), expected(**settings), start)


@pytest.mark.parametrize("loss_class", LOSSES)
def test_bf16_training(loss_class: Any, fresh: Any, rows: Dataset, train: Train, expected: Any) -> None:
    model = fresh()
    start = parameters(model)
    assert_same(train(model, rows, loss_class(model), bf16=True), expected(), start, tolerance=0.6)


@pytest.mark.parametrize("loss_class", LOSSES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_loss_is_no_coarser_than_the_embeddings(
    dtype: torch.dtype, loss_class: Any, tiny_model: SentenceTransformer, columns: list[list[str]]
) -> None:
    features = [tiny_model.preprocess(column) for column in columns[:6]]
    loss = loss_class(tiny_model, penalty="contrastive")
    with torch.autocast("cpu", dtype=dtype):
        value = loss([dict(column) for column in features], None)
        embeddings = [tiny_model(dict(column))["sentence_embedding"].float() for column in features]
        value.backward()
    assert value.dtype == torch.float32
    with torch.autocast("cpu", enabled=False):
        exact = CLPLoss(tiny_model, penalty="contrastive").compute_loss_from_embeddings(embeddings)
    assert value.item() == pytest.approx(exact.item(), rel=2e-2)
    assert all(p.grad is None or p.grad.isfinite().all() for p in tiny_model.parameters())


@pytest.mark.parametrize("loss_class", LOSSES)
def test_lora_trains_the_adapter_alone(loss_class: Any, fresh: Any, rows: Dataset, train: Train) -> None:
    model = fresh()
    model.add_adapter(LoraConfig(r=4, target_modules=["query", "value"], init_lora_weights=True))
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    features = [model.preprocess(rows[name]) for name in NAMES]
    first = loss_class(model)(features, None).item()
    train(model, rows, loss_class(model), max_steps=3, learning_rate=2e-2)
    changed = {name for name, p in model.named_parameters() if not torch.equal(p.detach(), before[name])}
    assert changed
    assert all("lora_" in name for name in changed)
    model.eval()
    assert loss_class(model)([model.preprocess(rows[name]) for name in NAMES], None).item() < first


@pytest.mark.parametrize("loss_class", LOSSES)
def test_router_sends_queries_of_negatives_through_the_query_encoder(
    loss_class: Any, make_tiny_model: Callable[..., SentenceTransformer], rows: Dataset, train: Train
) -> None:
    query_model, document_model = make_tiny_model(seed=1), make_tiny_model(seed=2)
    router = Router.for_query_document(list(query_model), list(document_model))
    model = SentenceTransformer(modules=[router], device="cpu")
    mapping = {name: "query" if name == "anchor" or name.endswith("query") else "document" for name in NAMES}
    embeddings = [
        (query_model if mapping[name] == "query" else document_model).encode(rows[name], convert_to_tensor=True)
        for name in NAMES
    ]
    by_hand = CLPLoss(model, penalty_weight=0.5).compute_loss_from_embeddings(embeddings)
    seen: list[Tensor] = []
    loss = loss_class(model, penalty_weight=0.5)
    loss.register_forward_hook(lambda module, inputs, output: seen.append(output.detach()))
    before = [parameters(query_model), parameters(document_model)]

    train(model, rows, loss, router_mapping=mapping)

    torch.testing.assert_close(seen[0], by_hand, rtol=1e-4, atol=1e-5)
    for old, part in zip(before, (query_model, document_model), strict=True):
        assert (parameters(part) - old).norm() > 0.05


@pytest.mark.parametrize("loss_class", LOSSES)
def test_prompts(loss_class: Any, fresh: Any, rows: Dataset, train: Train) -> None:
    model = fresh()
    prompts = {name: "which " if name == "anchor" or name.endswith("query") else "the " for name in NAMES}
    embeddings = [model.encode(rows[name], prompt=prompts[name], convert_to_tensor=True) for name in NAMES]
    by_hand = CLPLoss(model).compute_loss_from_embeddings(embeddings)
    seen: list[Tensor] = []
    loss = loss_class(model)
    loss.register_forward_hook(lambda module, inputs, output: seen.append(output.detach()))
    train(model, rows, loss, prompts=prompts)
    torch.testing.assert_close(seen[0], by_hand, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("penalty", ["cosine", "contrastive"])
def test_short_texts_share_one_forward_and_long_ones_another(
    penalty: str, fresh: Any, rows: Dataset, train: Train
) -> None:
    model = fresh()
    shapes: list[tuple[int, ...]] = []
    model[0].register_forward_pre_hook(lambda module, inputs: shapes.append(tuple(inputs[0]["input_ids"].shape)))
    longer = " of the old country in the north and the south" * 3
    rows = rows.map(lambda row: {name: row[name] + longer for name in NAMES if name.endswith(("positive", "negative"))})
    queries = [text for name in NAMES if name == "anchor" or name.endswith("query") for text in rows[name]]
    documents = [text for name in NAMES if name.endswith(("positive", "negative")) for text in rows[name]]
    widths = [model.preprocess(texts)["input_ids"].shape[1] for texts in (queries, documents)]
    assert widths[0] < widths[1]
    train(model, rows, CLPLoss(model, penalty=penalty), max_steps=3)
    # "negative" begins the name "negative_query", which makes the Trainer put the one's tokens into the other.
    short, long = shapes[::2], shapes[1::2]
    assert len(short) == len(long) == 3
    for (few, narrow), (others, wide) in zip(short, long, strict=True):
        assert few + others == 30
        # Documents, and a query where it takes less with them than all other queries as wide as it is.
        assert 15 <= others <= 16
        assert narrow <= widths[0]
        assert wide == widths[1]


def test_several_datasets_with_several_losses(fresh: Any, rows: Dataset, train: Train) -> None:
    model = fresh()
    before = parameters(model)
    data = DatasetDict(
        {
            "full": rows.add_column("label", WEIGHTS),
            "cached": rows,
            "pairs": rows.select_columns(NAMES[:2]),
            "other": rows.select_columns(NAMES[:3]),
        }
    )
    cached = CachedCLPLoss(model, penalty="contrastive", mini_batch_size=2)
    losses = {
        "full": CLPLoss(model),
        "cached": cached,
        "pairs": CLPLoss(model),
        "other": MultipleNegativesRankingLoss(model),
    }
    calls: list[str] = []
    for name, loss in losses.items():
        loss.register_forward_hook(lambda module, inputs, output, name=name: calls.append(name))
    arguments = {"max_steps": 3, "gradient_accumulation_steps": 4}
    trained = train(model, data, losses, **arguments)
    assert set(calls) == set(losses)
    assert (trained - before).norm() > 0.05


@pytest.mark.parametrize(
    ("wrapper", "loss_class"),  # AdaptiveLayerLoss takes no cached losses
    [(MatryoshkaLoss, CLPLoss), (MatryoshkaLoss, CachedCLPLoss), (AdaptiveLayerLoss, CLPLoss)],
)
def test_wrapping_losses(wrapper: Any, loss_class: Any, fresh: Any, rows: Dataset, train: Train) -> None:
    model = fresh()
    before = parameters(model)
    loss = wrapper(model, loss_class(model), *([[32, 8]] if wrapper is MatryoshkaLoss else []))
    trained = train(model, rows.add_column("label", WEIGHTS), loss)
    assert (trained - before).norm() > 0.05


@pytest.mark.parametrize("loss_class", LOSSES)
def test_evaluation_loss(loss_class: Any, fresh: Any, rows: Dataset, tmp_path: Path) -> None:
    model = fresh()
    args = SentenceTransformerTrainingArguments(
        str(tmp_path), use_cpu=True, report_to="none", disable_tqdm=True, per_device_eval_batch_size=5
    )
    data = rows.add_column("label", WEIGHTS)
    trainer = SentenceTransformerTrainer(model=model, args=args, eval_dataset=data, loss=loss_class(model))
    embeddings = [model.encode(rows[name], convert_to_tensor=True) for name in NAMES]
    by_hand = CLPLoss(model).compute_loss_from_embeddings(embeddings, torch.tensor(WEIGHTS))
    assert trainer.evaluate()["eval_loss"] == pytest.approx(by_hand.item(), rel=1e-4)


@pytest.mark.parametrize("loss_class", LOSSES)
@pytest.mark.parametrize("fit", ["fit", "old_fit"])
def test_model_fit(
    fit: str, loss_class: Any, fresh: Any, columns: list[list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    texts = list(zip(*columns[:6], strict=True))

    def run(labels: list[list[float]] | None) -> Tensor:
        model = fresh()
        torch.manual_seed(0)
        examples = [InputExample(texts=list(row)) for row in texts]
        if labels is not None:
            examples = [InputExample(texts=list(row), label=label) for row, label in zip(texts, labels, strict=True)]
        loader: Any = DataLoader(examples, batch_size=5)  # type: ignore[arg-type]
        settings = {"epochs": 3, "warmup_steps": 0, "optimizer_params": {"lr": 1e-3}, "scheduler": "constantlr"}
        getattr(model, fit)([(loader, loss_class(model, penalty_weight=0.9))], show_progress_bar=False, **settings)
        return parameters(model)

    start = parameters(fresh())
    unlabelled, ones, weighted = run(None), run([[1.0, 1.0]] * 5), run(WEIGHTS)
    torch.testing.assert_close(unlabelled, ones)
    assert (unlabelled - start).norm() > 0.05
    assert (unlabelled - weighted).norm() > 0.05 * (unlabelled - start).norm()


@pytest.mark.parametrize("loss_class", LOSSES)
def test_the_documented_example_runs(
    loss_class: Any, tiny_model_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    text = inspect.getdoc(loss_class.__init__) or ""
    code = textwrap.dedent(text.split("Example:", 1)[1].split("::", 1)[1])
    name = "sentence-transformers/all-MiniLM-L6-v2"
    assert name in code
    scope: dict[str, Any] = {}
    exec(code.replace(name, str(tiny_model_path)), scope)
    assert scope["trainer"].state.global_step > 0
