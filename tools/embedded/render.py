"""Turns the plan into the text of one language."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from importlib import import_module

from tools.embedded.names import Names, names_in
from tools.embedded.plan import PlannedDocument, chance
from tools.embedded.questions import Question
from tools.embedded.statements import Statement
from tools.embedded.wording.wording import Wording

# The subject is named again in about one sentence of this many.
NAMED_AGAIN = 4


class Renderer:
    """Writes the documents and questions of one language.

    Args:
        language: "ko", "fa", "hi" or "en".
    """

    def __init__(self, language: str) -> None:
        self.language = language
        self.wording: Wording = import_module(f"tools.embedded.wording.{language}").WORDING
        self.names: Names = names_in(language)
        lookups: dict[str, Callable[[str], str | None]] = {
            "territory": self.names.territory,
            "currency": self.names.currency,
            "language": self.names.language_name,
            "city": self.names.city,
            "clock": self.names.clock,
            "script": self.names.script,
            "day": self.names.day,
        }
        self._lookups = lookups
        self._in_sentence = {
            "territory": self.wording.territory,
            "currency": self.wording.currency,
            "language": self.wording.language,
            "number": self.wording.number,
        }

    def title(self, document: PlannedDocument) -> str:
        kind, code = document.subject.kind, document.subject.code
        return self.wording.titles[kind].format(S=self._lookups[kind](code))

    def text(self, document: PlannedDocument) -> str:
        sentences = []
        for place, statement in enumerate(document.statements):
            template = self._pick(self.wording.sentences[statement.kind], "say", document.subject, statement.kind)
            slots = self._statement_slots(statement)
            slots["S"] = self._subject(document, place)
            sentences.append(self.wording.finish(template.format(**slots)))
        return " ".join(sentences)

    def question(self, question: Question) -> str:
        template = self._pick(self.wording.questions[question.kind], "ask", question.slots)
        hidden = question.kind in ASKING_FOR_CODES
        slots = {}
        for slot, value in question.slots:
            kind = QUESTION_SLOTS[slot]
            slots[slot] = self._fill(kind, value) if hidden else self._with_identifier(kind, value)
            if kind == "number":
                slots[slot] = self.wording.number_asked(value)
        return self.wording.finish(template.format(**slots))

    def _pick(self, variants: Sequence[str], *key: object) -> str:
        return variants[chance(self.language, *key) % len(variants)]

    def _subject(self, document: PlannedDocument, place: int) -> str:
        subject = document.subject
        key = ("subject", subject, place)
        if place == 0 or chance(self.language, *key) % NAMED_AGAIN == 0:
            name = self._fill(subject.kind, subject.code)
            return self.wording.subjects.get(subject.kind, "{S}").format(S=name)
        return self._pick(self.wording.pronouns[subject.kind], "pronoun", *key)

    def _statement_slots(self, statement: Statement) -> dict[str, str]:
        filled = {}
        for slot, values in statement.slots:
            if slot == "shares":  # language, percent, language, percent
                for name, kind, value in zip(SHARE_SLOTS, SHARE_KINDS, values, strict=False):
                    filled[name] = self._fill(kind, value)
            else:
                kind = STATEMENT_SLOTS[slot]
                parts = [self._with_identifier(kind, value, always=kind == "currency") for value in values]
                filled[slot] = self.wording.join(parts)
        return filled

    def _with_identifier(self, kind: str, value: str, *, always: bool = False) -> str:
        name = self._fill(kind, value)
        if kind in ("currency", "city") and (always or self.wording.identifiers):
            return self.wording.brackets.format(name, value)
        return name

    def _fill(self, kind: str, value: str) -> str:
        name = self._lookups[kind](value) if kind in self._lookups else value
        if name is None:
            raise ValueError(f"CLDR has no readable name in {self.language} for the {kind} {value}")
        return self._in_sentence.get(kind, str)(name)


ASKING_FOR_CODES = frozenset({"code_of_money", "city_of"})
SHARE_SLOTS = ("L", "p", "L2", "p2")
SHARE_KINDS = ("language", "number", "language", "number")
STATEMENT_SLOTS = {
    "money": "currency",
    "langs": "language",
    "cities": "city",
    "clock": "clock",
    "day": "day",
    "code": "word",
    "places": "territory",
    "number": "number",
    "year": "number",
    "script": "script",
    "word": "word",
}
QUESTION_SLOTS = {
    "T": "territory",
    "c": "currency",
    "L": "language",
    "L2": "language",
    "p": "number",
    "p2": "number",
    "city": "city",
    "clock": "clock",
    "day": "day",
    "code": "word",
    "word": "word",
    "script": "script",
}
