"""The generator of the embedded collection: its plan, its wording and its truth; the data file is what it makes."""

from __future__ import annotations

import gzip
import json
import re
import unicodedata
from collections import Counter
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("babel")

from tools.embedded import LANGUAGES, make_collections
from tools.embedded.facts import all_facts
from tools.embedded.plan import FactIndex, make_plan
from tools.embedded.render import Renderer
from tools.embedded.wording.ko import WORDING as KOREAN

FILE = Path(__file__).parents[2] / "st_clp" / "data" / "embedded.json.gz"
SCRIPTS = {"ko": "HANGUL", "fa": "ARABIC", "hi": "DEVANAGARI", "en": "LATIN"}


@pytest.fixture(scope="module")
def made() -> dict[str, Any]:
    return make_collections()


@pytest.fixture(params=LANGUAGES)
def language(request: pytest.FixtureRequest) -> str:
    return request.param


def texts(made: dict[str, Any], language: str) -> Iterator[str]:
    for title, text in made[language]["documents"].values():
        yield title
        yield text
    for queries in made[language]["queries"].values():
        yield from queries.values()


def text_of(made: dict[str, Any], language: str, doc_id: str) -> str:
    return made[language]["documents"][f"{language}-{doc_id}"][1]


def test_the_data_file_is_what_the_generator_makes(made: dict[str, Any]) -> None:
    content = json.loads(gzip.decompress(FILE.read_bytes()))
    if f"Babel {version('Babel')}," not in content["about"]:
        pytest.skip("made from the facts of another version of Babel")
    assert content["collections"] == json.loads(json.dumps(made))


def test_every_document_that_answers_is_judged_and_no_other() -> None:
    """Search the facts of all documents naively, without the index that the plan uses."""
    plan = make_plan()
    values = {fact[place] for fact in all_facts() for place in range(1, len(fact))}
    for questions in plan.questions.values():
        for question, answering in list(questions.values())[::7]:
            found = set()
            for doc_id, document in plan.documents.items():
                possible = {value for fact in document.facts for value in fact[1:]} & values
                if any(
                    all(
                        tuple(answer if part == "?" else part for part in clause) in document.facts
                        for clause in question.clauses
                    )
                    for answer in possible
                ):
                    found.add(doc_id)
            assert found == set(answering), question


def test_every_question_has_one_answer_in_cldr() -> None:
    world = FactIndex([("CLDR", all_facts())])
    for questions in make_plan().questions.values():
        for question, _ in questions.values():
            assert len(world.answers(question.clauses)) == 1, question


def test_documents_state_only_facts_of_cldr() -> None:
    known = set(all_facts())
    for document in make_plan().documents.values():
        assert document.facts <= known


def test_no_wording_dominates(language: str) -> None:
    """No template makes more than a tenth of the queries, and no kind more than a fifth."""
    renderer, plan = Renderer(language), make_plan()
    questions = [question for asked in plan.questions.values() for question, _ in asked.values()]
    kinds = Counter(question.kind for question in questions)
    assert max(kinds.values()) <= len(questions) / 5
    templates: Counter[str] = Counter()
    for question in questions:
        asked = renderer.question(question)
        matching = [
            template
            for template in renderer.wording.questions[question.kind]
            if re.fullmatch(as_pattern(template), asked, flags=re.IGNORECASE)
        ]
        assert matching, asked
        templates[matching[0]] += 1
    assert max(templates.values()) <= len(questions) / 10
    assert len(templates) >= 60


def as_pattern(template: str) -> str:
    pieces = re.split(r"\{\w+\}|\[\w+/\w+\]", template)
    return ".+?".join(re.escape(piece) for piece in pieces)


@pytest.mark.parametrize("part", ["sentences", "questions"])
def test_every_language_words_the_same_kinds(part: str) -> None:
    english = getattr(Renderer("en").wording, part)
    for language in LANGUAGES:
        wording = getattr(Renderer(language).wording, part)
        assert wording.keys() == english.keys()
        for kind, variants in wording.items():
            assert len(variants) >= 2
            slots = set(re.findall(r"\{(\w+)\}", english[kind][0]))
            # "without decimals" may or may not give the number, which is none
            if kind != "no_digits":
                assert all(set(re.findall(r"\{(\w+)\}", variant)) == slots for variant in variants), (language, kind)


@pytest.mark.parametrize(
    "fact",
    [
        ("currency", "KR", "KRW"),
        ("currency", "HR", "EUR"),
        ("official", "IR", "fa"),
        ("official", "BR", "pt"),
        ("city", "AT", "Europe/Vienna"),
        ("clock", "KE", "Africa_Eastern"),
        ("week", "US", "6"),
        ("week", "DE", "0"),
        ("digits", "KWD", "3"),
        ("since", "KRW", "1962"),
        ("script", "el", "Grek"),
        ("autonym", "fi", "suomi"),
        ("monday", "fi", "maanantai"),
        ("plural", "ar", "6"),
    ],
)
def test_records(fact: tuple[str, ...]) -> None:
    assert fact in all_facts()


