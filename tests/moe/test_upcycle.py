"""Converting a model: what stays the same, and what is refused."""

from __future__ import annotations

import pytest
import torch
from sentence_transformers import SentenceTransformer

import st_clp

TEXTS = ["a cat on the river", "the king", "what is the capital of a country", "red green blue " * 8]


@pytest.mark.parametrize("projection", ["intermediate", "output", "feed_forward"])
@pytest.mark.parametrize(("experts", "per_token"), [(1, 1), (2, 1), (4, 2), (3, 3)])
def test_embeddings_stay_the_same(
    tiny_model: SentenceTransformer, projection: str, experts: int, per_token: int
) -> None:
    dense = tiny_model.encode(TEXTS, convert_to_tensor=True)
    converted = st_clp.upcycle(tiny_model, experts, per_token, projection)
    assert converted is tiny_model
    assert isinstance(converted[0], st_clp.MoETransformer)
    torch.testing.assert_close(converted.encode(TEXTS, convert_to_tensor=True), dense, atol=1e-6, rtol=0)
