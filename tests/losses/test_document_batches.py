"""Batches of near documents: every row once, several rows of a document together, and near documents beside it."""

from __future__ import annotations

import math
import random
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset
from hypothesis import given
from hypothesis import strategies as st
from sentence_transformers import (
    SentenceTransformer,
    SentenceTransformerTrainer,
    SentenceTransformerTrainingArguments,
)

from st_clp import CLPLoss, DocumentBatchSampler
from st_clp.losses.document_batches import document_batches, near_documents

rows_of_texts = st.lists(
    st.tuples(st.integers(0, 9), st.lists(st.integers(0, 12), max_size=3)), min_size=1, max_size=60
)


@given(rows=rows_of_texts, batch_size=st.integers(1, 20), together=st.integers(1, 5), seed=st.integers(0, 99))
def test_every_row_stands_in_one_batch(
    rows: list[tuple[int, list[int]]], batch_size: int, together: int, seed: int
) -> None:
    positives = [str(positive) for positive, _ in rows]
    near = near_documents(positives, [[str(text) for text in negatives] for _, negatives in rows])
    made = [
        document_batches(
            [str(number % 7) for number in range(len(rows))],
            positives,
            near,
            batch_size=batch_size,
            queries_per_document=together,
            generator=random.Random(seed),
        )
        for _ in range(2)
    ]
    assert made[0] == made[1]
    assert sorted(number for batch in made[0] for number in batch) == list(range(len(rows)))
    assert [len(batch) for batch in made[0][:-1]] == [batch_size] * (len(made[0]) - 1)
    assert 1 <= len(made[0][-1]) <= batch_size


def asked(positives: list[str]) -> list[str]:
    """A query of its own for each row."""
    return [f"query {number}" for number in range(len(positives))]


def _rows_of_neighbourhoods(neighbourhoods: int, documents: int, queries: int) -> tuple[list[str], list[list[str]]]:
    """Rows whose negatives are other documents of the neighbourhood of the positive."""
    positives, negatives = [], []
    for neighbourhood in range(neighbourhoods):
        texts = [f"{neighbourhood}:{document}" for document in range(documents)]
        for place, text in enumerate(texts):
            for query in range(queries):
                positives.append(text)
                negatives.append([texts[(place + 1 + query) % documents], texts[place - 1]])
    return positives, negatives


def test_a_batch_is_a_neighbourhood_with_several_queries_for_each_document() -> None:
    positives, negatives = _rows_of_neighbourhoods(10, 8, 4)
    near = near_documents(positives, negatives)
    batches = document_batches(
        asked(positives), positives, near, batch_size=32, queries_per_document=4, generator=random.Random(3)
    )
    assert len(batches) == 10
    for batch in batches:
        texts = [positives[number] for number in batch]
        assert len(set(texts)) == 8
        assert len({text.partition(":")[0] for text in texts}) == 1
        assert sum(one != other for one, other in pairwise(texts)) == 7  # rows of a document stand together


def test_no_query_meets_another_of_its_answers_as_a_negative() -> None:
    """Every query has two answers, which are near each other, so they would come together."""
    anchors, positives = [], []
    for query in range(40):
        for answer in (f"d{query}", f"d{(query + 1) % 40}"):
            anchors.append(f"q{query}")
            positives.append(answer)
    near = {f"d{i}": [f"d{(i + 1) % 40}", f"d{(i - 1) % 40}"] for i in range(40)}
    answers = {(anchor, positive) for anchor, positive in zip(anchors, positives, strict=True)}
    batches = document_batches(anchors, positives, near, batch_size=8, generator=random.Random(1))
    assert sorted(number for batch in batches for number in batch) == list(range(80))
    met = [
        sum((anchors[one], positives[other]) in answers and positives[one] != positives[other] for other in batch)
        for batch in batches
        for one in batch
    ]
    assert sum(met[:-16]) == 0  # what is left at the end may have no other place
    # Where nothing else is to be had, rows stand together all the same.
    alike = document_batches(["q"] * 10, asked(positives)[:10], {}, batch_size=4, generator=random.Random(1))
    assert [len(batch) for batch in alike] == [4, 4, 2]


def test_more_queries_of_a_document_come_in_other_batches() -> None:
    positives = [str(number % 6) for number in range(6 * 9)]
    batches = document_batches(
        asked(positives), positives, {}, batch_size=12, queries_per_document=3, generator=random.Random(0)
    )
    assert len(batches) == math.ceil(54 / 12)
    # Three at a time: six documents come by three times, and every batch has at least a few of them.
    assert all(len({positives[number] for number in batch}) >= 2 for batch in batches)


def test_the_nearest_is_what_is_named_most_often() -> None:
    assert near_documents(["a", "b", "a"], [["x", "y"], ["a"], ["y"]]) == {"a": ["y", "x"], "b": ["a"]}


def _dataset(neighbourhoods: int = 4) -> Dataset:
    positives, negatives = _rows_of_neighbourhoods(neighbourhoods, 3, 2)
    texts = {text: f"the river of the {text.replace(':', ' and the ')}" for text in positives}
    return Dataset.from_dict(
        {
            "anchor": [f"which river {number}" for number in range(len(positives))],
            "positive": [texts[text] for text in positives],
            "negative": [texts[one[0]] for one in negatives],
        }
    )


def test_epochs_differ_and_are_the_same_again() -> None:
    sampler = DocumentBatchSampler(_dataset(), 6, drop_last=False, seed=5)
    first = list(sampler)
    sampler.set_epoch(1)
    second = list(sampler)
    sampler.set_epoch(0)
    assert list(sampler) == first != second
    assert len(sampler) == len(first) == 4


def test_the_last_batch_may_be_left_out() -> None:
    dataset = _dataset()
    for drop_last, expected in ((False, [10, 10, 4]), (True, [10, 10])):
        sampler = DocumentBatchSampler(dataset, 10, drop_last=drop_last)
        assert [len(batch) for batch in sampler] == expected
        assert len(sampler) == len(expected)


def test_a_dataset_without_a_positive_is_refused() -> None:
    dataset = Dataset.from_dict({"anchor": ["a"], "label": [1]})
    with pytest.raises(ValueError, match="needs a dataset with an anchor and a positive; this one has anchor"):
        DocumentBatchSampler(dataset, 2, drop_last=False, valid_label_columns=["label"])


def test_the_trainer_takes_it(tiny_model: SentenceTransformer, tmp_path: Path) -> None:
    """Near documents, by the negatives in the dataset, come together, and the model reads each once."""
    read: list[int] = []
    tiny_model.register_forward_pre_hook(lambda module, arguments: read.append(len(arguments[0]["input_ids"])))
    arguments: dict[str, Any] = {"report_to": "none", "use_cpu": True, "disable_tqdm": True, "save_strategy": "no"}
    trainer = SentenceTransformerTrainer(
        model=tiny_model,
        args=SentenceTransformerTrainingArguments(
            output_dir=str(tmp_path),
            per_device_train_batch_size=12,
            num_train_epochs=1,
            batch_sampler=DocumentBatchSampler,
            **arguments,
        ),
        train_dataset=_dataset(),
        loss=CLPLoss(tiny_model, queries_per_negative=0, encode_once=True),
    )
    read.clear()
    trainer.train()
    # Two batches of 12 rows, each one pass; the three documents of a neighbourhood are one another's negatives.
    assert read == [18, 18]
