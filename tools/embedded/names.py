"""The names of territories, currencies, languages, scripts, days and times in one language, from CLDR."""

from __future__ import annotations

import re
from functools import lru_cache
from typing import Any

# Names with brackets, alternatives or digits in them do not read well inside a sentence.
UNREADABLE = re.compile(r"[\[\]();:0-9]")


@lru_cache(maxsize=1)
def _former_identifiers() -> dict[str, list[str]]:
    """time zone -> identifiers it once had ("Asia/Calcutta"), under which CLDR keeps its names."""
    from babel.core import get_global

    former: dict[str, list[str]] = {}
    for old, new in sorted(get_global("zone_aliases").items()):
        former.setdefault(new, []).append(old)
    return former


class Names:
    """Looks names up for one language; a name that CLDR lacks or that would read badly is None.

    Args:
        language: code of the language in which the names are given.
    """

    def __init__(self, language: str) -> None:
        from babel import Locale

        self.language = language
        self._locale = Locale(language)
        self._data: Any = self._locale._data

    def territory(self, code: str) -> str | None:
        name = self._locale.territories.get(code)
        if not name:
            return None
        name = re.sub(r"\s*\(.*?\)|،.*", "", name)  # "Hong Kong (…)": the short form
        name = name.replace(" SAR China", "").replace(" & ", " and ").replace(" - ", "-").replace(" – ", "-")
        return None if UNREADABLE.search(name) else name

    def currency(self, code: str) -> str | None:
        return self._readable(self._locale.currencies.get(code), code)

    def language_name(self, code: str) -> str | None:
        return self._readable(self._locale.languages.get(code), code)

    def script(self, code: str) -> str | None:
        return self._readable(self._locale.scripts.get(code))

    def day(self, index: str) -> str:
        return self._locale.days["format"]["wide"][int(index)]

    def clock(self, meta_zone: str) -> str | None:
        forms = self._data["meta_zones"].get(meta_zone, {}).get("long", {})
        return self._readable(forms.get("generic") or forms.get("standard"))

    def city(self, zone: str) -> str | None:
        zones = self._data["time_zones"]
        found = (zones.get(identifier, {}).get("city") for identifier in (zone, *_former_identifiers().get(zone, ())))
        name = next(filter(None, found), None)
        if not name and self.language == "en":  # CLDR leaves out what the identifier spells already
            name = zone.split("/")[-1].replace("_", " ")
        return self._readable(name)

    def _readable(self, name: str | None, code: str = "") -> str | None:
        if not name or name == code or UNREADABLE.search(name):
            return None
        return name.replace(" & ", " and ").replace("\u202f", " ")


@lru_cache(maxsize=8)
def names_in(language: str) -> Names:
    return Names(language)
