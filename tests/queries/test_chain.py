"""The chain in mining: the first that knows wins, nothing comes near a row's own query, and everything is counted."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from sentence_transformers import SentenceTransformer

from st_clp import Collection, mine_hard_negatives
from st_clp.data import Document, MemoryCorpus
from st_clp.mining import DETAIL_COLUMNS, MinedNegatives, MiningOptions, mine
from st_clp.mining.rows import read_rows, write_rows
from st_clp.queries import (
    DocumentQueries,
    QueryChain,
    QueryOptions,
    QuerySource,
    TitleOrLead,
    make_chain,
    parse_sources,
)
from tests import toy

from .conftest import Endpoint


def make_collection(documents: int = 30, queries: int = 12) -> Collection:
    """With sentences, of which the first is a document's lead."""
    return toy.make_collection(documents, queries, text="document {number} : the {one} of {other}. it is {number}")


def mined(model: SentenceTransformer, collection: Collection, sources: Any, **options: Any) -> MinedNegatives:
    made = {name: options.pop(name) for name in list(options) if name in QueryOptions.__dataclass_fields__}
    return mine(
        model,
        collection,
        MiningOptions(num_negatives=6, prefer_known_queries=False, **options),
        negative_queries=sources,
        query_options=QueryOptions(**made),
        dtype="model",
        show_progress_bar=False,
    )


class Says(QuerySource):
    """Says what it is told to."""

    def __init__(self, texts: dict[str, list[str]], name: str = "says", weight: float = 0.7) -> None:
        self.texts, self.name, self.weight = texts, name, weight
        self.asked: list[str] = []

    def generate(self, documents: Any, *, language: str | None = None) -> Any:
        for document in documents:
            self.asked.append(document.doc_id)
            yield DocumentQueries(document.doc_id, self._mark(self.texts.get(document.doc_id, [])))


def test_the_first_that_knows_wins_and_marks_its_query(tiny_model: SentenceTransformer) -> None:
    collection = make_collection()
    found = mined(tiny_model, collection, "judgments,title*0.25")
    negatives = [negative for row in found.rows for negative in row.negatives]
    for negative in negatives:
        ((source,), (weight,)) = negative.query_sources, negative.query_weights
        if int(negative.doc_id[1:]) < 12:
            assert (source, weight) == ("judgments", 1.0)
            assert negative.queries == (collection.queries["q" + negative.doc_id[1:]],)
        else:
            assert (source, weight) == ("lead", 0.25)
            assert negative.queries == (negative.text.partition(" it is")[0],)
    counts = found.account.query_sources
    assert counts == {kind: sum(n.query_sources[0] == kind for n in negatives) for kind in ("judgments", "lead")}
    assert all(counts.values())
    assert found.account.with_query == len(negatives)
    assert f"{counts['lead']}    of them from lead" in str(found.account)
    # By themselves the judgments give what they always gave, and the other order asks them last.
    alone = mined(tiny_model, collection, "judgments")
    for row, other in zip(alone.rows, found.rows, strict=True):
        for negative, more in zip(row.negatives, other.negatives, strict=True):
            assert negative.queries in ((), more.queries)
    assert set(mined(tiny_model, collection, "title,judgments").account.query_sources) == {"lead"}


def test_a_row_never_gets_its_own_query_or_one_that_its_positive_answers(tiny_model: SentenceTransformer) -> None:
    collection = Collection.from_dict(
        {"a": "the river", "b": "a lake", "c": "a city", "d": "fire"},
        {"q": "Which river?", "r": "what is wet?", "s": "where is it?"},
        {"q": {"a": 1}, "r": {"a": 1}, "s": {"c": 1}},
    )
    # For b it says q's query in other letters, r's, and one of its own; for d nothing but q's.
    says = Says({"b": ["which  RIVER", "What is wet", "a good one?"], "d": ["which river"]})
    last = Says({"d": ["the last one?"]}, name="last")
    mined_rows = mine(
        tiny_model,
        collection,
        MiningOptions(num_negatives=3, queries_per_negative=3),
        negative_queries=QueryChain(["judgments", says, last]),
        show_progress_bar=False,
    )
    found = {(row.query_id, n.doc_id): set(n.queries) for row in mined_rows.rows for n in row.negatives}
    judged = {"where is it?"}
    assert found == {
        **{(query_id, "b"): {"a good one?"} for query_id in "qr"},
        **{(query_id, "c"): judged for query_id in "qr"},
        **{(query_id, "d"): {"the last one?"} for query_id in "qr"},
        ("s", "a"): {"Which river?", "what is wet?"},
        ("s", "b"): {"which  RIVER", "What is wet", "a good one?"},
        ("s", "d"): {"which river"},
    }
    assert mined_rows.account.queries_barred == 2
    assert mined_rows.account.query_sources == {"judgments": 3, "says": 4, "last": 2}
    assert set(says.asked) == {"b", "d"}  # nobody needs a query of the others that the judgments do not know


