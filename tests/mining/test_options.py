"""Each option of the miner: what it changes, and what the account says of it."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sentence_transformers import CrossEncoder, SentenceTransformer

from st_clp import CLPLoss, Collection, mine_hard_negatives
from st_clp.data import CollectionError
from st_clp.mining import DETAIL_COLUMNS, MinedNegatives, MiningOptions, mine
from st_clp.mining.bm25 import BM25, Words, fuse
from st_clp.mining.filters import Candidate, refusal
from tests.toy import WORDS, make_collection


def mined(model: SentenceTransformer, collection: Collection, **options: Any) -> MinedNegatives:
    given = {name: options.pop(name) for name in ("cross_encoder", "store_dir", "dtype") if name in options}
    return mine(model, collection, MiningOptions(**options), show_progress_bar=False, **given)


def sources(found: MinedNegatives) -> set[str]:
    return {negative.source for row in found.rows for negative in row.negatives}


STRICT = {"absolute_margin": 10.0, "range_max": 10, "num_negatives": 3}


def test_on_shortage_does_what_it_says_and_is_accounted_for(tiny_model: SentenceTransformer) -> None:
    collection = make_collection()
    relaxed = mined(tiny_model, collection, **STRICT)
    assert sources(relaxed) == {"relaxed"}
    assert relaxed.account.rows_relaxed == len(relaxed.rows) == 12
    drawn = mined(tiny_model, collection, **STRICT, on_shortage="random")
    assert sources(drawn) == {"random"}
    assert all(len(row.negatives) == 3 for row in drawn.rows)
    fewer = mined(tiny_model, collection, **STRICT, on_shortage="fewer")
    assert [row.negatives for row in fewer.rows] == [()] * 12
    assert fewer.account.rows_short == 12
    dropped = mined(tiny_model, collection, **STRICT, on_shortage="drop")
    assert dropped.rows == []
    assert dropped.account.queries_dropped == 12
    assert "12  queries were dropped" in str(dropped.account)
    # Where the filters leave enough, none of them changes anything.
    same = [mined(tiny_model, collection, on_shortage=how).rows for how in ("relax", "random", "fewer", "drop")]
    assert same[0] == same[1] == same[2] == same[3]


def test_the_nearest_miss_is_relaxed_first(tiny_model: SentenceTransformer) -> None:
    collection = make_collection()
    above = mined(tiny_model, collection, max_score=-2.0, range_max=10, num_negatives=3)
    assert all([negative.rank for negative in row.negatives] == [9, 8, 7] for row in above.rows)
    below = mined(tiny_model, collection, min_score=2.0, range_max=10, num_negatives=3, prefer_known_queries=False)
    assert all([negative.rank for negative in row.negatives] == [0, 1, 2] for row in below.rows)


def test_a_row_with_fewer_negatives_has_its_positive_in_their_place(tiny_model: SentenceTransformer) -> None:
    ranked = mined(tiny_model, make_collection(), range_max=10, num_negatives=10, prefer_known_queries=False).rows
    middle = float(np.median([row.negatives[8].score for row in ranked]))  # half the queries have only one below
    options: dict[str, Any] = {"max_score": middle, "range_max": 10, "num_negatives": 3, "on_shortage": "fewer"}
    rows = mined(tiny_model, make_collection(), **options).rows
    assert len({len(row.negatives) for row in rows}) > 1
    dataset = mine_hard_negatives(tiny_model, make_collection(), **options, show_progress_bar=False, verbose=False)
    loss = CLPLoss(tiny_model, in_batch_negatives=False, penalty_weight=0.0)

    def value(columns: list[list[str]], labels: list[list[float]] | None) -> float:
        features = [tiny_model.preprocess(column) for column in columns]
        return loss(features, None if labels is None else torch.tensor(labels)).item()

    for row, mined_row in zip(dataset, rows, strict=True):
        number = len(mined_row.negatives)
        assert [row[f"negative_{n}"] for n in range(number + 1, 4)] == [row["positive"]] * (3 - number)
        assert row["label"][number:] == [0.0] * (3 - number)
        # What stands in their place is never this row's negative.
        texts = [row["anchor"], row["positive"], *(negative.text for negative in mined_row.negatives)]
        own = texts + ["x"] * number
        found = value([[text] for name, text in row.items() if name != "label"], [row["label"]])
        assert found == pytest.approx(value([[text] for text in own], None) if number else 0.0, abs=1e-5)


def test_a_relative_margin_points_downwards_for_negative_scores_too() -> None:
    options = MiningOptions(relative_margin=0.5)
    assert refusal(Candidate("d", 0, -0.25), -0.2, options) == (
        "within relative_margin of the positive",
        pytest.approx(0.05),
    )
    assert refusal(Candidate("d", 0, -0.31), -0.2, options) is None
    assert refusal(Candidate("d", 0, 0.11), 0.2, options) == (
        "within relative_margin of the positive",
        pytest.approx(0.01),
    )
    assert refusal(Candidate("d", 0, 0.09), 0.2, options) is None


def test_a_miss_is_as_far_as_the_strictest_limit_says() -> None:
    options = MiningOptions(absolute_margin=0.1, max_score=0.3)
    reason, excess = refusal(Candidate("d", 0, 0.85), 0.9, options) or ("", 0.0)
    assert (reason, excess) == ("within absolute_margin of the positive", pytest.approx(0.55))


def test_of_equal_misses_the_deepest_is_relaxed_first(tiny_model: SentenceTransformer) -> None:
    texts = {"answer": "the red river", **{f"copy{i}": "a blue lake of the king" for i in range(4)}}
    collection = Collection.from_dict(texts, {"q": "which river is red"}, {"q": {"answer": 1}})
    (row,) = mined(tiny_model, collection, max_score=-2.0, num_negatives=2).rows
    assert [negative.rank for negative in row.negatives] == [3, 2]


def test_each_query_draws_for_itself(tiny_model: SentenceTransformer) -> None:
    """Queries with the same ranking have other negatives at random, or a batch would hold few different ones."""
    texts = {f"d{i}": f"the {WORDS[i % 17]} of {WORDS[(i * 5 + 1) % 17]} {i}" for i in range(30)}
    asked = {f"q{i}": "which river is red" for i in range(12)}
    judgments = {query_id: {"d0": 1} for query_id in asked}
    collection = Collection.from_dict(texts, asked, judgments)
    options: dict[str, Any] = {"num_negatives": 1, "sampling_strategy": "random"}
    drawn = [row.negatives[0].doc_id for row in mined(tiny_model, collection, **options).rows]
    assert len(set(drawn)) > 6


def test_a_draw_beside_preferred_documents_is_from_all_the_others_alike(tiny_model: SentenceTransformer) -> None:
    """Of two negatives one is preferred; the other's rank is uniform, not the better of two draws."""
    texts = {f"d{i}": f"the {WORDS[i % 17]} of {WORDS[(i * 5 + 1) % 17]} {i}" for i in range(31)}
    asked = {f"q{i}": "which river is red" for i in range(200)}
    judgments = {query_id: {"d0": 1} for query_id in asked}
    collection = Collection.from_dict(texts, {**asked, "other": "which lake"}, {**judgments, "other": {"d1": 1}})
    found = mined(tiny_model, collection, num_negatives=2, sampling_strategy="random")
    rows = [row for row in found.rows if row.query_id != "other"]
    assert all("d1" in {negative.doc_id for negative in row.negatives} for row in rows)
    ranks = [negative.rank for row in rows for negative in row.negatives if negative.doc_id != "d1"]
    assert np.mean(ranks) == pytest.approx(14.5, abs=2.0)  # the better of two would be at about 9.5 of 0 to 29


