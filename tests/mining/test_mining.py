"""Mining: every query gets its negatives, none of them an answer, each with a query of its own where one is known."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sentence_transformers import SentenceTransformer

from st_clp import Collection, mine_hard_negatives
from st_clp.data import CollectionError
from st_clp.mining import MinedNegatives, MiningOptions
from st_clp.mining import mine as mine_by_options
from st_clp.mining.rows import read_rows, write_rows
from tests import toy
from tests.fresh import run_fresh


def mine(
    model: SentenceTransformer, collection: Collection, *, dtype: str = "auto", show_progress_bar: bool, **options: Any
) -> MinedNegatives:
    return mine_by_options(
        model, collection, MiningOptions(**options), dtype=dtype, show_progress_bar=show_progress_bar
    )


def make_collection(documents: int = 20, queries: int = 12, *, graded: bool = True) -> Collection:
    """Query i is answered by document i, and by document i + 1 for every third; document i + 2 is judged no answer."""
    judgments = {}
    for i in range(queries):
        judgments[f"q{i}"] = {f"d{i % documents}": 1}
        if i % 3 == 0:
            judgments[f"q{i}"][f"d{(i + 1) % documents}"] = 2
        if graded:
            judgments[f"q{i}"].setdefault(f"d{(i + 2) % documents}", 0)
    return toy.make_collection(documents, queries, judgments=judgments)


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    documents=st.integers(8, 30),
    queries=st.integers(1, 30),
    num_negatives=st.integers(0, 5),
    range_min=st.integers(0, 4),
    width=st.integers(1, 20),
    relative_margin=st.sampled_from([None, 0.0, 0.5, 2.0]),
    max_score=st.sampled_from([None, 0.2]),
    sampling=st.sampled_from(["top", "random"]),
    judged=st.sampled_from([None, "rank", "first", "ignore"]),
    prefer=st.booleans(),
    seed=st.integers(0, 3),
)
def test_every_query_gets_all_its_negatives_and_none_is_an_answer(
    tiny_model: SentenceTransformer,
    documents: int,
    queries: int,
    num_negatives: int,
    range_min: int,
    width: int,
    relative_margin: float | None,
    max_score: float | None,
    sampling: str,
    judged: str | None,
    prefer: bool,
    seed: int,
) -> None:
    collection = make_collection(documents, queries)
    mined = mine(
        tiny_model,
        collection,
        num_negatives=num_negatives,
        range_min=range_min,
        range_max=range_min + width,
        relative_margin=relative_margin,
        max_score=max_score,
        sampling_strategy=sampling,
        judged_negatives=judged,
        prefer_known_queries=prefer,
        seed=seed,
        show_progress_bar=False,
    )
    positives = collection.positives()
    assert [(row.query_id, row.positive_id) for row in mined.rows] == [
        (query_id, doc_id) for query_id in positives for doc_id in positives[query_id]
    ]
    for row in mined.rows:
        negatives = [negative.doc_id for negative in row.negatives]
        assert len(set(negatives)) == num_negatives
        assert not set(negatives) & set(positives[row.query_id])
        for negative in row.negatives:
            if negative.source == "ranking":
                assert range_min <= negative.rank < range_min + width
    assert sum(mined.account.negatives.values()) == len(mined.rows) * num_negatives
    assert mined.account.rows == len(mined.rows)


def test_negatives_are_the_best_ranked_by_the_model(tiny_model: SentenceTransformer) -> None:
    collection = make_collection(graded=False)
    documents = {document.doc_id: document.text for document in collection.documents()}
    scores = tiny_model.similarity(
        tiny_model.encode_query(list(collection.queries.values())), tiny_model.encode_document(list(documents.values()))
    )
    mined = mine(
        tiny_model, collection, num_negatives=3, dtype="model", prefer_known_queries=False, show_progress_bar=False
    )
    for row in mined.rows:
        own = scores[list(collection.queries).index(row.query_id)]
        ranked = [list(documents)[i] for i in own.argsort(descending=True)]
        expected = [doc_id for doc_id in ranked if doc_id not in collection.positives()[row.query_id]]
        assert [negative.doc_id for negative in row.negatives] == expected[:3]
        assert [negative.rank for negative in row.negatives] == [0, 1, 2]
        assert row.positive_score == pytest.approx(float(own[list(documents).index(row.positive_id)]), abs=1e-5)


def test_a_copy_of_the_positive_is_never_a_negative(tiny_model: SentenceTransformer) -> None:
    collection = Collection.from_dict(
        {"a": "the river", "copy-1": "the river", "copy-2": "the river", "b": "a lake", "c": "a city", "d": "fire"},
        {"q": "which river?"},
        {"q": {"a": 1}},
    )
    for sampling in ("top", "random"):
        mined = mine(tiny_model, collection, num_negatives=3, sampling_strategy=sampling, show_progress_bar=False)
        assert {negative.doc_id for negative in mined.rows[0].negatives} == {"b", "c", "d"}
        assert sorted(negative.rank for negative in mined.rows[0].negatives) == [0, 1, 2]


def test_a_strict_margin_loses_no_query_and_is_accounted_for(tiny_model: SentenceTransformer) -> None:
    collection = make_collection(documents=40, queries=30, graded=False)
    mined = mine(
        tiny_model,
        collection,
        num_negatives=4,
        range_max=10,
        absolute_margin=10.0,
        show_progress_bar=False,
    )
    assert {row.query_id for row in mined.rows} == set(collection.queries)
    assert mined.account.negatives == {"relaxed": len(mined.rows) * 4}
    assert mined.account.filtered == {"within absolute_margin of the positive": 30 * 10}
    # The deepest-ranked come first: they are the least likely to be answers nobody judged.
    assert [negative.rank for negative in mined.rows[0].negatives] == [9, 8, 7, 6]
    assert "within absolute_margin" in str(mined.account)


def test_judged_negatives_first_last_or_not_at_all(tiny_model: SentenceTransformer) -> None:
    collection = make_collection(documents=40, queries=10)

    def first_sources(judged: str) -> list[tuple[str, str]]:
        rows = mine(
            tiny_model,
            collection,
            num_negatives=2,
            range_max=40,
            absolute_margin=10.0,
            judged_negatives=judged,
            show_progress_bar=False,
        ).rows
        return [(row.query_id, row.negatives[0].doc_id) for row in rows if row.negatives[0].source != "relaxed"]

    not_relevant = {
        query_id: next(doc_id for doc_id, grade in grades.items() if grade == 0)
        for query_id, grades in collection.judgments.items()
    }
    # The margin refuses everything, but a document that was judged needs no guard against unjudged answers.
    assert all(not_relevant[query_id] == doc_id for query_id, doc_id in first_sources("first"))
    assert all(not_relevant[query_id] == doc_id for query_id, doc_id in first_sources("rank"))
    assert first_sources("rank")
    assert first_sources("ignore") == []


def test_queries_of_negatives_come_from_the_judgments_and_never_from_this_row(tiny_model: SentenceTransformer) -> None:
    # d0 answers q0, q1 and q4; d1 answers q2 and, as d0 does, q1. q3 is q0's text under another id.
    collection = Collection.from_dict(
        {"d0": "the red river", "d1": "the blue lake", "d2": "a bank", "d3": "a cat", "d4": "fire"},
        {
            "q0": "which river?",
            "q1": "what is wet?",
            "q2": "which lake?",
            "q3": "which river?",
            "q4": "what is red?",
        },
        {
            "q0": {"d0": 1, "d1": 0},
            "q1": {"d0": 1, "d1": 1},
            "q2": {"d1": 1, "d0": 0},
            "q3": {"d1": 1, "d0": 0},
            "q4": {"d0": 1, "d1": 0},
        },
    )
    rows = mine(
        tiny_model,
        collection,
        num_negatives=3,
        queries_per_negative=3,
        judged_negatives="first",
        show_progress_bar=False,
    ).rows
    found = {(row.query_id, row.positive_id): {n.doc_id: set(n.queries) for n in row.negatives} for row in rows}
    # q1 is answered by q0's positive too, and q3 has q0's text: neither may hold d1 near.
    assert found["q0", "d0"]["d1"] == {"which lake?"}
    assert found["q2", "d1"]["d0"] == {"what is red?"}
    assert found["q4", "d0"]["d1"] == {"which lake?"}
    assert all(queries == set() for row in found.values() for doc, queries in row.items() if doc not in ("d0", "d1"))


@pytest.mark.parametrize("sampling", ["top", "random"])
def test_candidates_with_a_known_query_come_first_where_they_are_preferred(
    tiny_model: SentenceTransformer, sampling: str
) -> None:
    collection = make_collection(30, 10, graded=False)  # documents 11 and on answer no query

    def mined(prefer: bool) -> list[list[bool]]:
        rows = mine(
            tiny_model,
            collection,
            num_negatives=6,
            range_min=2,
            range_max=26,
            sampling_strategy=sampling,
            prefer_known_queries=prefer,
            show_progress_bar=False,
        ).rows
        return [[bool(negative.queries) for negative in row.negatives] for row in rows]

    preferred, plain = mined(True), mined(False)
    assert all(known == sorted(known, reverse=True) for known in preferred)  # those with a query first
    assert sum(map(sum, preferred)) > 1.5 * sum(map(sum, plain))
    assert any(known != sorted(known, reverse=True) for known in plain)


def test_dataset_has_the_columns_of_the_loss_and_weights_for_known_queries(tiny_model: SentenceTransformer) -> None:
    common = {"model": tiny_model, "collection": make_collection(), "show_progress_bar": False}
    dataset = mine_hard_negatives(**common, num_negatives=2, queries_per_negative=2)
    assert dataset.column_names == [
        "anchor",
        "positive",
        "negative_1",
        "negative_2",
        "negative_query_1_1",
        "negative_query_1_2",
        "negative_query_2_1",
        "negative_query_2_2",
        "label",
    ]
    names = [name for name in dataset.column_names if name.startswith("negative_query")]
    assert {weight for row in dataset for weight in row["label"]} == {0.0, 1.0}
    for row in dataset:
        assert row["label"] == [float(bool(row[name])) for name in names]
    plain = mine_hard_negatives(**common, num_negatives=1, queries_per_negative=0)
    assert plain.column_names == ["anchor", "positive", "negative_1"]
    pairs = mine_hard_negatives(**common, num_negatives=0)
    assert pairs.column_names == ["anchor", "positive"]


def test_rows_survive_the_file_and_are_training_rows_again(tiny_model: SentenceTransformer, tmp_path: Path) -> None:
    collection = make_collection()
    mined = mine(tiny_model, collection, num_negatives=3, queries_per_negative=2, show_progress_bar=False)
    write_rows(tmp_path / "rows.jsonl", mined.rows)
    assert read_rows(tmp_path / "rows.jsonl") == mined.rows
    first = json.loads((tmp_path / "rows.jsonl").read_text().splitlines()[0])
    assert {"query", "pos", "neg", "neg_q"} <= set(first)
    again = Collection.load(str(tmp_path / "rows.jsonl"))
    assert set(again.queries.values()) == set(collection.queries.values())
    # The rows name their negatives, so these come first when they are mined again.
    remined = mine(tiny_model, again, num_negatives=3, show_progress_bar=False)
    before = {row.query: {negative.text for negative in row.negatives} for row in mined.rows}
    assert all({negative.text for negative in row.negatives} <= before[row.query] for row in remined.rows)
    assert set(remined.account.negatives) == {"judged"}


WRITING = """
import os, sys
from st_clp.mining.rows import read_rows, require_writable, write_rows
rows = read_rows(sys.argv[1])
other = os.fork()
for _ in range(400):
    require_writable(sys.argv[2])
    write_rows(sys.argv[2], rows)
    assert read_rows(sys.argv[2]) == rows