def test_a_title_that_the_positive_has_too_is_no_query_of_the_negative(tiny_model: SentenceTransformer) -> None:
    titles = {"a": "River", "b": "river ", "c": "Lake"}
    corpus = MemoryCorpus("titled", {"a": "the river", "b": "a river", "c": "a lake"}, titles)
    collection = Collection.checked(corpus, {"q": "which one?"}, {"q": {"a": 1}}, name="titled")
    found = mine(
        tiny_model,
        collection,
        MiningOptions(num_negatives=2),
        negative_queries="judgments,title",
        show_progress_bar=False,
    )
    assert {n.doc_id: n.queries for n in found.rows[0].negatives} == {"b": (), "c": ("Lake",)}
    assert found.account.queries_barred == 1


def test_weights_and_sources_reach_the_loss_the_file_and_what_is_read_from_it(
    tiny_model: SentenceTransformer, tmp_path: Path
) -> None:
    collection = make_collection()
    found = mined(tiny_model, collection, "judgments,title*0.25")
    write_rows(tmp_path / "rows.jsonl", found.rows)
    assert read_rows(tmp_path / "rows.jsonl") == found.rows
    dataset = mine_hard_negatives(
        tiny_model,
        collection,
        num_negatives=6,
        prefer_known_queries=False,
        negative_queries="judgments,title*0.25",
        dtype="model",
        output_details=True,
        show_progress_bar=False,
        verbose=False,
    )
    assert {weight for row in dataset for weight in row["label"]} == {1.0, 0.25}
    assert set(DETAIL_COLUMNS) <= set(dataset.column_names)
    for row, mined_row in zip(dataset, found.rows, strict=True):
        assert row["label"] == [negative.query_weights[0] for negative in mined_row.negatives]
        assert row["negative_query_sources"] == [list(negative.query_sources) for negative in mined_row.negatives]
    again = Collection.load(str(tmp_path / "rows.jsonl"))
    remined = mine(tiny_model, again, MiningOptions(num_negatives=6), show_progress_bar=False)
    for row in remined.rows:
        for negative in row.negatives:
            lead = negative.queries and negative.queries[0].startswith("document")
            assert (negative.query_sources, negative.query_weights) == (
                ((("lead",), (0.25,)) if lead else (("judgments",), (1.0,))) if negative.queries else ((), ())
            )
    # A file from before there were marks, and one of the paper's code, are read as ever.
    lines = [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()]
    for line in lines:
        del line["neg_q_source"], line["neg_q_weight"]
    (tmp_path / "old.jsonl").write_text("\n".join(map(json.dumps, lines)))
    old = read_rows(tmp_path / "old.jsonl")
    assert {weight for row in old for negative in row.negatives for weight in negative.query_weights} == {1.0}
    assert Collection.load(str(tmp_path / "old.jsonl")).query_marks == {}
    lines[0]["neg_q_weight"] = [["heavy"]] * 6
    (tmp_path / "bad.jsonl").write_text(json.dumps(lines[0]))
    with pytest.raises(ValueError, match=r"bad.jsonl, line 1: 'neg_q_source' and 'neg_q_weight' must give"):
        Collection.load(str(tmp_path / "bad.jsonl"))


@pytest.mark.parametrize("action", ["drop", "weight"])
def test_a_query_that_does_not_find_its_document_is_dropped_or_weighs_less(
    tiny_model: SentenceTransformer, action: str
) -> None:
    collection = make_collection()
    texts = {document.doc_id: document.text for document in collection.documents()}
    # Half of the queries are the text of their document, the others that of another one.
    said = {f"d{i}": [texts[f"d{i if i % 2 else (i + 7) % 30}"] + " ?"] for i in range(30)}
    found = mined(
        tiny_model, collection, QueryChain([Says(said, weight=0.8)]), query_round_trip=action, query_round_trip_k=1
    )
    scores = tiny_model.similarity(
        tiny_model.encode_query([said[f"d{i}"][0] for i in range(30)]), tiny_model.encode_document(list(texts.values()))
    ).numpy()
    finds = {f"d{i}": int(scores[i].argmax()) == i for i in range(30)}
    assert 5 < sum(finds.values()) < 25
    for row in found.rows:
        for negative in row.negatives:
            if finds[negative.doc_id]:
                assert negative.query_weights == (0.8,)
            else:
                assert negative.query_weights == (() if action == "drop" else (0.4,))
    asked = {negative.doc_id for row in found.rows for negative in row.negatives}
    well = sum(finds[doc_id] for doc_id in asked)
    word = "dropped" if action == "drop" else "down-weighted"
    assert found.account.query_round_trip == {"checked": len(asked), "found": well, word: len(asked) - well}
    missing = {"says: does not find its document": len(asked) - well} if action == "drop" else {}
    assert found.account.documents_without_query == missing
    # Deep enough, every document is found.
    deep = mined(
        tiny_model, collection, QueryChain([Says(said)]), query_round_trip=action, query_round_trip_k=30
    ).account.query_round_trip
    assert deep["found"] == deep["checked"] == len(asked)


