"""A collection: documents, queries and graded judgments of one split, wherever they come from."""

from __future__ import annotations

import logging
import random
from collections.abc import Collection as AnyCollection
from collections.abc import Iterable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass, field, replace
from functools import cached_property

from st_clp.data.checks import CollectionError, require_grade, require_id, require_ids, require_text
from st_clp.data.corpus import Corpus, Document, MemoryCorpus
from st_clp.data.registry import find_source
from st_clp.files import shown

logger = logging.getLogger(__name__)


@dataclass
class Collection:
    """Documents, queries and graded judgments of one split.

    Load one with :meth:`Collection.load`, or build one from dictionaries with :meth:`Collection.from_dict`.
    Queries and judgments are held in memory; documents are streamed or fetched by id.

    Attributes:
        corpus: The documents.
        queries: Query id to text; only queries that have a judgment in this split.
        judgments: Query id to {document id: grade}. A grade above 0 means relevant.
        name: What the collection was loaded as, such as ``"miracl/ko/dev"``.
        language: ISO 639 code, or None where it is not known.
        split: ``"train"``, ``"dev"`` …, or None where the source has no splits.
        known_queries: Document id to further queries that this document answers (a training row's ``neg_q``).
        query_marks: Of those that are not judgments: document id to {query: (source, weight)} (a training
            row's ``neg_q_source`` and ``neg_q_weight``).
        judged_negatives: Whether the source names negatives on purpose (a training row's ``neg``), so that
            documents of grade 0 should be used as negatives before any mined ones.
        left_out: What reading left out, cause to count.
        absent_documents: Judged documents that are not in the corpus; None if this was not checked when reading. Their
            judgments stay: they count in trec_eval's figures. What trains leaves them out.
    """

    corpus: Corpus
    queries: dict[str, str]
    judgments: dict[str, dict[str, int]]
    name: str = "collection"
    language: str | None = None
    split: str | None = None
    known_queries: dict[str, list[str]] = field(default_factory=dict)
    query_marks: dict[str, dict[str, tuple[str, float]]] = field(default_factory=dict)
    judged_negatives: bool = False
    left_out: dict[str, int] = field(default_factory=dict)
    absent_documents: frozenset[str] | None = None

    @classmethod
    def load(
        cls,
        source: str,
        *,
        split: str | None = None,
        text_fields: Sequence[str] | None = None,
        language: str | None = None,
    ) -> Collection:
        """Read a collection.

        Args:
            source: One of

                - an ir_datasets id: ``"miracl/ko/train"``, or ``"miracl/ko"`` with ``split="train"``;
                - a BEIR folder: ``corpus.jsonl``, ``queries.jsonl``, ``qrels/SPLIT.tsv``, each plain or ``.gz``;
                - a JSON-lines file of training rows: ``{"query": …, "pos": […], "neg": […], "neg_q": […]}``;
                - ``"embedded/ko"`` (``fa``, ``hi``, ``en``): the small collection that comes with st_clp.
            split: Which split's judgments to read. None: the one that ``source`` names, or its only one.
            text_fields: Fields of a document to join by a space. None: the title and text.
            language: ISO 639 code, where the source does not tell it.

        Raises:
            CollectionError: An unknown source (with the nearest known ones), a split that is not there, a
                broken file (with file and line), an empty corpus, or one id with two texts.
        """
        collection = find_source(source).load(source, split=split, text_fields=text_fields)
        if language is not None:
            collection.language = language
        collection.say_left_out()
        return collection

    @staticmethod
    def splits(source: str) -> list[str]:
        """The splits with judgments that ``source`` has, such as ``["dev", "train"]``; empty where it has none."""
        return find_source(source).splits(source)

    @classmethod
    def from_dict(
        cls,
        documents: Mapping[str, str],
        queries: Mapping[str, str],
        judgments: Mapping[str, Mapping[str, int]],
        *,
        name: str = "collection",
        corpus_name: str | None = None,
        language: str | None = None,
        split: str | None = None,
    ) -> Collection:
        """Build a collection from dictionaries: document id to text, query id to text, judgments.

        Judgments that name a query that is not there are left out, counted in ``left_out`` and said. Those that name
        a document that is not there stay, as for trec_eval, and are said; see ``absent_documents``.

        Raises:
            CollectionError: There are no documents, a text is not a string, an id cannot be written to a run file, or a
                grade is not a whole number of at most 10,000.
        """
        if not documents:
            raise CollectionError(f"{name}: the corpus is empty; give at least one document")
        for what, texts in (("document", documents), ("query", queries)):
            for identifier, text in texts.items():
                if not isinstance(text, str) or not isinstance(identifier, str):
                    raise CollectionError(
                        f"{name}: {what} {shown(identifier)} must be a text under an id that is a text; it is "
                        f"{type(text).__name__} under {type(identifier).__name__}"
                    )
                require_text(text, f"the {what} {require_id(identifier, what, name)!r}", name)
        collection = cls.checked(
            MemoryCorpus(corpus_name or name, dict(documents)),
            queries,
            judgments,
            name=name,
            language=language,
            split=split,
        )
        collection.note_absent_documents(documents)
        collection.say_left_out()
        return collection

    @classmethod
    def checked(
        cls,
        corpus: Corpus,
        queries: Mapping[str, str],
        judgments: Mapping[str, Mapping[str, int]],
        *,
        name: str,
        language: str | None = None,
        split: str | None = None,
    ) -> Collection:
        """Build a collection with only the judged queries, counting judgments whose query is missing or blank.

        Raises:
            CollectionError: An id is nothing that a run file can carry, a query's text has half a character, or a grade
                is no whole number up to 10,000.
        """
        require_ids(judgments, "query", name)
        left_out: dict[str, int] = {}
        kept: dict[str, dict[str, int]] = {}
        for query_id, grades in judgments.items():
            if not grades:
                continue
            if query_id not in queries:
                _count(left_out, "judgments of a query that is not there", len(grades))
            elif not queries[query_id].strip():
                _count(left_out, "judgments of a query without text", len(grades))
            else:
                require_text(queries[query_id], f"the query {query_id!r}", name)
                require_ids(grades, "document", name)
                kept[query_id] = {
                    doc_id: require_grade(grade, f"{name}: query {query_id!r}, document {doc_id!r}")
                    for doc_id, grade in grades.items()
                }
        judged = {query_id: queries[query_id] for query_id in kept}
        return cls(corpus, judged, kept, name=name, language=language, split=split, left_out=left_out)

    @property
    def corpus_name(self) -> str:
        """The corpus's name. Collections with the same corpus name share their documents."""
        return self.corpus.name

    @cached_property
    def num_documents(self) -> int:
        """The number of documents. The first call may read the whole corpus."""
        if isinstance(self.corpus, MemoryCorpus):
            return self.corpus.expected_size()
        return sum(1 for _ in self.corpus)

    def documents(self) -> Iterator[Document]:
        """Stream the documents, always in the same order."""
        return iter(self.corpus)

    def get_documents(self, doc_ids: Iterable[str]) -> dict[str, Document]:
        """Fetch documents by id; unknown ids are left out. Each call may read the whole corpus, so ask for many."""
        return self.corpus.get(doc_ids)

    def positives(self) -> dict[str, list[str]]:
        """Query id to the ids of its relevant documents (grade above 0), for queries that have any."""
        found = {
            query_id: [doc_id for doc_id, grade in grades.items() if grade > 0]
            for query_id, grades in self.judgments.items()
        }
        return {query_id: doc_ids for query_id, doc_ids in found.items() if doc_ids}

    def require_positives(self) -> None:
        """Require at least one query with a relevant document.

        Raises:
            CollectionError: No query has a relevant document.
        """
        absent = self.absent_documents or frozenset()
        if not any(set(doc_ids) - absent for doc_ids in self.positives().values()):
            raise CollectionError(
                f"{self.name}: no query has a relevant document (a judgment above 0), so there is nothing to train "
                f"on. It has {len(self.queries)} judged queries{self._left_out_text()}. Name a collection or split "
                "with positive judgments."
            )

    def without_missing_documents(self, known_ids: Iterable[str]) -> Collection:
        """A copy with judgments of documents in ``known_ids`` only; the others are counted in ``left_out``."""
        return self.without_documents(self._missing(known_ids), "judgments of a document that is not there")

    def note_absent_documents(self, known_ids: Iterable[str]) -> None:
        """Set ``absent_documents`` to the judged documents that are not in ``known_ids``."""
        self.absent_documents = frozenset(self._missing(known_ids))

    def _missing(self, known_ids: Iterable[str]) -> set[str]:
        missing = {doc_id for grades in self.judgments.values() for doc_id in grades}
        # There may be many more documents than judgments: these are struck off, those are not collected.
        if isinstance(known_ids, (Set, Mapping)):
            return missing - (known_ids.keys() if isinstance(known_ids, Mapping) else known_ids)
        missing.difference_update(known_ids)
        return missing

    def without_documents(self, doc_ids: Set[str], cause: str) -> Collection:
        """A copy without the judgments of these documents, which are counted in ``left_out`` under ``cause``."""
        judgments: dict[str, dict[str, int]] = {}
        number = 0
        for query_id, grades in self.judgments.items():
            kept = {doc_id: grade for doc_id, grade in grades.items() if doc_id not in doc_ids}
            number += len(grades) - len(kept)
            if kept:
                judgments[query_id] = kept
        if not number:
            return self
        left_out = dict(self.left_out)
        _count(left_out, cause, number)
        queries = {query_id: text for query_id, text in self.queries.items() if query_id in judgments}
        return replace(self, queries=queries, judgments=judgments, left_out=left_out)

    def hold_out(self, share: float, seed: int, *, at_most: int = 1000) -> tuple[Collection, Collection]:
        """Split the queries at random into (the rest, the held-out share), over the same documents.

        Args:
            share: Share of the queries to hold out, between 0 and 1.
            seed: Seed of the choice.
            at_most: Hold out no more queries than this.
        """
        query_ids = sorted(self.judgments)
        number = min(at_most, max(1, round(len(query_ids) * share)))
        held_out = set(random.Random(seed).sample(query_ids, number))
        return self.with_queries(set(query_ids) - held_out, "train"), self.with_queries(held_out, "dev")

    def sample(self, number: int, seed: int) -> Collection:
        """The same collection with at most ``number`` of its queries, drawn at random and kept in their order."""
        if len(self.judgments) <= number:
            return self
        return self.with_queries(set(random.Random(seed).sample(sorted(self.judgments), number)), self.split)

    def with_queries(self, query_ids: AnyCollection[str], split: str | None = None) -> Collection:
        """The same collection with only these of its queries, in its order; under the name of another split or not."""
        chosen = [query_id for query_id in self.judgments if query_id in query_ids]
        return replace(
            self,
            queries={query_id: self.queries[query_id] for query_id in chosen},
            judgments={query_id: self.judgments[query_id] for query_id in chosen},
            split=split or self.split,
        )

    def say_left_out(self) -> None:
        """Log a warning that counts what reading left out, if anything."""
        for cause, number in self.left_out.items():
            logger.warning("%s: left out %d %s", self.name, number, cause)
        if number := self._absent_judgments():
            logger.warning(
                "%s: %d judgments are of documents that the corpus does not have; they count in evaluation, as for "
                "trec_eval, and are left out of training",
                self.name,
                number,
            )

    def causes(self) -> str:
        """What was left out or is missing, in words with counts; empty if nothing is."""
        counts = dict(self.left_out)
        if number := self._absent_judgments():
            _count(counts, "judgments of a document that is not there", number)
        return ", ".join(f"{number} {cause}" for cause, number in counts.items())

    def _absent_judgments(self) -> int:
        absent = self.absent_documents or frozenset()
        return sum(doc_id in absent for grades in self.judgments.values() for doc_id in grades) if absent else 0

    def _left_out_text(self) -> str:
        return f"; left out: {self.causes()}" if self.causes() else ""


def _count(counts: dict[str, int], cause: str, number: int) -> None:
    counts[cause] = counts.get(cause, 0) + number