if other:
    sys.exit(os.waitstatus_to_exitcode(os.waitpid(other, 0)[1]))
"""


def test_two_processes_may_write_the_same_rows(tiny_model: SentenceTransformer, tmp_path: Path) -> None:
    """As where two mine into one folder, of which the store lets one encode and the other wait."""
    mined = mine(tiny_model, make_collection(), num_negatives=2, show_progress_bar=False)
    write_rows(tmp_path / "rows.jsonl", mined.rows)
    assert run_fresh(WRITING, tmp_path / "rows.jsonl", tmp_path / "shared.jsonl").stderr == ""
    assert sorted(path.name for path in tmp_path.iterdir()) == ["rows.jsonl", "shared.jsonl"]


@pytest.mark.parametrize("sampling", ["top", "random"])
def test_the_same_seed_mines_the_same(tiny_model: SentenceTransformer, sampling: str) -> None:
    collection = make_collection(30, 20)

    def mined(seed: int, chosen: Collection = collection, prefer: bool = True) -> dict[str, tuple]:
        rows = mine(
            tiny_model,
            chosen,
            num_negatives=3,
            sampling_strategy=sampling,
            prefer_known_queries=prefer,
            seed=seed,
            range_max=15,
            show_progress_bar=False,
        ).rows
        return {f"{row.query_id} {row.positive_id}": row.negatives for row in rows}

    def documents(negatives: dict[str, tuple]) -> list[list[str]]:
        return [[negative.doc_id for negative in row] for row in negatives.values()]

    assert mined(1) == mined(1)
    assert mined(1) != mined(2)  # which of several known queries a negative gets, if nothing else
    assert (documents(mined(1)) == documents(mined(2))) == (sampling == "top")
    # A query's negatives depend on the other queries through what these are known to ask for, and no other way.
    judgments = {query_id: grades for query_id, grades in collection.judgments.items() if query_id in ("q3", "q7")}
    few = Collection.from_dict({d.doc_id: d.text for d in collection.documents()}, collection.queries, judgments)
    alone, together = mined(1, few, prefer=False), mined(1, prefer=False)
    for key, negatives in alone.items():
        assert [n.doc_id for n in negatives] == [n.doc_id for n in together[key]]


def test_misuse_and_the_printed_account(tiny_model: SentenceTransformer, capsys: pytest.CaptureFixture[str]) -> None:
    collection = make_collection(5, 3)
    with pytest.raises(CollectionError, match="too few for 9 negatives of query 'q0'"):
        mine(tiny_model, collection, num_negatives=9, show_progress_bar=False)
    with pytest.raises(ValueError, match="num_negatives must be at least 0, got -1"):
        mine_hard_negatives(tiny_model, collection, num_negatives=-1)
    with pytest.raises(ValueError, match="range_min=5 and range_max=5"):
        mine_hard_negatives(tiny_model, collection, range_min=5, range_max=5)
    with pytest.raises(ValueError, match="sampling_strategy must be one of top, random, got 'best'"):
        mine_hard_negatives(tiny_model, collection, sampling_strategy="best")
    with pytest.raises(CollectionError, match="no query has a relevant document"):
        mine_hard_negatives(tiny_model, Collection.from_dict({"d": "x"}, {"q": "y"}, {"q": {"d": 0}}))
    mine_hard_negatives(tiny_model, collection, num_negatives=2, show_progress_bar=False)
    assert "rows from 3 queries" in capsys.readouterr().out
    mine_hard_negatives(tiny_model, collection, num_negatives=2, show_progress_bar=False, verbose=False)
    assert not capsys.readouterr().out


@pytest.mark.parametrize(
    "change", [{"neg": None}, {"pos": "text"}, {"pos": []}, {"neg_q": 7}, {"neg_id": [1]}, {"query": None}, {"neg": []}]
)
def test_a_row_of_another_kind_is_refused_by_file_and_line(tmp_path: Path, change: dict[str, Any]) -> None:
    row = {"query": "q", "pos": ["a"], "neg": ["b"], "neg_q": [None], "query_id": "1", "pos_id": "2", "pos_score": 0.5}
    row |= {"neg_id": ["3"], "neg_rank": [0], "neg_score": [0.1], "neg_source": ["ranking"]}
    (tmp_path / "rows.jsonl").write_text(f"{json.dumps(row)}\n{json.dumps(row | change)}\n")
    with pytest.raises(CollectionError, match=r"rows\.jsonl, line 2: this is no file that st-clp mine wrote"):
        read_rows(tmp_path / "rows.jsonl")
