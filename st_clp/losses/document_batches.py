"""Batches of similar documents, each with several of its queries.

A row with its own hard negatives encodes all of them for a single query. Where rows outnumber documents, it is cheaper
to encode a document once for several of its queries, in a batch with the documents that are hard to tell from it. Each
is then a hard negative of the others, and is held near its own queries in the same step, as CLP's penalty does for the
negatives of a row. That batches of near documents make in-batch negatives hard is from Hofstätter et al. (2021),
arXiv:2104.06967 (topic-aware sampling), and Dahiya et al. (2022), arXiv:2207.04452.
"""

from __future__ import annotations

import random
from collections import Counter, deque
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from sentence_transformers.base.sampler import DefaultBatchSampler

if TYPE_CHECKING:
    from datasets import Dataset

QUERIES_PER_DOCUMENT = 4

Near = Mapping[str, Sequence[str]]


def near_documents(positives: Sequence[str], negatives: Sequence[Sequence[str]]) -> dict[str, list[str]]:
    """Map each positive's text to the texts of its rows' negatives, the most frequent ones first.

    Args:
        positives: Of every row.
        negatives: Of every row, any number.
    """
    found: dict[str, Counter[str]] = {}
    for positive, others in zip(positives, negatives, strict=True):
        found.setdefault(positive, Counter()).update(others)
    return {positive: [text for text, _ in others.most_common()] for positive, others in found.items()}


def document_batches(
    anchors: Sequence[str],
    positives: Sequence[str],
    near: Near,
    *,
    batch_size: int,
    generator: random.Random,
    queries_per_document: int = QUERIES_PER_DOCUMENT,
) -> list[list[int]]:
    """Make an epoch of batches: every row once, in random order.

    A batch's documents are negatives of all other queries. So, as far as possible, no query shares a batch with another
    document that answers it by these rows: such a row waits for the next batch.

    Args:
        anchors: The query's text of every row.
        positives: The positive's text of every row.
        near: A text to the texts of similar documents, the nearest first; those that are no row's positive are ignored.
        batch_size: Rows of a batch; the last one has the rest.
        generator: The random generator.
        queries_per_document: How many rows of a document are put together.

    Returns:
        The row numbers of each batch.
    """
    rows: dict[str, list[int]] = {}
    for number, positive in enumerate(positives):
        rows.setdefault(positive, []).append(number)
    for numbers in rows.values():
        generator.shuffle(numbers)
    size = max(1, batch_size // queries_per_document)
    groups: list[list[int]] = []
    while rows:
        for group in _groups(list(rows), near, size, generator):
            groups.append([number for text in group for number in rows[text][:queries_per_document]])
        rows = {text: rest for text, numbers in rows.items() if (rest := numbers[queries_per_document:])}
    generator.shuffle(groups)
    return list(_apart([number for group in groups for number in group], anchors, positives, batch_size))


def _apart(
    order: Sequence[int], anchors: Sequence[str], positives: Sequence[str], batch_size: int
) -> Iterator[list[int]]:
    """Batches in this order, except for rows that have to wait."""
    answers: dict[str, set[str]] = {}
    for anchor, positive in zip(anchors, positives, strict=True):
        answers.setdefault(anchor, set()).add(positive)
    others = [answers[anchor] - {positive} for anchor, positive in zip(anchors, positives, strict=True)]
    queue = deque(order)
    while queue:
        batch: list[int] = []
        waiting: list[int] = []
        here: set[str] = set()
        unwanted: set[str] = set()
        while queue and len(batch) < batch_size:
            number = queue.popleft()
            if positives[number] in unwanted or not here.isdisjoint(others[number]):
                waiting.append(number)
                continue
            batch.append(number)
            here.add(positives[number])
            unwanted |= others[number]
        # There is room for these only if all remaining rows have to wait.
        room = batch_size - len(batch)
        batch += waiting[:room]
        queue.extendleft(reversed(waiting[room:]))
        yield batch


def _groups(texts: list[str], near: Near, size: int, generator: random.Random) -> Iterator[list[str]]:
    """Put every document into a group of up to ``size``, with remaining documents near to it, and near to those."""
    generator.shuffle(texts)
    left = dict.fromkeys(texts)
    for text in texts:
        if text not in left:
            continue
        del left[text]
        group = [text]
        for member in group:  # it grows meanwhile
            for other in near.get(member, ()):
                if len(group) < size and other in left:
                    del left[other]
                    group.append(other)
            if len(group) == size:
                break
        yield group


class DocumentBatchSampler(DefaultBatchSampler):
    """Batches of near documents with several queries each, for SentenceTransformerTrainer.

    In a dataset with the columns anchor, positive and negatives, documents count as near if a row has one as the
    positive and the other as a negative. Give the class as ``batch_sampler`` in the training arguments, and the loss
    ``encode_once=True``: a batch then has far fewer documents than rows.

    Args:
        dataset: The second column is the positive.
        batch_size: Rows of a batch.
        drop_last: Leave the last batch out if it has fewer rows.
        valid_label_columns: Columns that are labels and no texts.
        generator: Of the order, seeded anew for each epoch.
        seed: Of the first epoch.
        near: A document's text to the texts of similar documents. None takes the columns of negatives.
        queries_per_document: Rows of a document that stand together.

    Example::

        args = SentenceTransformerTrainingArguments(output_dir="out", batch_sampler=DocumentBatchSampler)
        loss = CLPLoss(model, encode_once=True)
    """

    def __init__(
        self,
        dataset: Dataset,
        batch_size: int,
        drop_last: bool,
        valid_label_columns: list[str] | None = None,
        generator: torch.Generator | None = None,
        seed: int = 0,
        *,
        near: Near | None = None,
        queries_per_document: int = QUERIES_PER_DOCUMENT,
    ) -> None:
        super().__init__(dataset, batch_size, drop_last, valid_label_columns, generator, seed)
        columns = [name for name in dataset.column_names if name not in (valid_label_columns or ())]
        if len(columns) < 2:
            raise ValueError(
                f"DocumentBatchSampler needs a dataset with an anchor and a positive; this one has {', '.join(columns)}"
            )
        self._anchors: list[str] = list(dataset[columns[0]])
        self._positives: list[str] = list(dataset[columns[1]])
        if near is None:
            others = [list(dataset[name]) for name in columns[2:]]
            near = near_documents(self._positives, list(zip(*others, strict=True)) or [()] * len(self._positives))
        self._near = near
        self._queries_per_document = queries_per_document

    def __iter__(self) -> Iterator[list[int]]:
        batches = document_batches(
            self._anchors,
            self._positives,
            self._near,
            batch_size=self.batch_size,
            queries_per_document=self._queries_per_document,
            generator=random.Random(self.seed + self.epoch),
        )
        return iter(batches[: len(self)])

    def __len__(self) -> int:
        full, rest = divmod(len(self._positives), self.batch_size)
        return full + bool(rest and not self.drop_last)
