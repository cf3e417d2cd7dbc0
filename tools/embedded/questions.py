"""Which questions a document's facts allow, each as the facts that an answer must state."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from tools.embedded.facts import OFFICIAL_UNSURE, Fact
from tools.embedded.statements import Subject, nameable, records

# Kinds that name the very thing their document is about: the easy ones.
NAMING = frozenset(
    "money_of official_of share_of city_of clock_of week_of code_of_money digits_of since_when where_money "
    "script_of plural_of monday_of most_of where_official language_by_share".split()
)


@dataclass(frozen=True)
class Question:
    """A kind of question, the facts that answer it ("?" is what is asked for), and what fills its slots."""

    kind: str
    clauses: tuple[Fact, ...]
    slots: tuple[tuple[str, str], ...]


def _ask(kind: str, *clauses: Fact, **slots: str) -> Question:
    return Question(kind, clauses, tuple(sorted(slots.items())))


def possible_questions(subject: Subject, facts: Iterable[Fact]) -> list[Question]:
    """All questions that the facts of one document answer; some may have further answers elsewhere."""
    by: dict[str, list[Fact]] = {}
    for fact in sorted(facts):
        by.setdefault(fact[0], []).append(fact)
    ask = {"territory": _about_territory, "currency": _about_currency, "language": _about_language}[subject.kind]
    return list(dict.fromkeys(ask(subject.code, by)))


def _about_territory(code: str, by: dict[str, list[Fact]]) -> Iterator[Question]:
    yield from _naming_territory(code, by)
    yield from _describing_by_money(by)
    yield from _describing_by_language(by)


def _naming_territory(code: str, by: dict[str, list[Fact]]) -> Iterator[Question]:
    currencies, officials = by.get("currency", []), by.get("official", [])
    if len(currencies) == 1:
        yield _ask("money_of", ("currency", code, "?"), T=code)
    if len(officials) == 1:
        yield _ask("official_of", ("official", code, "?"), T=code)
    for _, _, language, percent in by.get("share", []):
        yield _ask("share_of", ("share", code, language, "?"), T=code, L=language)
        yield _ask("language_by_share", ("share", code, "?", percent), T=code, p=percent)
    if len(records().of("city", code)) == 1 and "city" in by:
        yield _ask("city_of", ("city", code, "?"), T=code)
    if "clock" in by:
        yield _ask("clock_of", ("clock", code, "?"), T=code)
    if "week" in by:
        yield _ask("week_of", ("week", code, "?"), T=code)


def _describing_by_money(by: dict[str, list[Fact]]) -> Iterator[Question]:
    """Questions for the territory that pays with a money it shares, and of which one thing more is known."""
    for _, _, money in by.get("currency", []):
        if len(records().of("currency", money, place=2)) == 1:
            continue  # the money alone would give the territory away
        clause = ("currency", "?", money)
        for _, _, language in by.get("official", []):
            yield _ask("by_money_official", clause, ("official", "?", language), c=money, L=language)
        for _, _, language, percent in by.get("share", []):
            yield _ask("by_money_share", clause, ("share", "?", language, percent), c=money, L=language, p=percent)
        for _, _, clock in by.get("clock", []):
            yield _ask("by_money_clock", clause, ("clock", "?", clock), c=money, clock=clock)


def _describing_by_language(by: dict[str, list[Fact]]) -> Iterator[Question]:
    """Questions for the territory with this language and this time, week or second language."""
    cities, clocks, days = by.get("city", []), by.get("clock", []), by.get("week", [])
    for _, _, language in by.get("official", []):
        clause: Fact = ("official", "?", language)
        for _, _, city in cities:
            yield _ask("by_city_official", clause, ("city", "?", city), city=city, L=language)
        for _, _, clock in clocks:
            yield _ask("by_official_clock", clause, ("clock", "?", clock), L=language, clock=clock)
    shares = by.get("share", [])
    for _, _, language, percent in shares:
        clause = ("share", "?", language, percent)
        for _, _, clock in clocks:
            yield _ask("by_share_clock", clause, ("clock", "?", clock), L=language, p=percent, clock=clock)
        for _, _, day in days:
            yield _ask("by_share_week", clause, ("week", "?", day), L=language, p=percent, day=day)
    for _, _, city in cities:
        for _, _, day in days:
            yield _ask("by_city_week", ("city", "?", city), ("week", "?", day), city=city, day=day)
    if len(shares) == 2:
        (_, _, first, percent), (_, _, second, percent2) = shares
        clauses = ("share", "?", first, percent), ("share", "?", second, percent2)
        yield _ask("by_shares", *clauses, L=first, p=percent, L2=second, p2=percent2)


def _about_currency(code: str, by: dict[str, list[Fact]]) -> Iterator[Question]:
    yield _ask("money_by_code", ("code", "?", code), code=code)
    yield _ask("code_of_money", ("code", code, "?"), c=code)
    for predicate, kind in (("digits", "digits_of"), ("since", "since_when")):
        if predicate in by:
            yield _ask(kind, (predicate, code, "?"), c=code)
    users = records().of("currency", code, place=2)
    if len(users) > 1 or not by.get("currency"):
        return
    territory = users[0][1]
    yield _ask("where_money", ("currency", "?", code), c=code)
    if len(records().of("currency", territory)) == 1:
        used = ("currency", territory, code)
        for predicate in ("code", "digits", "since"):
            if predicate in by:
                yield _ask(f"{predicate}_in", used, (predicate, code, "?"), T=territory)


def _about_language(code: str, by: dict[str, list[Fact]]) -> Iterator[Question]:
    for predicate in ("autonym", "monday"):
        for fact in by.get(predicate, []):
            yield _ask(f"language_by_{predicate}", (predicate, "?", fact[2]), word=fact[2])
    for predicate in ("script", "plural", "monday"):
        if predicate in by:
            yield _ask(f"{predicate}_of", (predicate, code, "?"), L=code)
    if "most" in by:
        territory, percent = by["most"][0][2:]
        yield _ask("most_of", ("most", code, territory, "?"), L=code)
        yield _ask("language_by_share", ("share", territory, "?", percent), T=territory, p=percent)
    for _, territory, _ in by.get("official", []):
        if len(records().of("official", territory)) == 1:
            for predicate in ("script", "plural", "monday", "autonym"):
                if predicate in by:
                    yield _ask(f"{predicate}_in", ("official", territory, code), (predicate, code, "?"), T=territory)
    official = [fact[1] for fact in records().of("official", code, place=2)]
    if len(official) == 1 and official[0] not in OFFICIAL_UNSURE and official[0] in nameable()["territory"]:
        yield _ask("where_official", ("official", "?", code), L=code)