def test_near_duplicates_of_a_positive_are_no_negatives(tiny_model: SentenceTransformer) -> None:
    documents = {"a": "the big river", "near": "the big rivers", "b": "a lake", "c": "a city", "d": "fire"}
    collection = Collection.from_dict(documents, {"q": "which river?"}, {"q": {"a": 1}})
    embeddings = tiny_model.encode_document(list(documents.values()))
    likeness = embeddings[1:] @ embeddings[0]
    assert likeness[0] == likeness.max()
    threshold = float((likeness[0] + np.sort(likeness)[-2]) / 2)
    found = mined(tiny_model, collection, num_negatives=3, duplicate_threshold=threshold, dtype="model")
    assert {negative.doc_id for negative in found.rows[0].negatives} == {"b", "c", "d"}
    assert found.account.filtered == {"near-duplicate of a relevant document": 1}
    without = mined(tiny_model, collection, num_negatives=4, dtype="model")
    assert "near" in {negative.doc_id for negative in without.rows[0].negatives}


def test_documents_and_positives_without_text_are_left_out_and_counted(tiny_model: SentenceTransformer) -> None:
    documents = {"a": "the big river", "blank": " ", "empty": "", "b": "a lake", "c": "a city"}
    collection = Collection.from_dict(
        documents,
        {"q": "which river?", "r": "which lake?", "s": "fire?"},
        {"q": {"a": 1}, "r": {"b": 1}, "s": {"empty": 1}},
    )
    for sampling in ("top", "random"):
        found = mined(tiny_model, collection, num_negatives=2, sampling_strategy=sampling)
        assert [row.query_id for row in found.rows] == ["q", "r"]
        assert all(negative.text.strip() for row in found.rows for negative in row.negatives)
        assert found.account.left_out == {"judgments of a document without text": 1}
        assert found.account.queries_without_positive == 1
    assert mined(tiny_model, collection, num_negatives=2, range_max=5).account.filtered["document without text"] == 2


