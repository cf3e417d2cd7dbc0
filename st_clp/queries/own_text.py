"""Queries made of a document's own text, in any language, without a generating model: title, lead, sentences.

A part of the sentence is left out, as a question leaves out what it asks for, and the document has to be found by the
rest. With enough of them a model learns to tell a collection's documents apart, also those that no query asks for.
After Lee et al. (2019), Latent Retrieval for Weakly Supervised Open Domain Question Answering, arXiv:1906.00300 (a
sentence as the query of its passage), and Chen et al. (2022), Salient Phrase Aware Dense Retrieval, arXiv:2110.06918
(sentences as the queries by which a dense model learns what a lexical one knows).
"""

from __future__ import annotations

import hashlib
import random
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import replace

from st_clp.data import Collection, Document
from st_clp.queries.interface import DocumentQueries, NegativeQuery, QuerySource
from st_clp.queries.wording import EMPTY

# A sentence ends at its script's full stop; a Latin full stop must be followed by a space, unlike in 3.14.
_END = re.compile(r"(?<=[.!?؟۔])\s+|(?<=[。！？।॥])|\n+")
_ENDS = " .!?؟۔。！？।॥\"'"
_WORDS, _CHARACTERS = (5, 22), (12, 45)  # of a sentence: fewer say too little, and no more are taken
_LEFT_OUT = (0.2, 0.45)
_LONGEST_WORDS = 12  # letters on average, above which a script puts no space between words
MADE = "sentence:"  # how the ids of such queries begin
TITLE_WEIGHT = 0.5
LONGEST_LEAD = 160  # characters


def sentences(text: str) -> Iterator[str]:
    """The sentences of a text that are long enough, with single spaces."""
    for part in _END.split(text):
        sentence = " ".join(part.split())
        if any(character.isalnum() for character in sentence):
            yield sentence


def part_of_sentence(sentence: str, generator: random.Random) -> str | None:
    """A sentence without a run of its words, a fifth to nearly a half of them; None where it is too short."""
    sentence = sentence.strip(_ENDS)
    words = sentence.split()
    spaced = len(sentence) <= (_LONGEST_WORDS + 1) * len(words)
    units = words if spaced else list(sentence)
    least, most = _WORDS if spaced else _CHARACTERS
    if len(units) < least:
        return None
    begin = generator.randrange(max(0, len(units) - most) + 1)
    units = units[begin : begin + most]
    number = max(1, round(len(units) * generator.uniform(*_LEFT_OUT)))
    begin = generator.randrange(len(units) - number + 1)
    part = (" " if spaced else "").join(units[:begin] + units[begin + number :]).strip()
    return part if any(character.isalnum() for character in part) else None


def queries_of(document: Document, number: int, seed: int) -> list[str]:
    """Up to ``number`` queries for a document, each of another sentence; the same for the same seed."""
    return list(_parts(document, number, seed))


def _parts(document: Document, number: int, seed: int) -> dict[str, str]:
    """The queries, each with the sentence that it is a part of."""
    digest = hashlib.blake2b(f"{seed}\0{document.doc_id}".encode(), digest_size=8).digest()
    generator = random.Random(digest)
    found: dict[str, str] = {}
    for sentence in sentences(_without_title(document)):
        if part := part_of_sentence(sentence, generator):
            found.setdefault(part, sentence)
    return dict(generator.sample(list(found.items()), min(number, len(found))))


def _without_title(document: Document) -> str:
    title = document.title.strip()
    text = document.text
    return text[len(title) :] if title and text.startswith(title) else text


class TitleOrLead(QuerySource):
    """A document's title, marked ``"title"``, or else its first sentence, marked ``"lead"``.

    Args:
        weight: The weight of the queries.
    """

    name = "title"
    free = True

    def __init__(self, *, weight: float = TITLE_WEIGHT) -> None:
        self.weight = weight

    def generate(self, documents: Iterable[Document], *, language: str | None = None) -> Iterator[DocumentQueries]:
        """Yield answers in the documents' order."""
        for document in documents:
            text, source = " ".join(document.title.split()), "title"
            if not text:
                text, source = lead(document.text), "lead"
            queries = (NegativeQuery(text, source, self.weight),) if text else ()
            yield DocumentQueries(document.doc_id, queries, None if text else EMPTY)


def lead(text: str) -> str:
    """The first sentence that is long enough, cut between words if it is too long."""
    first = next(sentences(text), "")
    if len(first) <= LONGEST_LEAD:
        return first
    cut = first[: LONGEST_LEAD + 1].rpartition(" ")[0]
    return cut or first[:LONGEST_LEAD]


class SentenceQueries(QuerySource):
    """Parts of a document's sentences, marked ``"sentence"``.

    Args:
        samples: Queries for each document, at most.
        seed: Of the draws.
        weight: The weight of the queries.
    """

    name = "sentence"
    free = True

    def __init__(self, *, samples: int = 1, seed: int = 42, weight: float = 1.0) -> None:
        self.samples, self.seed, self.weight = samples, seed, weight

    def generate(self, documents: Iterable[Document], *, language: str | None = None) -> Iterator[DocumentQueries]:
        """Yield answers in the documents' order."""
        for document in documents:
            queries = self._mark(queries_of(document, self.samples, self.seed))
            yield DocumentQueries(document.doc_id, queries, None if queries else EMPTY)


def add_sentence_queries(collection: Collection, number: int, seed: int, *, each: int = 1) -> Collection:
    """Add queries made of its documents' sentences to a collection.

    They are spread evenly over the documents. If there are more documents than queries to make, documents are drawn at
    random. A sentence that occurs in several of them makes no query, as it does not say which one is meant.

    Args:
        collection: The collection; it is not changed.
        number: Queries to make, or as many as can be made.
        seed: Of the draws.
        each: Draw few enough documents that each gets so many queries.
    """
    if not number:
        return collection
    documents = collection.corpus.draw(-(-number // each), seed)
    parts = {document.doc_id: _parts(document, number, seed) for document in documents}
    times = Counter(sentence for found in parts.values() for sentence in found.values())
    in_turn = [
        (turn, doc_id, text)
        for doc_id, found in parts.items()
        for turn, text in enumerate(text for text, sentence in found.items() if times[sentence] == 1)
    ]
    in_turn.sort(key=lambda query: query[0])  # the first of every document, then the second of each
    made = {f"{MADE}{turn}:{doc_id}": (text, doc_id) for turn, doc_id, text in in_turn[:number]}
    queries = collection.queries | {query_id: text for query_id, (text, _) in made.items()}
    judgments = collection.judgments | {query_id: {doc_id: 1} for query_id, (_, doc_id) in made.items()}
    return replace(collection, queries=queries, judgments=judgments)


def is_made(query_id: str) -> bool:
    """Whether a query is one that :func:`add_sentence_queries` made."""
    return query_id.startswith(MADE)
