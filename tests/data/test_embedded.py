"""The embedded collection: what is in it, and that it needs nothing but itself."""

from __future__ import annotations

from collections import Counter

import pytest

from st_clp import Collection
from st_clp.data import CollectionError
from st_clp.data.sources.embedded import LANGUAGES
from tests.fresh import run_fresh


@pytest.fixture(params=LANGUAGES)
def splits(request: pytest.FixtureRequest) -> dict[str, Collection]:
    return {split: Collection.load(f"embedded/{request.param}/{split}") for split in ("train", "dev")}


def test_sizes_and_ids(splits: dict[str, Collection]) -> None:
    documents = {document.doc_id: document for document in splits["train"].documents()}
    assert len(documents) >= 350
    assert list(splits["dev"].documents()) == list(documents.values())
    assert len(splits["train"].queries) >= 500
    assert len(splits["dev"].queries) >= 200
    assert not splits["train"].queries.keys() & splits["dev"].queries.keys()
    for collection in splits.values():
        assert not collection.left_out
        assert all(identifier.startswith(f"{collection.language}-") for identifier in [*documents, *collection.queries])
        for grades in collection.judgments.values():
            assert set(grades.values()) == {1}
            assert grades.keys() <= documents.keys()


def test_texts_do_not_repeat(splits: dict[str, Collection]) -> None:
    documents = list(splits["train"].documents())
    queries = [query for collection in splits.values() for query in collection.queries.values()]
    for values in ([d.text for d in documents], [d.title for d in documents], queries):
        assert [value for value, times in Counter(values).items() if times > 1] == []


def test_no_document_answers_in_both_splits_of_any_language() -> None:
    answering: dict[str, set[str]] = {"train": set(), "dev": set()}
    for language in LANGUAGES:
        for split, found in answering.items():
            for grades in Collection.load(f"embedded/{language}/{split}").judgments.values():
                found |= {doc_id.removeprefix(f"{language}-") for doc_id in grades}
    assert answering["train"]
    assert answering["dev"]
    assert not answering["train"] & answering["dev"]


def test_changing_a_loaded_collection_leaves_the_next_one_alone() -> None:
    first = Collection.load("embedded/en/dev")
    size = len(first.judgments)
    next(iter(first.judgments.values())).clear()
    first.judgments.popitem()
    again = Collection.load("embedded/en/dev").judgments
    assert len(again) == size
    assert all(again.values())


def test_another_language_or_split_is_refused() -> None:
    with pytest.raises(CollectionError, match="embedded/"):
        Collection.load("embedded/sw/dev")
    with pytest.raises(CollectionError, match="name the split to read: dev, train"):
        Collection.load("embedded/ko/test")


def test_it_needs_no_other_package() -> None:
    script = (
        "import sys; sys.modules.update(babel=None, ir_datasets=None); from st_clp.data import Collection; "
        "print(len(Collection.load('embedded/hi/dev').queries))"
    )
    assert int(run_fresh(script).stdout) >= 200
