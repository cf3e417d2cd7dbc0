"""The embedded collection: its sizes, its judgments, the separation of its splits, its wording and its truth."""

from __future__ import annotations

import builtins
import json
import re
import subprocess
import sys
import unicodedata
from collections import Counter
from collections.abc import Iterator

import pytest

pytest.importorskip("babel")

from st_clp.data.embedded import LANGUAGES, EmbeddedCollection, load_embedded
from st_clp.data.embedded.facts import all_facts
from st_clp.data.embedded.plan import FactIndex, make_plan
from st_clp.data.embedded.render import Renderer
from st_clp.data.embedded.wording.ko import WORDING as KOREAN

SCRIPTS = {"ko": "HANGUL", "fa": "ARABIC", "hi": "DEVANAGARI", "en": "LATIN"}


@pytest.fixture(params=LANGUAGES)
def language(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def collection(language: str) -> EmbeddedCollection:
    return load_embedded(language)


def texts(collection: EmbeddedCollection) -> Iterator[str]:
    for title, text in collection.documents.values():
        yield title
        yield text
    for queries in collection.queries.values():
        yield from queries.values()


def text_of(language: str, doc_id: str) -> str:
    return load_embedded(language).documents[f"{language}-{doc_id}"][1]


def test_sizes(collection: EmbeddedCollection) -> None:
    assert len(collection.documents) >= 350
    assert len(collection.queries["train"]) >= 500
    assert len(collection.queries["dev"]) >= 200


def test_ids_are_unique_prefixed_and_refer_to_each_other(language: str, collection: EmbeddedCollection) -> None:
    train, dev = (set(collection.queries[split]) for split in ("train", "dev"))
    assert not train & dev
    assert all(key.startswith(f"{language}-") for key in [*collection.documents, *train, *dev])
    for split, queries in collection.queries.items():
        assert collection.judgments[split].keys() == queries.keys()
        for grades in collection.judgments[split].values():
            assert grades
            assert set(grades.values()) == {1}
            assert grades.keys() <= collection.documents.keys()


def test_texts_do_not_repeat(collection: EmbeddedCollection) -> None:
    for values in (
        list(collection.documents.values()),
        [title for title, _ in collection.documents.values()],
        [query for queries in collection.queries.values() for query in queries.values()],
    ):
        assert [value for value, times in Counter(values).items() if times > 1] == []


def test_no_document_answers_in_both_splits_of_any_language() -> None:
    answering: dict[str, set[str]] = {"train": set(), "dev": set()}
    for language in LANGUAGES:
        for split, judged in load_embedded(language).judgments.items():
            answering[split] |= {doc_id.removeprefix(f"{language}-") for grades in judged.values() for doc_id in grades}
    assert answering["train"]
    assert answering["dev"]
    assert not answering["train"] & answering["dev"]


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


def test_same_result_in_another_process(language: str, collection: EmbeddedCollection) -> None:
    script = (
        "import json; from st_clp.data.embedded import load_embedded as load; "
        f"c = load({language!r}); print(json.dumps([c.documents, c.queries, c.judgments]))"
    )
    made = subprocess.run(
        [sys.executable, "-c", script],
        capture_output=True,
        text=True,
        check=True,
        env={"PYTHONHASHSEED": "7", "PYTHONUTF8": "1"},
    )
    here = [collection.documents, collection.queries, collection.judgments]
    assert json.loads(made.stdout) == json.loads(json.dumps(here))


def test_changing_a_loaded_collection_leaves_the_next_one_alone() -> None:
    first = load_embedded("en")
    first.documents.clear()
    first.judgments["dev"].popitem()
    assert len(load_embedded("en").documents) >= 350
    assert load_embedded("en").judgments["dev"].keys() == load_embedded("en").queries["dev"].keys()


def test_no_slot_is_left_unfilled(collection: EmbeddedCollection) -> None:
    for text in texts(collection):
        assert not re.search(r"[{}\[\]]|None|  ", text), text
        assert text == text.strip()


def test_letters_are_of_the_language_s_script(language: str, collection: EmbeddedCollection) -> None:
    letters = [unicodedata.name(char, "") for text in texts(collection) for char in text if char.isalpha()]
    own = sum(name.startswith(SCRIPTS[language]) for name in letters)
    assert own / len(letters) > 0.85


def test_documents_have_a_few_sentences(language: str, collection: EmbeddedCollection) -> None:
    for title, text in collection.documents.values():
        plain = text.replace("St. ", "").replace("U.S. ", "")
        assert 2 <= len(re.findall(r"[.।](?=\s|$)", plain)) <= 5, (title, text)


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
def test_facts_known_to_everybody(language: str, doc_id: str, stated: str) -> None:
    assert re.search(stated, text_of(language, doc_id)), text_of(language, doc_id)


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


@pytest.mark.parametrize("money", ["DEM", "FRF", "HRK", "ZMK"])
def test_no_document_about_money_of_the_past(money: str) -> None:
    assert f"en-currency-{money.lower()}" not in load_embedded("en").documents
    assert not any(money in text for text in texts(load_embedded("en")))


@pytest.mark.parametrize("territory", ["za", "ua", "ch"])
def test_official_languages_are_left_out_where_cldr_simplifies(territory: str) -> None:
    assert not re.search(r"\bofficial", text_of("en", f"territory-{territory}"))


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


def test_no_korean_name_has_the_wrong_particle() -> None:
    """After each title in the collection, only the particle of its last syllable."""
    collection = load_embedded("ko")
    ends = {title: (ord(title[-1]) - 0xAC00) % 28 != 0 for title, _ in collection.documents.values()}
    checked = 0
    for word in " ".join(texts(collection)).split():
        stem, particle = word[:-1], word[-1]
        if stem in ends and particle in "은는을를":
            assert (particle in "은을") == ends[stem], word
            checked += 1
    assert checked > 50


def test_hindi_rupee_is_oblique_before_a_postposition() -> None:
    everything = " ".join(texts(load_embedded("hi")))
    assert not re.search(r"रुपया(?: \(\w+\))? (?:में|का|की|के|को)(?=\s)", everything)
    assert "रुपये" in everything


def test_persian_has_persian_figures_and_letters() -> None:
    for text in texts(load_embedded("fa")):
        assert not re.search(r"[0-9]", text.replace("ISO 4217", "")), text
        assert not re.search("(?<![«؀-ۿ])[يك]", text), text  # Arabic forms; Arabic's own words stand in guillemets


def test_unknown_language_is_refused() -> None:
    with pytest.raises(ValueError, match="ko, fa, hi, en"):
        load_embedded("sw")


def test_missing_babel_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def without_babel(name: str, *args: object, **kwargs: object) -> object:
        if name.split(".")[0] == "babel":
            raise ModuleNotFoundError(f"No module named {name!r}", name="babel")
        return real(name, *args, **kwargs)  # type: ignore[arg-type]

    monkeypatch.setattr(builtins, "__import__", without_babel)
    with pytest.raises(ImportError, match=r"pip install 'st-clp\[demo\]'"):
        load_embedded("en")


def test_module_imports_without_babel() -> None:
    script = (
        "import sys; sys.modules['babel'] = None; import st_clp.data.embedded; print(st_clp.data.embedded.LANGUAGES)"
    )
    assert "ko" in subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout
