"""What can be a candidate: the query itself never, by its id in a run and by its text too among negatives."""

from __future__ import annotations

import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st

from st_clp.search import is_own_document, is_own_text, may_be_negative, normalised_text

words = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        ("which river", "which river", True),
        (" which\n river\t", "which river", True),
        ("which\u3000river\u00a0?", "which river ?", True),  # ideographic and no-break spaces
        ("Zürich", "Zu\u0308rich", True),
        ("한국", unicodedata.normalize("NFD", "한국"), True),
        ("ＮＨＫ", "NHK", True),  # full width
        ("which river", "Which river", False),
        ("which river", "which river?", False),
        ("", "which river", False),
    ],
)
def test_what_the_same_text_is(one: str, other: str, same: bool) -> None:
    assert is_own_text(one, other) is same
    assert may_be_negative("q", one, "d", other) is not same


@given(words)
def test_a_normalised_text_stays_as_it_is(text: str) -> None:
    assert normalised_text(normalised_text(text)) == normalised_text(text)
    assert is_own_text(text, f" {text}\n")


@given(st.text(max_size=5), st.text(max_size=5))
def test_the_switch_decides_on_ids_alone(query_id: str, doc_id: str) -> None:
    assert is_own_document(query_id, doc_id) is (query_id == doc_id)
    assert not is_own_document(query_id, doc_id, ignore_identical_ids=False)
    assert may_be_negative(query_id, "a", doc_id, "b") is (query_id != doc_id)
    assert may_be_negative(query_id, "a", doc_id, "b", ignore_identical_ids=False)
