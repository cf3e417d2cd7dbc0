"""Queries made of a document's own sentences."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from st_clp.data import Collection, Document
from st_clp.queries import SentenceQueries, add_sentence_queries, make_chain
from st_clp.queries.own_text import is_made, lead, part_of_sentence, queries_of, sentences
from tests.toy import make_collection

WORD = st.text("abcdefgh", min_size=1, max_size=9)
SENTENCE = st.lists(WORD, min_size=1, max_size=40).map(" ".join)
TEXT = st.lists(SENTENCE, min_size=1, max_size=8).map(lambda found: ". ".join(found) + ".")


def is_without_one_run(part: list[str], whole: list[str]) -> bool:
    """Whether ``part`` is a stretch of ``whole`` with one run of it left out."""
    return any(
        whole[begin : begin + kept] == part[:kept]
        and any(whole[at : at + len(part) - kept] == part[kept:] for at in range(begin + kept + 1, len(whole) + 1))
        for kept in range(len(part) + 1)
        for begin in range(len(whole) - kept + 1)
    )


@given(text=TEXT, number=st.integers(1, 9), seed=st.integers(0, 5))
@settings(deadline=None)
def test_each_query_is_a_part_of_another_sentence_of_its_document(text: str, number: int, seed: int) -> None:
    found = queries_of(Document("d", text), number, seed)
    own = [sentence.rstrip(".").split() for sentence in sentences(text)]
    long_enough = [sentence for sentence in own if len(sentence) >= 5]
    assert len(found) <= min(number, len(long_enough))
    assert bool(found) == bool(long_enough)
    assert len(set(found)) == len(found)
    for query in found:
        words = query.split()
        assert 2 <= len(words) <= 18
        assert any(is_without_one_run(words, sentence) for sentence in own), (query, own)
    assert queries_of(Document("d", text), number, seed) == found


TEXTS = {
    "ko": ("노아의 방주는 고페르나무로 되고 안쪽에는 역청이 칠해져 있다. 그 길이는 삼백 큐빗이었다고 한다.", 2),
    "fa": ("این شهر در کنار رودخانه‌ای بزرگ ساخته شده است؟ بله، این شهر بسیار قدیمی و زیبا است.", 2),
    "hi": ("यह नदी पहाड़ों से निकल कर समुद्र में गिरती है। इसका पानी बहुत ठंडा और साफ रहता है।", 2),
    "ja": ("この川は北の山から流れて海に注いでいる。その水はとても冷たくて澄んでいる。短い。", 2),
    "en": ("The river is 3.14 km long in the north.\nA second line is a sentence too, I think.", 2),
    "short": ("short text.", 0),
    "none": ("…", 0),
}


@pytest.mark.parametrize(("text", "number"), TEXTS.values(), ids=TEXTS)
def test_sentences_of_every_script(text: str, number: int) -> None:
    document = Document("d", text)
    found = queries_of(document, 9, 0)
    assert len(found) == number
    for query in found:
        assert not query.endswith((".", "。", "।", "؟"))
        assert 3 <= len(query) <= 0.85 * max(map(len, sentences(text)))  # something is left out
        assert set(query) <= set(text) | {" "}


def test_a_title_before_the_text_is_no_part_of_a_sentence() -> None:
    document = Document("d", "Old river of kings The water flows to the sea and is cold.", "Old river of kings")
    (query,) = queries_of(document, 3, 0)
    assert not {"Old", "kings"} & set(query.split())


@given(number=st.integers(0, 60), seed=st.integers(0, 3))
@settings(deadline=None, max_examples=30)
def test_a_collection_gets_so_many_evenly_spread_and_keeps_its_own(number: int, seed: int) -> None:
    text = "the {one} of {other} {number} is old and cold. in {one} {number} there was one {other} and a king."
    collection = make_collection(20, 6, text=text)
    more = add_sentence_queries(collection, number, seed)
    made = {query_id: grades for query_id, grades in more.judgments.items() if is_made(query_id)}
    assert {q: more.queries[q] for q in collection.queries} == collection.queries
    assert {q: more.judgments[q] for q in collection.judgments} == collection.judgments
    assert len(made) == len(more.judgments) - 6 <= number
    each = Counter(doc_id for grades in made.values() for doc_id in grades)
    assert max(each.values(), default=0) <= (1 if number <= 20 else 2)
    if number == 60:
        assert len(made) >= 36  # all but a few that say too little to be of one document alone
    if 20 < number <= 36:
        assert len(each) == 20
    texts = {document.doc_id: document.text for document in collection.documents()}
    for query_id, grades in made.items():
        (doc_id,) = grades
        assert set(more.queries[query_id].split()) <= set(texts[doc_id].replace(".", "").split())
    assert add_sentence_queries(collection, number, seed) == more


@given(each=st.integers(1, 6), number=st.integers(1, 30))
@settings(deadline=None, max_examples=30)
def test_documents_may_be_drawn_so_that_each_has_several(each: int, number: int) -> None:
    # No word stands twice, so no two parts of sentences are the same.
    texts = {f"d{n}": " ".join(" ".join(f"{w}{n}x{m}" for w in "abcdefgh") + "." for m in range(6)) for n in range(12)}
    collection = Collection.from_dict(texts, {"q": "which?"}, {"q": {"d0": 1}})
    more = add_sentence_queries(collection, number, 0, each=each)
    made = Counter(doc for query, found in more.judgments.items() if is_made(query) for doc in found)
    assert len(made) == min(12, -(-number // each))
    assert made.total() == min(number, 6 * len(made))
    assert min(made.values()) >= min(6, number // len(made))


def test_what_two_documents_say_alike_is_no_query() -> None:
    same = "all of these pages were copied from one old book"
    documents = {f"d{n}": f"{same}. the {n} {n} {n} {n} {n} {n} {n} {n} {n}" for n in "abc"}
    collection = Collection.from_dict(documents, {"q": "which?"}, {"q": {"da": 1}})
    more = add_sentence_queries(collection, 100, 0)
    assert not any(set(query.split()) <= set(same.split()) for query in more.queries.values())
    assert {doc_id for query_id, found in more.judgments.items() if is_made(query_id) for doc_id in found} == set(
        documents
    )


def test_it_is_a_source_like_others() -> None:
    documents = [
        Document("long", "the river of the north is old. its water is cold and very clear."),
        Document("x", "x"),
    ]
    with make_chain("sentence*0.3", show_progress_bar=False) as chain:
        found, account = chain.generate(documents)
    (query,) = found["long"].queries
    assert (query.source, query.weight) == ("sentence", 0.3)
    assert account.without == {"sentence: empty": 1}
    assert query.text in {part.text for part in next(SentenceQueries(samples=2).generate(documents)).queries}


def test_part_of_a_long_sentence_is_short() -> None:
    import random

    part = part_of_sentence(" ".join(f"w{n}" for n in range(300)), random.Random(0))
    assert part is not None
    assert len(part.split()) <= 18
    assert lead("w " * 300).startswith("w w")
