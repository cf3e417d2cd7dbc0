"""Looking at what a model wrote: cleaning it, and telling a query from nonsense."""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from functools import lru_cache

LONGEST_QUERY = 300  # characters; real queries of search engines and of MIRACL are far below
SCRIPT_SHARE = 0.25  # of a document's letters, from which on a script is one of its own

EMPTY = "empty"
TOO_LONG = "far too long"
NOT_JSON = "not JSON"
WRONG_LANGUAGE = "the wrong language"
BROKEN = "a broken character"

_NUMBERING = re.compile(r"^\s*(?:[-*•]\s+|\(?\d{1,2}[.):]\s+)")
_QUOTES = "\"'`“”„«»‘’「」『』"


def clean(text: str) -> str:
    """The first line that says something, without numbering and quotation marks around it."""
    for line in text.splitlines():
        line = _NUMBERING.sub("", line.strip()).strip()
        if len(line) > 1 and line[0] in _QUOTES and line[-1] in _QUOTES:
            line = line[1:-1].strip()
        if line:
            return " ".join(line.split())
    return ""


def fault(query: str, document: str) -> str | None:
    """What is wrong with a cleaned query for a document; None where nothing is.

    The language is told by its script alone: a query in the document's script and another language passes.
    """
    if any("\ud800" <= character <= "\udfff" for character in query):
        return BROKEN  # half of a pair of UTF-16, which no file can hold
    if not any(character.isalnum() for character in query):
        return EMPTY
    if len(query) > LONGEST_QUERY:
        return TOO_LONG
    if not same_script(query, document):
        return WRONG_LANGUAGE
    return None


def same_script(query: str, document: str) -> bool:
    """Whether at least half of the query's letters are of scripts that hold a quarter of the document's letters.

    A text without letters has no script and fits every other.
    """
    of_query, of_document = _scripts(query), _scripts(document)
    if not of_query or not of_document:
        return True
    own = {script for script, number in of_document.items() if number >= SCRIPT_SHARE * of_document.total()}
    return 2 * sum(number for script, number in of_query.items() if script in own) >= of_query.total()


def comparable(text: str) -> str:
    """A query without case, width, punctuation and spacing: two that differ in these alone are one."""
    return " ".join(re.findall(r"\w+", unicodedata.normalize("NFKC", text).casefold()))


def _scripts(text: str) -> Counter[str]:
    found = Counter(_script(character) for character in text[:10_000] if character.isalpha())
    del found[""]
    return found


@lru_cache(maxsize=65_536)
def _script(letter: str) -> str:
    # A character's name begins with its script: LATIN SMALL LETTER A. Japanese mixes three.
    name = unicodedata.name(unicodedata.normalize("NFKC", letter)[0], "")
    script = name.partition(" ")[0]
    return "CJK" if script in ("HIRAGANA", "KATAKANA", "KATAKANA-HIRAGANA") else script
