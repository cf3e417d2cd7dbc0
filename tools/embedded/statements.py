"""What there is to say about a territory, a currency or a language, and which of them have a document."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import lru_cache

from tools.embedded.facts import CURRENCY_UNSURE, OFFICIAL_UNSURE, Fact, all_facts
from tools.embedded.names import names_in

LANGUAGES = ("ko", "fa", "hi", "en")
# More places than this in one sentence make a list, not a sentence.
LISTED_PLACES = 3
# A language has a document if it is official somewhere or a good part of a territory uses it.
LARGE_SHARE = 20
# Less than this is lost in the error of the estimate.
SMALL_SHARE = 2
# An earlier year is a convention of the records more often than a date.
FIRST_YEAR = 1946


@dataclass(frozen=True)
class Subject:
    """What a document is about; ``anchor`` is the territory whose split it shares."""

    kind: str
    code: str
    anchor: str


@dataclass(frozen=True)
class Statement:
    """One sentence before it is worded: its kind, the facts it states, and what fills its slots.

    ``slots`` names for each slot what it holds ("currencies", ("KRW",)); ``always`` keeps it in the document.
    """

    kind: str
    facts: tuple[Fact, ...]
    slots: tuple[tuple[str, tuple[str, ...]], ...]
    always: bool = False


class Records:
    """All facts by predicate and first or second argument."""

    def __init__(self) -> None:
        self._by: dict[tuple[str, int, str], list[Fact]] = defaultdict(list)
        for fact in all_facts():
            for place in (1, 2):
                self._by[fact[0], place, fact[place]].append(fact)

    def of(self, predicate: str, code: str, place: int = 1) -> list[Fact]:
        return self._by.get((predicate, place, code), [])


@lru_cache(maxsize=1)
def records() -> Records:
    return Records()


def _named(lookup: str, code: str) -> bool:
    return all(getattr(names_in(language), lookup)(code) for language in LANGUAGES)


@lru_cache(maxsize=1)
def nameable() -> dict[str, frozenset[str]]:
    """kind -> codes that have a readable name in every language, unlike that of any other code of the kind."""
    places = {fact[1] for fact in all_facts() if fact[0] in ("currency", "share")}
    kinds = {
        "territory": ("territory", places),
        "currency": ("currency", {fact[1] for fact in all_facts() if fact[0] == "code"}),
        "language": ("language_name", {fact[2] for fact in all_facts() if fact[0] == "share"}),
    }
    named = {}
    for kind, (lookup, codes) in kinds.items():
        good = {code for code in codes if _named(lookup, code)}
        for language in LANGUAGES:
            owners = defaultdict(list)
            for code in good:
                owners[getattr(names_in(language), lookup)(code)].append(code)
            good -= {code for same in owners.values() if len(same) > 1 for code in same}
        named[kind] = frozenset(good)
    return named


@lru_cache(maxsize=1)
def subjects() -> tuple[Subject, ...]:
    """Everything that gets a document, in a fixed order."""
    found = [Subject("territory", code, code) for code in sorted(nameable()["territory"])]
    for code in sorted(nameable()["currency"]):
        users = [fact[1] for fact in records().of("currency", code, place=2)]
        own = code[:2]  # ISO 4217 begins with the territory, unless the money belongs to several
        found.append(Subject("currency", code, users[0] if len(users) == 1 else own if own in users else code))
    for code in sorted(nameable()["language"]):
        if not records().of("autonym", code):
            continue
        shares = sorted(((int(fact[3]), fact[1]) for fact in records().of("share", code, place=2)), reverse=True)
        if records().of("official", code, place=2) or shares[0][0] >= LARGE_SHARE:
            found.append(Subject("language", code, shares[0][1]))
    return tuple(found)


def possible_statements(subject: Subject) -> list[Statement]:
    """All that can be said of a subject in words that every language has."""
    made = (make(subject.code) for make in MAKERS[subject.kind])
    return [statement for statement in made if statement is not None]


def _all_named(kind: str, codes: Iterable[str]) -> bool:
    return set(codes) <= nameable()[kind]


def _money(territory: str) -> Statement | None:
    facts = tuple(records().of("currency", territory))
    codes = tuple(fact[2] for fact in facts)
    if not codes or territory in CURRENCY_UNSURE or not _all_named("currency", codes):
        return None
    named = tuple(("code", code, code) for code in codes)  # the sentence gives the code in brackets
    return Statement("money" if len(codes) == 1 else "moneys", facts + named, (("money", codes),))


def _official(territory: str) -> Statement | None:
    facts = tuple(records().of("official", territory))
    codes = tuple(fact[2] for fact in facts)
    if not 1 <= len(codes) <= 4 or territory in OFFICIAL_UNSURE or not _all_named("language", codes):
        return None
    return Statement("official" if len(codes) == 1 else "officials", facts, (("langs", codes),))


def _shares(territory: str) -> Statement | None:
    ranked = sorted(records().of("share", territory), key=lambda fact: (-int(fact[3]), fact[2]))
    facts = [fact for fact in ranked[:2] if SMALL_SHARE <= int(fact[3]) <= 99 and fact[2] in nameable()["language"]]
    if not facts or facts[0] != ranked[0]:  # the second language alone would mislead
        return None
    slots = (("shares", tuple(part for fact in facts for part in fact[2:])),)
    return Statement("share" if len(facts) == 1 else "shares", tuple(facts), slots)


def _named_after(territory: str, zone: str) -> bool:
    """Whether a zone's reference place gives the territory's name away (Singapore, Jamaica)."""
    for language in LANGUAGES:
        place, name = names_in(language).city(zone), names_in(language).territory(territory)
        if not place or not name or place.lower() in name.lower() or name.lower() in place.lower():
            return True
    return False


def _city(territory: str) -> Statement | None:
    zones = records().of("city", territory)
    facts = tuple(fact for fact in zones if not _named_after(territory, fact[2]))[:LISTED_PLACES]
    if not facts or (len(zones) > 1 and len(facts) == 1):
        return None
    slots = (("cities", tuple(fact[2] for fact in facts)),)
    return Statement("city" if len(zones) == 1 else "cities", facts, slots)


def _clock(territory: str) -> Statement | None:
    facts = tuple(records().of("clock", territory))
    return Statement("clock", facts, (("clock", (facts[0][2],)),)) if facts and _named("clock", facts[0][2]) else None


def _week(territory: str) -> Statement | None:
    facts = tuple(records().of("week", territory))
    return Statement("week", facts, (("day", (facts[0][2],)),)) if facts else None


def _code(currency: str) -> Statement | None:
    facts = tuple(records().of("code", currency))
    return Statement("code", facts, (("code", (currency,)),), always=True)


def _places(currency: str) -> Statement | None:
    facts = [fact for fact in records().of("currency", currency, place=2) if fact[1] not in CURRENCY_UNSURE]
    facts = [fact for fact in facts if fact[1] in nameable()["territory"]]
    if not facts:
        return None
    kind = "places" if len(facts) <= LISTED_PLACES else "some_places"
    kind = "place" if len(facts) == 1 else kind
    facts = facts[:LISTED_PLACES]
    return Statement(kind, tuple(facts), (("places", tuple(fact[1] for fact in facts)),), always=True)


def _digits(currency: str) -> Statement | None:
    facts = tuple(records().of("digits", currency))
    kind = "no_digits" if facts[0][2] == "0" else "digits"
    return Statement(kind, facts, (("number", (facts[0][2],)),))


def _since(currency: str) -> Statement | None:
    facts = tuple(records().of("since", currency))
    return Statement("since", facts, (("year", (facts[0][2],)),)) if facts and int(facts[0][2]) >= FIRST_YEAR else None


def _script(language: str) -> Statement | None:
    facts = tuple(records().of("script", language))
    return (
        Statement("script", facts, (("script", (facts[0][2],)),)) if facts and _named("script", facts[0][2]) else None
    )


def _official_in(language: str) -> Statement | None:
    known = records().of("official", language, place=2)
    facts = [fact for fact in known if fact[1] not in OFFICIAL_UNSURE and fact[1] in nameable()["territory"]]
    if not facts:
        return None
    kind = "official_in" if len(facts) == len(known) <= LISTED_PLACES else "official_in_some"
    facts = facts[:LISTED_PLACES]
    return Statement(kind, tuple(facts), (("places", tuple(fact[1] for fact in facts)),))


def _most(language: str) -> Statement | None:
    facts = tuple(records().of("most", language))
    if not facts or not 1 <= int(facts[0][3]) <= 99 or facts[0][2] not in nameable()["territory"]:
        return None
    _, _, territory, percent = facts[0]
    both = (facts[0], ("share", territory, language, percent))
    return Statement("most", both, (("places", (territory,)), ("number", (percent,))), always=True)


def _autonym(language: str) -> Statement | None:
    facts = tuple(records().of("autonym", language))
    return Statement("autonym", facts, (("word", (facts[0][2],)),)) if facts else None


def _monday(language: str) -> Statement | None:
    facts = tuple(records().of("monday", language))
    return Statement("monday", facts, (("word", (facts[0][2],)),)) if facts else None


def _plural(language: str) -> Statement | None:
    facts = tuple(records().of("plural", language))
    return Statement("plural", facts, (("number", (facts[0][2],)),)) if facts else None


MAKERS: dict[str, tuple[Callable[[str], Statement | None], ...]] = {
    "territory": (_money, _official, _shares, _city, _clock, _week),
    "currency": (_code, _places, _digits, _since),
    "language": (_script, _official_in, _most, _autonym, _monday, _plural),
}
