"""Models whose embeddings a test chooses, and the ways to get at a loss's gradients."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch
from packaging.version import Version
from sentence_transformers import SentenceTransformer, __version__
from sentence_transformers.base.modules import InputModule
from torch import Tensor, nn


class Lookup(InputModule):
    """A text is the number of a row of a trainable table, and the row is its embedding.

    ``form`` is how the numbers reach the model: as padded tokens, packed into one sequence, or as something that is no
    tokens at all.
    """

    def __init__(self, table: Tensor, form: str = "padded") -> None:
        super().__init__()
        self.table = nn.Parameter(table.clone())
        self.form = form

    def preprocess(self, inputs: Sequence[Any], prompt: str | None = None, **kwargs: Any) -> dict[str, Any]:
        ids = torch.tensor([[int(text)] for text in inputs])
        if self.form == "packed":
            return {"input_ids": ids.T, "cu_seq_lens_q": torch.arange(len(ids) + 1, dtype=torch.int32)}
        if self.form == "no tokens":
            return {"row": ids}
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}

    def forward(self, features: dict[str, Any], **kwargs: Any) -> dict[str, Any]:
        rows = features["row" if self.form == "no tokens" else "input_ids"].reshape(-1)
        return {**features, "sentence_embedding": self.table[rows]}

    def get_embedding_dimension(self) -> int:
        return self.table.shape[1]

    def save(self, output_path: str, *args: Any, **kwargs: Any) -> None:
        raise NotImplementedError


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Models this small run several times as fast on one thread, the more so on a busy machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def lookup_model() -> Callable[..., SentenceTransformer]:
    """``lookup_model(table)``: the text "3" is embedded as ``table[3]``, and the table is the model's one parameter."""

    def make(table: Tensor, form: str = "padded") -> SentenceTransformer:
        return SentenceTransformer(modules=[Lookup(table, form)], device="cpu")

    return make


Run = Callable[..., tuple[Tensor, Tensor]]


@pytest.fixture(scope="session")
def run_loss() -> Run:
    """``run_loss(loss, columns, labels)`` -> the loss and all gradients of its model, as one vector.

    Columns are lists of texts, in the order of the dataset.
    """

    def run(loss: nn.Module, columns: Sequence[Sequence[Any]], labels: Tensor | None = None) -> tuple[Tensor, Tensor]:
        model: Any = loss.model
        model.zero_grad()
        value = loss([model.preprocess(list(column)) for column in columns], labels)
        value.backward()
        gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in model.parameters()]
        return value.detach(), torch.cat([gradient.flatten() for gradient in gradients]).clone()

    return run


@pytest.fixture(scope="session")
def assert_close() -> Callable[..., None]:
    """torch.testing.assert_close for what ``run_loss`` gives of a double precision model.

    Before its version 6.2 sentence-transformers replays the mini-batches of a cached loss in single precision whatever
    the model's: there gradients are compared to 1e-6 of the largest.
    """
    replayed_in_single = Version(__version__) < Version("6.2")

    def check(actual: Any, expected: Any, *, rtol: float = 1e-7, atol: float = 1e-7) -> None:
        if isinstance(actual, tuple):
            for pair in zip(actual, expected, strict=True):
                check(*pair, rtol=rtol, atol=atol)
            return
        if replayed_in_single and actual.ndim:
            rtol, atol = max(rtol, 1e-6), max(atol, 1e-6 * float(expected.abs().max()))
        torch.testing.assert_close(actual, expected, rtol=rtol, atol=atol)

    return check


@pytest.fixture(scope="session")
def columns() -> list[list[str]]:
    """Five rows of anchor, positive, two negatives and two queries for each; lengths differ, one query is missing."""
    return [
        ["which river", "who was king", "what is bread", "where is the big lake", "when was peace"],
        ["the river of the north", "the king of war", "bread is old", "the big lake is west", "peace was new"],
        ["a river of the south is small", "queen", "flower and tree", "one lake two lake three lake", "war was old"],
        ["mountain in the east", "silver stone", "new bread of the horse people", "fish", "peace of the queen"],
        ["which river is small", "who is queen", "which flower", "how many lake", "when was war"],
        ["river of the south", "queen of what", "tree", "three lake", "which war was old"],
        ["where is the mountain", "what stone", "", "which fish", "peace"],
        ["mountain", "which stone is silver", "horse people bread", "fish in the lake", "whose peace"],
    ]
