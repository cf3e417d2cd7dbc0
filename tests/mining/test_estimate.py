"""What mining would cost, where more than the model is at work."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from sentence_transformers import CrossEncoder, SentenceTransformer

from st_clp import Collection
from st_clp.mining import mine
from st_clp.mining.estimate import estimate
from st_clp.options import MiningOptions


def make_collection() -> Collection:
    documents = {f"d{i}": f"the river number {i} and the lake" for i in range(60)}
    queries = {f"q{i}": f"where is river {i}?" for i in range(40)}
    return Collection.from_dict(documents, queries, {f"q{i}": {f"d{i}": 1} for i in range(40)}, name="rivers")


def test_the_estimate_counts_a_cross_encoders_pairs_and_says_what_it_leaves_out(
    tiny_model: SentenceTransformer,
    cross_encoder: CrossEncoder,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    collection = make_collection()
    options = MiningOptions(num_negatives=2, range_max=10, candidates="mixed", index="Flat", max_queries=20)
    found = estimate(
        tiny_model, collection, options, cross_encoder=cross_encoder, dtype="model", show_progress_bar=False
    )
    assert "ranking by BM25" in str(found)
    assert "building the index Flat" in str(found)
    assert f"{found.rescored:,} pairs for the cross-encoder" in str(found)
    assert 0 < found.rescoring_seconds < found.seconds
    pairs = 0
    predict = cross_encoder.predict

    def counting(texts: list[tuple[str, str]], **options: Any) -> Any:
        nonlocal pairs
        pairs += len(texts)
        return predict(texts, **options)

    monkeypatch.setattr(cross_encoder, "predict", counting)
    mine(tiny_model, collection, options, cross_encoder=cross_encoder, dtype="model", show_progress_bar=False)
    assert pairs == pytest.approx(found.rescored, rel=0.1)


def test_a_plain_estimate_leaves_nothing_out(tiny_model: SentenceTransformer) -> None:
    found = estimate(tiny_model, make_collection(), dtype="model", show_progress_bar=False)
    assert found.left_out == ()
    assert "not in this estimate" not in str(found)
    assert "cross-encoder" not in str(found)


def test_a_cross_encoder_that_classifies_is_refused(
    tiny_model: SentenceTransformer, make_cross_encoder: Callable[..., CrossEncoder]
) -> None:
    with pytest.raises(ValueError, match="gives 2 numbers for a pair"):
        estimate(tiny_model, make_collection(), cross_encoder=make_cross_encoder(num_labels=2), show_progress_bar=False)
