"""A query is never its own hard negative, by its text or its id, on every path by which a negative is chosen."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sentence_transformers import CrossEncoder, SentenceTransformer

from st_clp import Collection, mine_hard_negatives
from st_clp.data import CollectionError
from st_clp.mining import MinedNegatives, MiningOptions, mine
from tests.toy import WORDS

OWN_TEXT, OWN_ID = "the query's own text", "the query's own id"
PATHS: list[dict[str, Any]] = [
    {},
    {"duplicate_threshold": 0.95},
    {"candidates": "bm25"},
    {"candidates": "mixed"},
    {"index": "HNSW4"},
    {"sampling_strategy": "random", "range_max": 4},
    {"judged_negatives": "first"},
    {"judged_negatives": "ignore"},
    {"absolute_margin": 10.0},  # all are relaxed
    {"absolute_margin": 10.0, "on_shortage": "random"},
    {"range_min": 1},
    {"prefer_known_queries": False},
]


def both_ways(pairs: int = 6) -> Collection:
    """Each text is a query, answered by another, and a document; what is judged no answer is the query itself."""
    texts = [f"the {WORDS[i]} of {WORDS[i + 3]} {i}" for i in range(2 * pairs)]
    documents = {f"d{i}": text for i, text in enumerate(texts)}
    queries = {f"q{i}": f" {text.replace(' of ', '  of ')}" for i, text in enumerate(texts)}
    return Collection.from_dict(documents, queries, {f"q{i}": {f"d{i ^ 1}": 1, f"d{i}": 0} for i in range(2 * pairs)})


def same_ids() -> Collection:
    """Each query has a document with its id and a longer text, as in ArguAna."""
    queries = {f"{i}": f"which {WORDS[i]}?" for i in range(10)}
    documents = {query_id: f"{text} an old one" for query_id, text in queries.items()}
    answers = {f"a{i}": f"the {WORDS[i]} {i}" for i in range(10)}
    judgments = {f"{i}": {f"a{i}": 1, f"{i}": 0} for i in range(10)}
    return Collection.from_dict({**documents, **answers}, queries, judgments)


def mined(model: SentenceTransformer, collection: Collection, **options: Any) -> MinedNegatives:
    given = {name: options.pop(name) for name in ("cross_encoder",) if name in options}
    return mine(model, collection, MiningOptions(**{"num_negatives": 3, **options}), show_progress_bar=False, **given)


@pytest.mark.parametrize("options", PATHS, ids=str)
def test_no_negative_has_the_query_s_own_text(tiny_model: SentenceTransformer, options: dict[str, Any]) -> None:
    found = mined(tiny_model, both_ways(), **options)
    assert len(found.rows) == 12
    for row in found.rows:
        assert len(row.negatives) == 3
        assert row.query.split() not in [negative.text.split() for negative in row.negatives]
        assert row.query_id.replace("q", "d") not in [negative.doc_id for negative in row.negatives]
    # Where it comes first it is passed over in every row; elsewhere it may not be met at all.
    not_first = {"duplicate_threshold", "absolute_margin", "sampling_strategy"} & options.keys()
    assert found.account.filtered.get(OWN_TEXT, 0) == 12 or not_first


@pytest.mark.parametrize("options", PATHS, ids=str)
def test_no_negative_has_the_query_s_own_id(tiny_model: SentenceTransformer, options: dict[str, Any]) -> None:
    found = mined(tiny_model, same_ids(), **options)
    assert len(found.rows) == 10
    assert all(row.query_id not in [n.doc_id for n in row.negatives] for row in found.rows)
    assert all(len(row.negatives) == 3 for row in found.rows)
    assert found.account.filtered[OWN_ID] == 10
    assert f"10  candidates passed over: {OWN_ID}" in str(found.account)


def test_a_cross_encoder_does_not_bring_them_back(tiny_model: SentenceTransformer, cross_encoder: CrossEncoder) -> None:
    texts = mined(tiny_model, both_ways(), cross_encoder=cross_encoder, num_negatives=10)
    assert texts.account.filtered[OWN_TEXT] >= 10
    assert all(row.query_id.replace("q", "d") not in [n.doc_id for n in row.negatives] for row in texts.rows)
    ids = mined(tiny_model, same_ids(), cross_encoder=cross_encoder)
    assert all(row.query_id not in [n.doc_id for n in row.negatives] for row in ids.rows)


def test_ids_that_mean_nothing_can_be_said_to(tiny_model: SentenceTransformer) -> None:
    found = mined(tiny_model, same_ids(), ignore_identical_ids=False, judged_negatives="first")
    assert all(row.query_id in [n.doc_id for n in row.negatives] for row in found.rows)
    assert OWN_ID not in found.account.filtered
    dataset = mine_hard_negatives(
        tiny_model,
        same_ids(),
        num_negatives=18,
        ignore_identical_ids=False,
        output_details=True,
        show_progress_bar=False,
        verbose=False,
    )
    assert all(row["query_id"] in row["negative_ids"] for row in dataset)


def test_a_relevant_document_with_the_query_s_id_or_text_stays_its_positive(tiny_model: SentenceTransformer) -> None:
    collection = Collection.from_dict(
        {"1": "the river", "2": "a lake", "3": "which city?"},
        {"1": "which river?", "3": "which city?"},
        {"1": {"1": 1}, "3": {"3": 1}},
    )
    found = mined(tiny_model, collection, num_negatives=2)
    assert [(row.query_id, row.positive_id) for row in found.rows] == [("1", "1"), ("3", "3")]
    assert found.account.filtered == {}


@pytest.mark.parametrize("candidates", ["model", "bm25"])
def test_what_is_passed_over_takes_no_candidate_s_place(tiny_model: SentenceTransformer, candidates: str) -> None:
    """With the query among the documents, by id and by text, its negatives are those that it has without."""
    answers = {f"a{i}": f"the {WORDS[i]} {WORDS[i + 1]} {i}" for i in range(12)}
    queries = {f"q{i}": f"which {WORDS[i]} {WORDS[i + 1]}?" for i in range(12)}
    judgments = {f"q{i}": {f"a{i}": 1} for i in range(12)}
    alone = Collection.from_dict(answers, queries, judgments)
    asked = {f"q{i}": {f"a{i}": 1} for i in (4,)}
    options = {"candidates": candidates, "range_min": 2, "range_max": 5, "prefer_known_queries": False}
    options["on_shortage"] = "fewer"  # what is drawn at random depends on the corpus
    without = mined(tiny_model, alone.with_queries(asked), **options).rows
    both = {**answers, "q4": queries["q4"], "copy": f"{queries['q4']} "}
    among = mined(tiny_model, Collection.from_dict(both, {"q4": queries["q4"]}, asked), **options)
    assert [n.doc_id for row in among.rows for n in row.negatives] == [n.doc_id for r in without for n in r.negatives]
    assert {among.account.filtered[cause] for cause in (OWN_ID, OWN_TEXT)} == {1}


def test_a_negative_s_query_is_never_the_row_s_own(tiny_model: SentenceTransformer) -> None:
    rows = mined(tiny_model, both_ways(), queries_per_negative=3, num_negatives=5).rows
    assert all(row.query not in negative.queries for row in rows for negative in row.negatives)
    assert any(negative.queries for row in rows for negative in row.negatives)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    documents=st.integers(1, 4),
    queries=st.integers(1, 3),
    num_negatives=st.integers(0, 6),
    candidates=st.sampled_from(["model", "bm25", "mixed"]),
    index=st.sampled_from([None, "HNSW2"]),
    on_shortage=st.sampled_from(["relax", "random", "fewer", "drop"]),
    max_score=st.sampled_from([None, -2.0]),
    range_min=st.integers(0, 2),
    batch_size=st.sampled_from([None, 1]),
)
def test_the_smallest_collections(
    tiny_model: SentenceTransformer,
    documents: int,
    queries: int,
    num_negatives: int,
    candidates: str,
    index: str | None,
    on_shortage: str,
    max_score: float | None,
    range_min: int,
    batch_size: int | None,
) -> None:
    """From one document and one query on, and whatever the filters leave: rows, or an error that says what to do."""
    texts = {f"d{i}": f"the {WORDS[i]}" for i in range(documents)}
    asked = {f"q{i}": f"the {WORDS[(i + 1) % documents]}" for i in range(queries)}
    collection = Collection.from_dict(texts, asked, {f"q{i}": {f"d{i % documents}": 1} for i in range(queries)})
    options = MiningOptions(
        num_negatives=num_negatives,
        candidates=candidates,  # type: ignore[arg-type]
        index=None if candidates == "bm25" else index,
        on_shortage=on_shortage,  # type: ignore[arg-type]
        max_score=max_score,
        range_min=range_min,
    )
    try:
        found = mine(tiny_model, collection, options, batch_size=batch_size, show_progress_bar=False)
    except CollectionError as error:
        message = str(error)
        assert on_shortage in ("relax", "random") and num_negatives > documents - 2  # noqa: PT018
        assert "too few" in message and "on_shortage='fewer'" in message  # noqa: PT018
        return
    assert found.account.queries == queries == len(found.rows) + found.account.queries_dropped
    for row in found.rows:
        assert len(row.negatives) == num_negatives or on_shortage == "fewer"
        assert row.query not in [negative.text for negative in row.negatives]
    str(found.account)