def test_limits(tiny_model: SentenceTransformer) -> None:
    texts = {f"d{i}": f"{word} {i}" for i, word in enumerate(WORDS)}
    judgments = {f"q{i}": {f"d{i}": 1, f"d{i + 1}": 2, f"d{i + 2}": 1} for i in range(8)}
    collection = Collection.from_dict(texts, {f"q{i}": f"which {WORDS[i]}?" for i in range(8)}, judgments)
    found = mined(tiny_model, collection, num_negatives=1, max_queries=3, max_positives_per_query=2)
    assert len({row.query_id for row in found.rows}) == 3
    assert len(found.rows) == 6
    assert all(f"d{int(row.query_id[1:]) + 1}" == row.positive_id for row in found.rows[::2])  # the best-judged first
    assert found.account.queries_not_drawn == 5
    again = mined(tiny_model, collection, num_negatives=1, max_queries=3, max_positives_per_query=2)
    other = mined(tiny_model, collection, num_negatives=1, max_queries=3, max_positives_per_query=2, seed=5)
    assert again.rows == found.rows != other.rows


def test_a_cross_encoder_scores_and_orders_the_candidates(
    tiny_model: SentenceTransformer, make_cross_encoder: Callable[..., CrossEncoder]
) -> None:
    collection = make_collection()
    cross_encoder = make_cross_encoder()
    found = mined(
        tiny_model, collection, cross_encoder=cross_encoder, range_max=10, num_negatives=3, prefer_known_queries=False
    )
    plain = mined(tiny_model, collection, range_max=10, num_negatives=10, prefer_known_queries=False)
    for row, ranked in zip(found.rows, plain.rows, strict=True):
        pairs = [(row.query, negative.text) for negative in ranked.negatives]
        scores = cross_encoder.predict(pairs, show_progress_bar=False)
        best = np.argsort(-scores, kind="stable")[:3]
        assert [negative.doc_id for negative in row.negatives] == [ranked.negatives[i].doc_id for i in best]
        np.testing.assert_allclose([negative.score for negative in row.negatives], scores[best], atol=1e-5)
        assert [negative.rank for negative in row.negatives] == best.tolist()
        positive = cross_encoder.predict([(row.query, row.positive)], show_progress_bar=False)
        assert row.positive_score == pytest.approx(float(positive[0]), abs=1e-5)
    two = make_cross_encoder(num_labels=2)
    with pytest.raises(ValueError, match="gives 2 numbers for a pair"):
        mined(tiny_model, collection, cross_encoder=two)


def test_bm25_finds_shared_words_in_any_script() -> None:
    cut = Words().cut
    assert cut("The Nile-river, 2nd!") == ["the", "nile", "river", "2nd"]
    assert cut("हिन्दी की नदी") == ["हिन्दी", "की", "नदी"]  # vowel signs belong to their word
    assert cut("東京都はABC") == ["東京", "京都", "都は", "abc"]
    documents = {"a": "नदी लंबी है", "b": "शहर बड़ा है", "c": "the river is long", "d": "river river lake"}
    collection = Collection.from_dict(documents, {"q": "x"}, {"q": {"a": 1}})
    bm25 = BM25(collection.corpus, show_progress_bar=False)
    assert bm25.search(["नदी", "lake", "nothing", "river"], 3).tolist() == [
        [0, -1, -1],
        [3, -1, -1],
        [-1, -1, -1],
        [3, 2, -1],
    ]


@settings(max_examples=40, deadline=None)
@given(
    first=st.permutations(range(8)),
    second=st.permutations(range(4, 12)),
    missing=st.integers(0, 4),
    k=st.integers(1, 14),
)
def test_fusion_is_the_sum_of_reciprocal_ranks(first: list[int], second: list[int], missing: int, k: int) -> None:
    second = [*second[: 8 - missing], *[-1] * missing]
    fused = fuse(np.array([first]), np.array([second]), k=k)[0].tolist()
    scores: dict[int, float] = {}
    for ranking in (first, second):
        for rank, place in enumerate(ranking, start=1):
            if place >= 0:
                scores[place] = scores.get(place, 0.0) + 1 / (60 + rank)
    expected = sorted(scores, key=lambda place: (-scores[place], place))[:k]
    np.testing.assert_allclose([scores[p] for p in fused if p >= 0], [scores[p] for p in expected])
    assert len(fused) == k
    assert fused[len(expected) :] == [-1] * (k - len(expected))