@pytest.mark.parametrize(
    ("written", "read"),
    [
        ("대한민국[은/는]", "대한민국은"),
        ("캐나다[은/는]", "캐나다는"),
        ("서울[으로/로]", "서울로"),
        ("한국[으로/로]", "한국으로"),
        ("달러[으로/로]", "달러로"),
        ("미국 달러(USD)[을/를]", "미국 달러(USD)를"),
        ("대한민국 원(KRW)[이/가]", "대한민국 원(KRW)이"),
        ("약 41%[이/가]", "약 41%가"),
        ("독일어[과/와] 예멘[과/와]", "독일어와 예멘과"),
    ],
)
def test_korean_particles(written: str, read: str) -> None:
    assert KOREAN.finish(written) == read


def test_no_slot_is_left_unfilled(made: dict[str, Any], language: str) -> None:
    for text in texts(made, language):
        assert not re.search(r"[{}\[\]]|None|  ", text), text
        assert text == text.strip()


def test_letters_are_of_the_language_s_script(made: dict[str, Any], language: str) -> None:
    letters = [unicodedata.name(char, "") for text in texts(made, language) for char in text if char.isalpha()]
    own = sum(name.startswith(SCRIPTS[language]) for name in letters)
    assert own / len(letters) > 0.85


def test_documents_have_a_few_sentences(made: dict[str, Any], language: str) -> None:
    for title, text in made[language]["documents"].values():
        plain = text.replace("St. ", "").replace("U.S. ", "")
        assert 2 <= len(re.findall(r"[.।](?=\s|$)", plain)) <= 5, (title, text)


@pytest.mark.parametrize(
    ("language", "doc_id", "stated"),
    [
        ("en", "currency-jpy", "without any decimals|no digits|whole numbers"),
        ("en", "currency-jpy", "JPY"),
        ("en", "currency-kwd", "\\b3 (decimal|digits)"),
        ("en", "language-de", "Deutsch|Montag|Latin"),
        ("en", "territory-jp", "Japanese Yen \\(JPY\\)"),
        ("en", "territory-il", "Israeli New Shekel \\(ILS\\)"),
        ("ko", "territory-kr", "대한민국 원\\(KRW\\)|서울|월요일|일요일"),
        ("ko", "currency-krw", "KRW"),
        ("fa", "territory-ir", "فارسی"),
        ("hi", "currency-inr", "INR"),
    ],
)
def test_facts_known_to_everybody(made: dict[str, Any], language: str, doc_id: str, stated: str) -> None:
    text = text_of(made, language, doc_id)
    assert re.search(stated, text), text


@pytest.mark.parametrize("money", ["DEM", "FRF", "HRK", "ZMK"])
def test_no_document_about_money_of_the_past(made: dict[str, Any], money: str) -> None:
    assert f"en-currency-{money.lower()}" not in made["en"]["documents"]
    assert not any(money in text for text in texts(made, "en"))


@pytest.mark.parametrize("territory", ["za", "ua", "ch"])
def test_official_languages_are_left_out_where_cldr_simplifies(made: dict[str, Any], territory: str) -> None:
    assert not re.search(r"\bofficial", text_of(made, "en", f"territory-{territory}"))


def test_no_korean_name_has_the_wrong_particle(made: dict[str, Any]) -> None:
    """After each title in the collection, only the particle of its last syllable."""
    ends = {title: (ord(title[-1]) - 0xAC00) % 28 != 0 for title, _ in made["ko"]["documents"].values()}
    checked = 0
    for word in " ".join(texts(made, "ko")).split():
        stem, particle = word[:-1], word[-1]
        if stem in ends and particle in "은는을를":
            assert (particle in "은을") == ends[stem], word
            checked += 1
    assert checked > 50


def test_hindi_rupee_is_oblique_before_a_postposition(made: dict[str, Any]) -> None:
    everything = " ".join(texts(made, "hi"))
    assert not re.search(r"रुपया(?: \(\w+\))? (?:में|का|की|के|को)(?=\s)", everything)
    assert "रुपये" in everything


def test_persian_has_persian_figures_and_letters(made: dict[str, Any]) -> None:
    for text in texts(made, "fa"):
        assert not re.search(r"[0-9]", text.replace("ISO 4217", "")), text
        assert not re.search("(?<![«؀-ۿ])[يك]", text), text  # Arabic forms; Arabic's own words stand in guillemets
