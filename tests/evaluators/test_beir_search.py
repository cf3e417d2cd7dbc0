"""beir's own evaluation over our encoder and search, against its own dense search."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
from beir.datasets.data_loader import GenericDataLoader
from beir.retrieval.evaluation import EvaluateRetrieval
from beir.retrieval.models import SentenceBERT
from beir.retrieval.search.dense import DenseRetrievalExactSearch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sentence_transformers import SentenceTransformer
from torch import nn

from evaluators import BEIRSearch
from st_clp.data import CollectionError

K_VALUES = [1, 3, 10]
WORDS = "the red blue river lake mountain city bank school king queen old big north gold".split()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A BEIR folder of 60 documents with and without titles, and 20 queries, some under a document's id."""
    folder = tmp_path_factory.mktemp("beir") / "scifact"
    (folder / "qrels").mkdir(parents=True)
    draw = random.Random(0)
    text = lambda: " ".join(draw.sample(WORDS, draw.randint(2, 9)))  # noqa: E731
    corpus = [{"_id": f"d{n}", "title": text() if n % 2 else "", "text": text()} for n in range(60)]
    queries = [{"_id": f"{'d' if n < 5 else 'q'}{n}", "text": corpus[n]["text"]} for n in range(20)]
    for name, rows in (("corpus", corpus), ("queries", queries)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    lines = [f"{q['_id']}\td{draw.randrange(60)}\t{draw.randint(0, 2)}\n" for q in queries for _ in range(6)]
    (folder / "qrels" / "test.tsv").write_text("query-id\tcorpus-id\tscore\n" + "".join(dict.fromkeys(lines)))
    return folder


@pytest.fixture
def loaded(folder: Path) -> tuple[Any, Any, Any]:
    return GenericDataLoader(str(folder)).load(split="test")


def beirs_own(model: SentenceTransformer) -> DenseRetrievalExactSearch:
    encoder = SentenceBERT()
    encoder.q_model = encoder.doc_model = model
    encoder.query_prefix = encoder.doc_prefix = encoder.query_prompt_name = encoder.doc_prompt_name = None
    return DenseRetrievalExactSearch(encoder, show_progress_bar=False)


def ours(model: SentenceTransformer, *arguments: Any) -> BEIRSearch:
    return BEIRSearch(model, *arguments, dtype="model", show_progress_bar=False)


@pytest.mark.parametrize("score_function", ["cos_sim", "dot"])
@pytest.mark.parametrize("normalize", [True, False])
def test_the_figures_are_those_of_beirs_own_dense_search(
    loaded: tuple[Any, Any, Any], make_tiny_model: Any, score_function: str, normalize: bool
) -> None:
    corpus, queries, qrels = loaded
    model = make_tiny_model(normalize=normalize)
    found = []
    for searcher in (beirs_own(model), ours(model)):
        retrieval = EvaluateRetrieval(searcher, K_VALUES, score_function)
        results = retrieval.retrieve(corpus, queries)
        found.append((results, retrieval.evaluate(qrels, results, K_VALUES)))
    (expected, expected_figures), (results, figures) = found
    assert figures == expected_figures
    assert 0 < figures[0]["NDCG@10"] < 1
    assert results.keys() == expected.keys()
    for query_id, scores in results.items():
        assert len(scores) == max(K_VALUES)
        assert query_id not in scores
        assert list(scores.values()) == sorted(scores.values(), reverse=True)
        assert scores == pytest.approx(expected[query_id], abs=1e-5)


def test_without_a_score_function_the_models_own_similarity_counts(loaded, make_tiny_model) -> None:
    corpus, queries, _ = loaded
    model = make_tiny_model(normalize=False)
    for name, other in (("dot", "dot"), ("cosine", "cos_sim"), ("euclidean", None)):
        model.similarity_fn_name = name
        found = ours(model).search(corpus, queries, 5)
        if other:
            assert found == ours(model).search(corpus, queries, 5, other)
        else:
            assert all(score <= 0 for scores in found.values() for score in scores.values())


def test_embeddings_are_kept_and_used_again(loaded, tiny_model: SentenceTransformer, tmp_path: Path) -> None:
    corpus, queries, _ = loaded
    rows = count_rows(tiny_model)
    searcher = ours(tiny_model, tmp_path / "kept")
    first = searcher.search(corpus, queries, 5, "cos_sim")
    assert sum(rows) == len(corpus) + len(queries)
    rows.clear()
    assert ours(tiny_model, tmp_path / "kept").search(corpus, queries, 5, "cos_sim") == first
    assert not rows
    corpus["d3"] = {"title": "", "text": "a new text"}
    again = ours(tiny_model, tmp_path / "kept").search(corpus, queries, 5, "cos_sim")
    assert sum(rows) == 1
    assert again == ours(tiny_model).search(corpus, queries, 5, "cos_sim")
    assert {path.name for path in tmp_path.iterdir() if path.is_dir()} == {"kept", "kept.queries"}


def test_encoded_first_and_searched_later(loaded, tiny_model: SentenceTransformer, tmp_path: Path) -> None:
    corpus, queries, _ = loaded
    retrieval = EvaluateRetrieval(ours(tiny_model), K_VALUES)
    expected = retrieval.retrieve(corpus, queries)
    path = str(tmp_path / "embeddings")
    assert retrieval.encode_and_retrieve(corpus, queries, path) == expected
    rows = count_rows(tiny_model)
    assert retrieval.encode_and_retrieve(corpus, queries, path) == expected
    assert not rows
    assert retrieval.encode_and_retrieve(corpus, queries, path, overwrite=True) == expected
    assert sum(rows) == len(corpus) + len(queries)
    assert not [file for file in (tmp_path / "embeddings").rglob("*") if file.is_file() and file.suffix == ".pkl"]


@given(cut=st.integers(1, 59), top_k=st.integers(1, 70))
@settings(max_examples=10, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_parts_of_a_corpus_are_searched_as_the_whole(
    cut: int, top_k: int, loaded, tiny_model, tmp_path_factory
) -> None:
    corpus, queries, _ = loaded
    folder = tmp_path_factory.mktemp("parts")
    ids = list(corpus)
    parts = []
    for number, part in enumerate((ids[:cut], ids[cut:])):
        ours(tiny_model).encode(
            {doc_id: corpus[doc_id] for doc_id in part}, queries, str(folder), corpus_filename=f"corpus.{number}"
        )
        parts.append(str(folder / f"corpus.{number}"))
    found = ours(tiny_model).search_from_files(str(folder / "queries.pkl"), parts, top_k)
    expected = ours(tiny_model).search(corpus, queries, top_k)
    assert found.keys() == expected.keys()
    for query_id, scores in found.items():
        assert len(scores) == min(top_k, len(corpus) - (query_id in corpus))
        assert list(scores.values()) == pytest.approx(list(expected[query_id].values()), abs=1e-6)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"corpus": {}}, "corpus is empty"),
        ({"corpus": {"d 1": {"text": "x"}}}, r"the corpus: the document id 'd 1' .*white space"),
        ({"corpus": {"d1": {"title": "x"}}}, r"'d1' must have a 'text'"),
        ({"corpus": {"d1": {"text": None}}}, r"'d1' must have a 'text'"),
        ({"queries": {"": "x"}}, r"the queries: the query id ''"),
        ({"top_k": 0}, "top_k must be at least 1, got 0"),
        ({"score_function": "cosine"}, "score_function must be one of cos_sim, dot"),
    ],
)
def test_bad_input_is_refused(change: dict[str, Any], message: str, tiny_model: SentenceTransformer) -> None:
    given = {"corpus": {"d1": {"text": "x"}}, "queries": {"q": "x"}, "top_k": 1, "score_function": "dot"} | change
    with pytest.raises((CollectionError, ValueError), match=message):
        ours(tiny_model).search(**given)


def test_pickles_are_neither_read_nor_replaced(loaded, tiny_model: SentenceTransformer, tmp_path: Path) -> None:
    corpus, queries, _ = loaded
    pickle = tmp_path / "queries.pkl"
    pickle.write_bytes(b"\x80\x04.")
    with pytest.raises(ValueError, match=r"queries\.pkl is a file"):
        ours(tiny_model).encode(corpus, queries, str(tmp_path))
    with pytest.raises(ValueError, match="pickles, which are not read"):
        ours(tiny_model).search_from_files(str(pickle), [str(tmp_path)], 1)
    assert pickle.read_bytes() == b"\x80\x04."
    with pytest.raises(ValueError, match="encode them first"):
        ours(tiny_model).search_from_files(str(tmp_path), [], 1)


def count_rows(model: SentenceTransformer) -> list[int]:
    """Filled with the number of texts of each forward pass."""
    rows: list[int] = []

    def note(_module: nn.Module, _given: Any, output: dict[str, Any]) -> None:
        rows.append(len(output["sentence_embedding"]))

    model[1].register_forward_hook(note)
    return rows