def test_title_or_lead() -> None:
    documents = [
        Document("title", "River The river is long. It is wet.", "River"),
        Document("lead", "The river is 3.14 km long. It is wet."),
        Document("hi", "नदी लंबी है। वह गीली है।"),
        Document("zh", "河很长。它是湿的。"),
        Document("long", "word " * 100),
        Document("none", " … "),
    ]
    found = {answer.doc_id: answer for answer in TitleOrLead().generate(documents)}
    texts = {doc_id: answer.queries[0].text for doc_id, answer in found.items() if answer.queries}
    assert texts == {
        "title": "River",
        "lead": "The river is 3.14 km long.",
        "hi": "नदी लंबी है।",
        "zh": "河很长。",
        "long": ("word " * 32).strip(),
    }
    assert [found[doc_id].queries[0].source for doc_id in ("title", "lead")] == ["title", "lead"]
    assert found["title"].queries[0].weight == 0.5
    assert found["none"].cause == "empty"


def test_titles_come_from_every_source_that_has_them(tmp_path: Path) -> None:
    (tmp_path / "qrels").mkdir()
    (tmp_path / "corpus.jsonl").write_text('{"_id": "d", "title": " A river ", "text": "is long"}\n')
    (tmp_path / "queries.jsonl").write_text('{"_id": "q", "text": "which?"}\n')
    (tmp_path / "qrels" / "train.tsv").write_text("q\td\t1\n")
    collection = Collection.load(str(tmp_path))
    assert next(iter(collection.documents())).title == collection.get_documents(["d"])["d"].title == "A river"
    embedded = Collection.load("embedded/en", split="train")
    document = next(iter(embedded.documents()))
    assert document.title
    assert document.text.startswith(document.title)
    assert embedded.get_documents([document.doc_id])[document.doc_id] == document


@pytest.mark.parametrize(
    ("spec", "message"),
    [("judgement", "there is no source 'judgement'; the sources are judgments, local:MODEL"),
     ("local", "'local' must be local:MODEL"), ("title:x", "'title:x' must be title"),
     ("judgments,judgments", "a source stands twice"), ("judgments*0.5", "have the weight 1"),
     ("", "there is no source ''")],
)  # fmt: skip
def test_sources_that_cannot_be_meant_are_refused(spec: str, message: str) -> None:
    with pytest.raises(ValueError, match=message.replace("*", r"\*")):
        parse_sources(spec)


def test_sources_are_read_in_order_with_their_weights(tmp_path: Path) -> None:
    assert parse_sources("judgments, local:a/b:c*0.5,openai:gpt-x,title") == [
        ("judgments", "", None),
        ("local", "a/b:c", 0.5),
        ("openai", "gpt-x", None),
        ("title", "", None),
    ]
    make_chain("judgments,title", store=tmp_path / "q.sqlite").close()
    assert not list(tmp_path.iterdir())  # what costs nothing needs no file


def test_mining_with_an_endpoint_counts_what_it_cost_and_stops_at_a_wrong_key(
    tiny_model: SentenceTransformer, endpoint: Endpoint, tmp_path: Path
) -> None:
    endpoint.fault = lambda document, before: "language" if document == "10" else None
    common: dict[str, Any] = {"query_base_url": endpoint.base_url, "query_retries": 0}
    chain = make_chain("openai:tiny", QueryOptions(**common), store=tmp_path / "q.sqlite", show_progress_bar=False)
    found = mined(tiny_model, make_collection(), chain, **common)
    account = found.account
    asked = {negative.doc_id for row in found.rows for negative in row.negatives}
    assert "d10" in asked
    assert account.documents_without_query == {"openai: the wrong language": 1}
    assert account.query_usage["requests"] == len(asked) + 2
    assert account.query_usage["prompt_tokens"] + account.query_usage["completion_tokens"] == endpoint.tokens
    assert "1  documents without a query, openai: the wrong language" in str(account)
    assert json.loads(json.dumps(account.to_dict()))["query_sources"] == account.query_sources
    endpoint.fault = lambda document, before: "401"
    with pytest.raises(ValueError, match="refuses the key in OPENAI_API_KEY"):
        mined(tiny_model, make_collection(), make_chain("openai:other", QueryOptions(**common)), **common)