def test_fusion_counts_ranks_from_one() -> None:
    """Place 99 leads one ranking, place 1 is 62nd in both: 1/61 = 2/122, and equal scores go by place."""
    first, second = ([*range(100, 161), 1], [99, *range(200, 260), 1])
    fused = fuse(np.array([first]), np.array([second]), k=3)[0].tolist()
    assert fused == [1, 99, 100]


@pytest.mark.parametrize("candidates", ["bm25", "mixed"])
def test_candidates_from_words_have_the_models_scores(tiny_model: SentenceTransformer, candidates: str) -> None:
    collection = make_collection()
    options = {"num_negatives": 2, "prefer_known_queries": False, "dtype": "model"}
    found = mined(tiny_model, collection, **options, candidates=candidates)
    assert found.rows != mined(tiny_model, collection, **options).rows
    for row in found.rows:
        assert row.positive_id not in {negative.doc_id for negative in row.negatives}
        asked = tiny_model.encode_query([row.query])
        for negative in row.negatives:
            if negative.score is not None:
                expected = float(tiny_model.similarity(asked, tiny_model.encode_document([negative.text])))
                assert negative.score == pytest.approx(expected, abs=1e-5)
        if candidates == "bm25":
            ranked = [n for n in row.negatives if n.source == "ranking"]
            assert all(set(row.query.strip("?").split()) & set(n.text.split()) for n in ranked)


def test_an_approximate_index_says_its_recall(tiny_model: SentenceTransformer) -> None:
    collection = make_collection(60)
    exact = mined(tiny_model, collection, num_negatives=3)
    assert exact.account.search is None
    flat = mined(tiny_model, collection, num_negatives=3, index="Flat")
    assert flat.account.search == {"index": "Flat", "recall": 1.0, "recall_queries": 12}
    assert "recall of Flat against exact search" in str(flat.account)
    rough = mined(tiny_model, collection, num_negatives=5, index="SQ4", prefer_known_queries=False)
    for row in rough.rows:  # by their true scores, whatever the codes of the index say
        scores = [negative.score for negative in row.negatives]
        assert scores == sorted(scores, reverse=True)
    coarse = mined(tiny_model, collection, num_negatives=3, index="IVF8,Flat", nprobe=1)
    assert coarse.account.search["recall"] < 1.0
    assert all(len(row.negatives) == 3 for row in coarse.rows)
    with pytest.raises(ValueError, match="FAISS cannot make an index 'Bogus7'"):
        mined(tiny_model, collection, index="Bogus7")
    with pytest.raises(ValueError, match="IVF4096,Flat has 4096 lists, and the store holds 60 documents"):
        mined(tiny_model, collection, index="IVF4096,Flat")


def test_details_and_account_come_with_the_dataset(tiny_model: SentenceTransformer, tmp_path: Path) -> None:
    options = {"num_negatives": 2, "show_progress_bar": False, "verbose": False}
    dataset = mine_hard_negatives(tiny_model, make_collection(), **options, output_details=True)
    plain = mine_hard_negatives(tiny_model, make_collection(), **options)
    assert set(dataset.column_names) == {*plain.column_names, *DETAIL_COLUMNS}
    assert dataset.remove_columns(DETAIL_COLUMNS)[:] == plain[:]
    rows = mined(tiny_model, make_collection(), num_negatives=2).rows
    assert dataset["negative_ids"][:] == [[negative.doc_id for negative in row.negatives] for row in rows]
    assert dataset["negative_sources"][0] == ["ranking", "ranking"]
    assert plain.info.description.startswith("toy: 12 rows from 12 queries, 24 negatives")


