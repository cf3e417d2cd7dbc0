"""From a ranking to training rows: which judgments are usable, which negatives are taken, and their texts."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

from st_clp.data import Collection, Document
from st_clp.encoding import EmbeddingStore
from st_clp.mining.chooser import Choice, Chooser
from st_clp.mining.filters import RowTexts, text_refusal
from st_clp.mining.ranking import Ranking
from st_clp.mining.rows import Negative, TrainingRow
from st_clp.queries import Need, NegativeQuery
from st_clp.search import normalised_text


def usable_part(collection: Collection, store: EmbeddingStore) -> Collection:
    """The collection without judgments of documents that are missing or have no text.

    Raises:
        CollectionError: No query with a relevant document is left.
    """
    usable = collection.without_missing_documents(store.ids)
    relevant = {doc_id for doc_ids in usable.positives().values() for doc_id in doc_ids}
    blank = {doc_id for doc_id, document in usable.get_documents(relevant).items() if not document.text.strip()}
    usable = usable.without_documents(blank, "judgments of a document without text")
    usable.require_positives()
    if usable is not collection:
        usable.say_left_out()
    return usable


def choose_negatives(
    collection: Collection, ranking: Ranking, chooser: Chooser
) -> tuple[dict[str, list[Choice]], dict[str, Document], Counter[str]]:
    """Choose every query's negatives; return them, all documents of the rows by id, and counts of refused texts.

    A document with the same text as a relevant one is an answer too, even under another id; one with the query's own
    text is the query; and one without text teaches nothing. Texts are only known once documents are chosen, so such a
    choice is excluded and made again until there is none. Documents that ``range_min`` skips are checked too, so that
    it skips candidates only.
    """
    passed_over: Counter[str] = Counter()
    blank: set[str] = set()
    chosen: dict[str, list[Choice]] = {}
    documents: dict[str, Document] = {}
    open_queries = ranking.query_ids
    while open_queries:
        for query_id in open_queries:
            chosen[query_id] = chooser.choose(query_id, ranking)
        taken = {
            query_id: {choice.doc_id for choice in chosen[query_id]} | chooser.skipped[query_id]
            for query_id in open_queries
        }
        wanted = {doc_id for query_id in open_queries for doc_id in taken[query_id]}
        wanted |= {doc_id for query_id in open_queries for doc_id in ranking.positive_scores[query_id]}
        found = collection.get_documents(wanted - documents.keys())
        documents.update(found)
        again = []
        empty = {doc_id for doc_id in found if not documents[doc_id].text.strip()}
        ranking.exclude_everywhere(empty)
        blank |= empty
        passed_over["document without text"] += len(empty)
        for query_id in open_queries:
            answers = {normalised_text(documents[doc_id].text) for doc_id in ranking.positive_scores[query_id]}
            row = RowTexts(normalised_text(collection.queries[query_id]), answers)
            reasons = {
                doc_id: text_refusal(documents[doc_id].text, row, chooser.options) for doc_id in taken[query_id] - blank
            }
            refused = {doc_id: reason for doc_id, reason in reasons.items() if reason is not None}
            ranking.exclude(query_id, set(refused))
            passed_over.update(refused.values())
            if refused or taken[query_id] & blank:
                again.append(query_id)
        open_queries = again
    return chosen, documents, passed_over


def needs_of(chosen: dict[str, list[Choice]], positives: dict[str, list[tuple[str, float]]]) -> Iterator[Need]:
    """The negatives of every row, as requests for queries."""
    for query_id, choices in chosen.items():
        for positive_id, _ in positives[query_id]:
            yield from (Need(query_id, positive_id, choice.doc_id) for choice in choices)


def make_rows(
    collection: Collection,
    chosen: dict[str, list[Choice]],
    positives: dict[str, list[tuple[str, float]]],
    documents: dict[str, Document],
    queries: dict[Need, tuple[NegativeQuery, ...]],
) -> list[TrainingRow]:
    """A row for each query and each of its positives, with the queries that its negatives have in that row."""

    def negative(choice: Choice, query_id: str, positive_id: str) -> Negative:
        found = queries.get(Need(query_id, positive_id, choice.doc_id), ())
        return Negative(
            choice.doc_id,
            documents[choice.doc_id].text,
            choice.rank,
            choice.score,
            choice.source,
            tuple(query.text for query in found),
            tuple(query.source for query in found),
            tuple(query.weight for query in found),
        )

    return [
        TrainingRow(
            query_id,
            collection.queries[query_id],
            positive_id,
            documents[positive_id].text,
            score,
            tuple(negative(choice, query_id, positive_id) for choice in chosen[query_id]),
        )
        for query_id in chosen
        for positive_id, score in positives[query_id]
    ]


def positives_of(
    collection: Collection, ranking: Ranking, query_id: str, at_most: int | None
) -> list[tuple[str, float]]:
    """The query's relevant documents with their scores: all of them, or the best-judged."""
    scored = list(ranking.positive_scores[query_id].items())
    if at_most is None or len(scored) <= at_most:
        return scored
    grades = collection.judgments[query_id]
    return sorted(scored, key=lambda pair: (-grades[pair[0]], -pair[1]))[:at_most]
