"""What a model is told to write: a template for each language, and those that a user brings."""

from __future__ import annotations

from collections.abc import Mapping

from st_clp.yaml_files import read_mapping

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
        """The templates of a YAML file, ``ko: …`` a line or block each; None has the built-in ones.

        Raises:
            ValueError: The file is not there or is no mapping of languages to templates.
        """
        if path is None:
            return cls()
        content = f"a template for each language, such as: default: '… {DOCUMENT} …'"
        values = read_mapping(path, "file of prompts", content, ValueError)
        # YAML reads a bare no as false; here it is Norwegian.
        return cls({"no" if language is False else str(language): template for language, template in values.items()})

    def template(self, language: str | None) -> str:
        """The template for documents of a language, with the number of queries and the document left open."""
        code = language or DEFAULT
        names = (code, code.partition("-")[0], DEFAULT)
        found = [templates[name] for templates in (self._given, TEMPLATES) for name in names if name in templates]
        return found[0].replace(LANGUAGE, code)

    def as_chat(self, language: str | None, number: int) -> str:
        """For an endpoint: the template and that the answer is to be JSON."""
        return self.template(language).replace(NUMBER, str(number)) + (AS_JSON if number == 1 else SEVERAL_AS_JSON)

    def as_instruction(self, language: str | None) -> str:
        """For a local model: the template, and a word after which the query is to stand."""
        own = (language or DEFAULT) in self._given or DEFAULT in self._given
        ending = "" if own else ENDINGS.get(language or DEFAULT, ENDINGS[DEFAULT])
        return self.template(language).replace(NUMBER, "1") + ending


def fill(template: str, document: str) -> str:
    """The template with the document in it; braces elsewhere mean themselves."""
    return template.replace(DOCUMENT, document)