def test_the_account_knows_how_scores_lie_and_draws_them(tiny_model: SentenceTransformer, tmp_path: Path) -> None:
    account = mined(tiny_model, make_collection(), num_negatives=2, absolute_margin=0.05).account
    found = account.scores["positives"]
    assert sum(found.counts) == found.count == 12
    assert found.quantiles == sorted(found.quantiles)
    assert sum(d.count for name, d in account.scores.items() if name != "positives") == 24
    account.plot(tmp_path / "scores.png")
    assert (tmp_path / "scores.png").read_bytes().startswith(b"\x89PNG")
    empty = mined(tiny_model, make_collection(), **STRICT, on_shortage="drop").account
    with pytest.raises(ValueError, match="toy: there are no rows to plot"):
        empty.plot(tmp_path / "none.png")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"on_shortage": "lose"}, "on_shortage must be one of relax, random, fewer, drop, got 'lose'"),
        ({"candidates": "luck"}, "candidates must be one of model, bm25, mixed, got 'luck'"),
        ({"duplicate_threshold": 1.5}, "duplicate_threshold must be at least -1 and at most 1, got 1.5"),
        ({"nprobe": 3}, "nprobe is for an approximate index"),
        ({"max_queries": 0}, "max_queries must be at least 1, got 0"),
        ({"index": "HNSW32", "candidates": "bm25"}, "BM25 ranks by itself"),
        ({"max_score": float("nan")}, "max_score must be a finite number, got nan"),
        ({"min_score": 0.9, "max_score": 0.1}, "min_score must not be above max_score"),
        ({"num_negatives": 2.5}, "num_negatives must be of the kind int, got 2.5"),
        ({"range_max": True}, "range_max must be of the kind int, got True"),
        ({"queries_per_negative": -1}, "queries_per_negative must be at least 0, got -1"),
    ],
)
def test_options_that_cannot_be_meant_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        MiningOptions(**options)


def test_texts_that_are_no_text_are_refused() -> None:
    with pytest.raises(CollectionError, match="document 'b' must be a text under an id that is a text; it is int"):
        Collection.from_dict({"a": "x", "b": 3}, {"q": "y"}, {"q": {"a": 1}})
    with pytest.raises(CollectionError, match="query 'q' must be a text under an id that is a text; it is NoneType"):
        Collection.from_dict({"a": "x"}, {"q": None}, {"q": {"a": 1}})


@pytest.mark.parametrize(("name", "options"), [("bm25s", {"candidates": "bm25"}), ("matplotlib", {})])
def test_what_is_not_installed_is_named(
    tiny_model: SentenceTransformer, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, name: str, options: dict[str, Any]
) -> None:
    monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.setitem(sys.modules, f"{name}.figure", None)
    extra = {"bm25s": "bm25", "matplotlib": "plots"}[name]
    with pytest.raises(ModuleNotFoundError, match=rf"pip install 'st-clp\[{extra}\]'"):
        mined(tiny_model, make_collection(), **options).account.plot(tmp_path / "x.png")


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"index": "Bogus7"}, ValueError, "FAISS cannot make an index 'Bogus7'"),
        ({"candidates": "bm25"}, ModuleNotFoundError, "pip install"),
        ({"output_file": "FOLDER"}, OSError, "Is a directory"),
        ({"output_file": "FILE/rows.jsonl"}, OSError, "FILE"),
        ({"cross_encoder": 2}, ValueError, "gives 2 numbers for a pair"),
        ({"collection": {"d": "x"}}, TypeError, "collection must be a Collection, got dict"),
        ({"model": "name"}, TypeError, "model must be a SentenceTransformer, got str"),
    ],
)
def test_what_cannot_work_is_refused_before_anything_is_encoded(
    tiny_model: SentenceTransformer,
    make_cross_encoder: Callable[..., CrossEncoder],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    options: dict[str, Any],
    error: type[Exception],
    message: str,
) -> None:
    monkeypatch.setitem(sys.modules, "bm25s", None)
    (tmp_path / "FOLDER").mkdir()
    (tmp_path / "FILE").write_text("x")

    def forbidden(*arguments: Any, **options: Any) -> Any:
        raise AssertionError("encoded")

    monkeypatch.setattr(tiny_model, "preprocess", forbidden)
    options = {"model": tiny_model, "collection": make_collection(), **options}
    if "output_file" in options:
        options["output_file"] = tmp_path / options["output_file"]
    if "cross_encoder" in options:
        options["cross_encoder"] = make_cross_encoder(num_labels=2)
    with pytest.raises(error, match=message):
        mine_hard_negatives(**options, show_progress_bar=False)


def test_copies_of_an_answer_are_counted(tiny_model: SentenceTransformer) -> None:
    texts = {"a": "the river", "copy": "the river", "b": "a lake", "c": "a city"}
    collection = Collection.from_dict(texts, {"q": "which river?"}, {"q": {"a": 1}})
    account = mined(tiny_model, collection, num_negatives=2, range_min=0).account
    assert account.filtered == {"same text as a relevant document": 1}
    skipped = mined(tiny_model, make_collection(), num_negatives=2, range_min=3).account
    assert skipped.filtered == {"among the best range_min": 3 * 12}
    assert "candidates passed over: among the best range_min" in str(skipped)
