"""Prompts, parsing of replies, and checks whether a reply is a usable query."""

from __future__ import annotations

import json
import re
import unicodedata
from collections import Counter
from collections.abc import Mapping
from functools import lru_cache

from st_clp.files import read_mapping

DOCUMENT, NUMBER, LANGUAGE = "{document}", "{number}", "{language}"
DEFAULT = "default"

# For a model that follows instructions. Questions are asked for in the passage's own language.
ENGLISH = (
    "Read the passage. Write {number} short search query that a person might type and that this passage answers. "
    "Write it in the language of the passage, do not mention the passage, and do not answer it.\n\n"
    "Passage:\n{document}\n\n"
)
TEMPLATES: dict[str, str] = {
    DEFAULT: ENGLISH,
    "en": ENGLISH,
    "ko": (
        "다음 글을 읽으세요. 이 글이 답이 되는 짧은 검색 질문 {number}개를 한국어로 쓰세요. "
        "글 자체를 언급하지 말고 질문에 답하지도 마세요.\n\n글:\n{document}\n\n"
    ),
    "fa": (
        "متن زیر را بخوانید. {number} پرسش کوتاه برای جست‌وجو به زبان فارسی بنویسید که پاسخ آن در این متن باشد. "
        "به خود متن اشاره نکنید و به پرسش پاسخ ندهید.\n\nمتن:\n{document}\n\n"
    ),
    "hi": (
        "नीचे दिया गया अनुच्छेद पढ़ें। हिन्दी में {number} छोटा खोज प्रश्न लिखें जिसका उत्तर इस अनुच्छेद में हो। "
        "अनुच्छेद का उल्लेख न करें और प्रश्न का उत्तर न दें।\n\nअनुच्छेद:\n{document}\n\n"
    ),
}
ENDINGS = {DEFAULT: "Query:", "ko": "질문:", "fa": "پرسش:", "hi": "प्रश्न:"}
AS_JSON = 'Answer with JSON alone: {"query": "…"}'
SEVERAL_AS_JSON = 'Answer with JSON alone: {"queries": ["…", "…"]}'


class Prompts:
    """Templates by language.

    Args:
        templates: ISO 639 code, or ``"default"`` for all others, to template. ``{document}`` stands for the document
            and must be there; ``{number}`` for how many queries are wanted, ``{language}`` for the code. They come
            before the built-in ones.

    Raises:
        ValueError: A template has no ``{document}``.
    """

    def __init__(self, templates: Mapping[str, str] | None = None) -> None:
        for language, template in (templates or {}).items():
            if not isinstance(template, str) or DOCUMENT not in template:
                raise ValueError(f"the prompt for {language!r} has no {DOCUMENT}, where the document is to stand")
        self._given = dict(templates or {})

    @classmethod
    def read(cls, path: str | None) -> Prompts:
        """Read the templates in a YAML file, ``ko: …`` each; None takes the built-in ones.

        Raises:
            ValueError: The file does not exist or does not map languages to templates.
        """
        if path is None:
            return cls()
        content = f"a template for each language, such as: default: '… {DOCUMENT} …'"
        values = read_mapping(path, "file of prompts", content, ValueError)
        # YAML reads a bare no as false; here it is Norwegian.
        return cls({"no" if language is False else str(language): template for language, template in values.items()})

    def template(self, language: str | None) -> str:
        """The template for documents of a language, with number and document still to be filled in."""
        code = language or DEFAULT
        names = (code, code.partition("-")[0], DEFAULT)
        found = [templates[name] for templates in (self._given, TEMPLATES) for name in names if name in templates]
        return found[0].replace(LANGUAGE, code)

    def as_chat(self, language: str | None, number: int) -> str:
        """The template for an endpoint, with the instruction to answer in JSON."""
        return self.template(language).replace(NUMBER, str(number)) + (AS_JSON if number == 1 else SEVERAL_AS_JSON)

    def as_instruction(self, language: str | None) -> str:
        """The template for a local model, ending with a word that the query follows."""
        own = (language or DEFAULT) in self._given or DEFAULT in self._given
        ending = "" if own else ENDINGS.get(language or DEFAULT, ENDINGS[DEFAULT])
        return self.template(language).replace(NUMBER, "1") + ending


def fill(template: str, document: str) -> str:
    """Fill in the document; other braces are kept."""
    return template.replace(DOCUMENT, document)


LONGEST_QUERY = 300  # characters; real queries of search engines and of MIRACL are far below
SCRIPT_SHARE = 0.25  # of a document's letters, from which on a script counts as the document's

EMPTY = "empty"
TOO_LONG = "far too long"
NOT_JSON = "not JSON"
WRONG_LANGUAGE = "the wrong language"
BROKEN = "a broken character"

_NUMBERING = re.compile(r"^\s*(?:[-*•]\s+|\(?\d{1,2}[.):]\s+)")
_QUOTES = "\"'`“”„«»‘’「」『』"


def clean(text: str) -> str:
    """The first non-empty line, without numbering and quotation marks."""
    for line in text.splitlines():
        line = _NUMBERING.sub("", line.strip()).strip()
        if len(line) > 1 and line[0] in _QUOTES and line[-1] in _QUOTES:
            line = line[1:-1].strip()
        if line:
            return " ".join(line.split())
    return ""


def fault(query: str, document: str) -> str | None:
    """The fault of a cleaned query for a document; None if there is none.

    Languages are distinguished by script alone: a query in the same script but another language passes.
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

    A text without letters matches every script.
    """
    of_query, of_document = _scripts(query), _scripts(document)
    if not of_query or not of_document:
        return True
    own = {script for script, number in of_document.items() if number >= SCRIPT_SHARE * of_document.total()}
    return 2 * sum(number for script, number in of_query.items() if script in own) >= of_query.total()


def comparable(text: str) -> str:
    """Normalise case, width, punctuation and spacing: queries that differ only in these are equal."""
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


_FENCE = re.compile(r"^```\w*\s*|\s*```$")
_THOUGHT = re.compile(r"^\s*<think>.*?</think>", re.DOTALL)  # models that think aloud do so before they answer


def read_reply(content: str | None, document: str) -> tuple[list[str], str | None]:
    """Parse a reply: (its queries, None), or ([], its fault).

    Args:
        content: ``{"query": "…"}`` or ``{"queries": ["…", …]}``, in a code fence or not.
        document: The document's text.
    """
    text = _FENCE.sub("", _THOUGHT.sub("", content or "").strip())
    if not text:
        return [], EMPTY
    try:
        values = json.loads(text)
    except (ValueError, RecursionError):  # nested too deep
        return [], NOT_JSON
    found = values.get("queries", values.get("query")) if isinstance(values, dict) else None
    if isinstance(found, str):
        found = [found]
    if not isinstance(found, list) or not all(isinstance(query, str) for query in found):
        return [], NOT_JSON
    queries = [clean(query) for query in found]
    faults = {query: fault(query, document) for query in queries}
    good = [query for query, wrong in faults.items() if wrong is None]
    return good, None if good else next(iter(faults.values()), EMPTY)
