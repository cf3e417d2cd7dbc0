"""What CLDR records about territories, currencies and languages, as plain facts that no language is needed to read.

A fact is a tuple of strings, the predicate first:

========== ============================ ==========================================================
predicate  arguments                    meaning
========== ============================ ==========================================================
currency   territory, currency          legal tender today
official   territory, language          official there, or so in practice
share      territory, language, percent part of the population that uses it, rounded
most       language, territory, percent the territory where that part is largest
city       territory, zone              a time zone of the territory, known by its reference place
clock      territory, meta zone         the name of the time kept everywhere in the territory
week       territory, day               first day of the week, 0 is Monday
code       currency, code               ISO 4217 code
digits     currency, number             decimal places
since      currency, year               year since which it is tender in its one territory
script     language, script             script it is mostly written in
autonym    language, name               what it calls itself
monday     language, word               its word for Monday
plural     language, number             plural categories
========== ============================ ==========================================================
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from functools import lru_cache

Fact = tuple[str, ...]

# Not a place with a population of its own, or no place at all.
NOT_PLACES = {"AQ", "BV", "HM", "CP", "QO", "EU", "EZ", "UN", "XA", "XB", "ZZ", "TF", "GS", "UM", "EA", "IC", "DG"}
# CLDR's "official" is a simplification or out of date here (several more languages in the constitution, a law changed
# since, or custom rather than law), so the collection does not repeat it.
OFFICIAL_UNSURE = set(
    "ZA UA IL DZ TN MA ML BF NE ZW BO PE ER MG US RW NG SC CW IQ MP PF EH "
    "ME CH LI SN ET CK MO KM MU JE BQ LS MM".split()
)
# Countries that changed their money after the CLDR release, or where CLDR lists a second one that is not tender.
CURRENCY_UNSURE = {"BG", "HT", "ZW", "LR"}
# Not languages of a population (Latin is counted for the Vatican), or misnamed: Hindi's "African" for Afrikaans.
LANGUAGES_LEFT_OUT = {"af", "la", "und", "mul", "zxx"}
# Styles of one script, named "Simplified" and "Traditional".
NOT_SCRIPTS = {"Hans", "Hant"}
RIGHT_TO_LEFT = {"Arab", "Hebr", "Thaa", "Syrc", "Nkoo", "Adlm", "Rohg"}
OFFICIAL = {"official", "de_facto_official"}


def _currencies(territory: str) -> list[tuple[str, int | None]]:
    """Currencies that are tender now, each with the year it became so."""
    from babel.core import get_global

    entries = get_global("territory_currencies").get(territory, [])
    return [(code, start[0] if start else None) for code, start, end, tender in entries if end is None and tender]


def _languages(territory: str) -> dict[str, tuple[float, bool]]:
    """language -> (percent of the population, whether official); one entry for all scripts of a language."""
    from babel.core import get_global

    merged: dict[str, tuple[float, bool]] = {}
    entries: Mapping[str, Mapping] = get_global("territory_languages").get(territory, {})
    for tag, entry in entries.items():
        language = tag.split("_")[0]
        if language in LANGUAGES_LEFT_OUT or (language == "no" and "nb" in entries):  # "no" repeats Bokmål
            continue
        found = (float(entry["population_percent"]), entry["official_status"] in OFFICIAL)
        # Where a language has several scripts, the official one speaks for it.
        merged[language] = max(merged.get(language, found), found, key=lambda item: (item[1], item[0]))
    return merged


def _first_days() -> dict[str, str]:
    """territory -> first day of its week, where a locale of that territory says so."""
    from babel import localedata

    days = {}
    for identifier in sorted(localedata.locale_identifiers()):
        territory = identifier.rsplit("_", 1)[-1]
        if len(territory) == 2 and territory.isupper() and territory not in days:
            day = localedata.load(identifier, merge_inherited=False).get("week_data", {}).get("first_day")
            if day is not None:
                days[territory] = str(day)
    return days


def _territory_facts(territory: str, first_days: Mapping[str, str]) -> Iterator[Fact]:
    from babel.core import get_global

    for currency, _ in _currencies(territory):
        yield "currency", territory, currency
    for language, (percent, official) in _languages(territory).items():
        if official:
            yield "official", territory, language
        yield "share", territory, language, str(round(percent))
    zones = get_global("territory_zones").get(territory, [])
    for zone in zones:
        yield "city", territory, zone
    clocks = {get_global("meta_zones").get(zone) for zone in zones}
    if len(clocks) == 1 and None not in clocks:
        yield "clock", territory, clocks.pop()
    if territory in first_days:
        yield "week", territory, first_days[territory]


def _currency_facts(currency: str, users: list[tuple[str, int | None]]) -> Iterator[Fact]:
    from babel.core import get_global

    fractions: Mapping[str, tuple[int, ...]] = get_global("currency_fractions")
    yield "code", currency, currency
    yield "digits", currency, str(fractions.get(currency, fractions["DEFAULT"])[0])
    if len(users) == 1 and users[0][1] is not None:
        yield "since", currency, str(users[0][1])


def _language_facts(language: str) -> Iterator[Fact]:
    from babel import Locale, localedata
    from babel.core import get_global

    likely = get_global("likely_subtags").get(language)
    script = likely.split("_")[1] if likely else None
    if script and script not in NOT_SCRIPTS:
        yield "script", language, script
    if not localedata.exists(language):
        return
    locale = Locale(language)
    autonym = locale.languages.get(language)
    if not autonym:
        return  # too little of this locale is translated to trust the rest
    yield "autonym", language, autonym
    words = locale.days.get("stand-alone", {}).get("wide", {}) or locale.days.get("format", {}).get("wide", {})
    monday = words.get(0, "Mon")
    if monday != "Mon":
        yield "monday", language, monday
    if locale.plural_form.tags:  # "other" is always there and not listed
        yield "plural", language, str(len(locale.plural_form.tags) + 1)


def _most(facts: Iterable[Fact]) -> Iterator[Fact]:
    """The one territory with the largest share, for each language that has one."""
    shares = defaultdict(list)
    for predicate, *arguments in facts:
        if predicate == "share":
            territory, language, percent = arguments
            shares[language].append((int(percent), territory))
    for language, entries in shares.items():
        (largest, where), *rest = sorted(entries, reverse=True)
        if not rest or rest[0][0] < largest:
            yield "most", language, where, str(largest)


@lru_cache(maxsize=1)
def all_facts() -> tuple[Fact, ...]:
    """Every fact in Babel's copy of CLDR, in a fixed order, those included that no document states."""
    from babel import Locale
    from babel.core import get_global

    territories = sorted(
        code for code in Locale("en").territories if len(code) == 2 and code.isalpha() and code not in NOT_PLACES
    )
    first_days = _first_days()
    users: dict[str, list[tuple[str, int | None]]] = defaultdict(list)
    facts: list[Fact] = []
    for territory in territories:
        facts.extend(_territory_facts(territory, first_days))
        for currency, year in _currencies(territory):
            users[currency].append((territory, year))
    for currency in sorted(users):
        facts.extend(_currency_facts(currency, users[currency]))
    spoken = {tag.split("_")[0] for entries in get_global("territory_languages").values() for tag in entries}
    for language in sorted(spoken - LANGUAGES_LEFT_OUT):
        facts.extend(_language_facts(language))
    facts.extend(list(_most(facts)))
    return tuple(dict.fromkeys(facts))
