"""Decides, the same for every language, what each document states, what is asked, and which documents answer.

Nothing here is written in any language: a document is a list of statements and a question is a kind with its slots,
which ``render`` turns into text. So the four collections are translations of one another, split in the same way.
"""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache

from tools.embedded.facts import Fact, all_facts
from tools.embedded.questions import NAMING, Question, possible_questions
from tools.embedded.statements import Statement, Subject, possible_statements, subjects

SPLITS = ("train", "dev")
DEV_PERCENT = 30
# Statements in a document, and questions written with one document in mind.
STATEMENTS = {"territory": 4, "currency": 4, "language": 4}
QUESTIONS = {"territory": 3, "currency": 1, "language": 2}
UNKNOWN = "?"
# Of the questions that name their document's subject, one in this many is asked.
NAMING_KEPT = 8


def chance(*key: object) -> int:
    """A number that looks random and is the same for the same key on every machine."""
    return int.from_bytes(hashlib.blake2b(repr(key).encode(), digest_size=8).digest(), "big")


@dataclass(frozen=True)
class PlannedDocument:
    """What a document is about, what it says, in order, and the split it belongs to."""

    subject: Subject
    statements: tuple[Statement, ...]
    split: str

    @property
    def facts(self) -> frozenset[Fact]:
        return frozenset(fact for statement in self.statements for fact in statement.facts)


@dataclass(frozen=True)
class Plan:
    """All documents by id, and for each split its questions by id with the ids of the documents that answer."""

    documents: dict[str, PlannedDocument]
    questions: dict[str, dict[str, tuple[Question, tuple[str, ...]]]]


class FactIndex:
    """Finds who states a fact, one place of which may be unknown.

    Args:
        stated: for each owner (a document id, or one name for the whole world) the facts it states.
    """

    def __init__(self, stated: Iterable[tuple[str, Iterable[Fact]]]) -> None:
        self._owners: dict[Fact, set[tuple[str, str]]] = defaultdict(set)
        for owner, facts in stated:
            for fact in facts:
                self._owners[fact].add((owner, ""))
                for place in range(1, len(fact)):
                    self._owners[(*fact[:place], UNKNOWN, *fact[place + 1 :])].add((owner, fact[place]))

    def answers(self, clauses: Iterable[Fact]) -> set[tuple[str, str]]:
        """(owner, answer) for each owner that states every clause with the same answer for the unknown."""
        found: set[tuple[str, str]] | None = None
        owners: set[str] | None = None
        for clause in clauses:
            matches = self._owners.get(clause, set())
            if UNKNOWN in clause:
                found = matches if found is None else found & matches
            else:
                names = {owner for owner, _ in matches}
                owners = names if owners is None else owners & names
        if found is None:
            return {(owner, "") for owner in owners or ()}
        return found if owners is None else {match for match in found if match[0] in owners}


def _split(anchor: str) -> str:
    return "dev" if chance("split", anchor) % 100 < DEV_PERCENT else "train"


def _documents() -> dict[str, PlannedDocument]:
    documents = {}
    for subject in subjects():
        statements = possible_statements(subject)
        first = [statement for statement in statements if statement.always]
        rest = [statement for statement in statements if not statement.always]
        rest.sort(key=lambda statement: chance("keep", subject, statement.kind))
        chosen = [*first, *rest][: STATEMENTS[subject.kind]]
        if len(chosen) < 2:
            continue
        chosen.sort(key=lambda statement: chance("order", subject, statement.kind))
        doc_id = f"{subject.kind}-{subject.code.lower()}"
        documents[doc_id] = PlannedDocument(subject, tuple(chosen), _split(subject.anchor))
    return documents


def _choose(
    candidates: list[tuple[Question, tuple[str, ...]]], subject: Subject
) -> list[tuple[Question, tuple[str, ...]]]:
    """Some of the questions about a document, of as many kinds as there are."""
    kept = [
        candidate
        for candidate in candidates
        if candidate[0].kind not in NAMING or chance("naming", subject, candidate[0].kind) % NAMING_KEPT == 0
    ]
    kept.sort(key=lambda candidate: chance("ask", subject, candidate[0].kind, candidate[0].slots))
    times: dict[str, int] = defaultdict(int)
    ranked = []
    for candidate in kept:
        ranked.append((times[candidate[0].kind], candidate))
        times[candidate[0].kind] += 1
    ranked.sort(key=lambda item: item[0])
    return [candidate for _, candidate in ranked[: QUESTIONS[subject.kind]]]


@lru_cache(maxsize=1)
def make_plan() -> Plan:
    """The plan that all languages share.

    A question is asked only if it has one answer in the whole of CLDR (stated by a document or not), if a document
    states all it needs, and if all the documents that do are in one split: every one of them is judged relevant.
    """
    documents = _documents()
    world = FactIndex([("CLDR", all_facts())])
    stated = FactIndex((doc_id, document.facts) for doc_id, document in documents.items())
    questions: dict[str, dict[str, tuple[Question, tuple[str, ...]]]] = {split: {} for split in SPLITS}
    for doc_id, document in documents.items():
        candidates = []
        for question in possible_questions(document.subject, document.facts):
            answering = tuple(sorted({owner for owner, _ in stated.answers(question.clauses)}))
            one_split = {documents[owner].split for owner in answering} == {document.split}
            if doc_id in answering and one_split and len(world.answers(question.clauses)) == 1:
                candidates.append((question, answering))
        for question, answering in _choose(candidates, document.subject):
            query_id = "-".join((question.kind, *(value for _, value in question.slots))).lower()
            query_id = f"{doc_id}-{question.kind}-{chance(query_id) % 16**4:04x}"
            questions[document.split][query_id] = (question, answering)
    return Plan(documents, _without_repeats(questions))


def _without_repeats(
    questions: dict[str, dict[str, tuple[Question, tuple[str, ...]]]],
) -> dict[str, dict[str, tuple[Question, tuple[str, ...]]]]:
    """Drop a question that two documents brought up (a money and its one territory ask the same)."""
    seen = set()
    kept: dict[str, dict[str, tuple[Question, tuple[str, ...]]]] = {}
    for split, asked in questions.items():
        kept[split] = {}
        for query_id, (question, answering) in asked.items():
            if (question.kind, question.slots) not in seen:
                seen.add((question.kind, question.slots))
                kept[split][query_id] = (question, answering)
    return kept
