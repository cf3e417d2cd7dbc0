"""The collection that comes with st_clp: true statements about territories, currencies and languages.

It is there in Korean, Persian, Hindi and English. The facts and the names are CLDR's (Unicode Common Locale Data
Repository), which the package Babel carries; the sentences and questions are our own. It is small and its texts are
plain: good for a demonstration and for tests, not for comparing methods. Questions in the dev split concern documents
that no question of the train split has for an answer, and since the same territories, currencies and languages are in
the dev split of every language, none can be learned from another.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

LANGUAGES = ("ko", "fa", "hi", "en")


@dataclass(frozen=True)
class EmbeddedCollection:
    """One language of the embedded collection.

    Args:
        documents: doc_id -> (title, text).
        queries: split ("train" or "dev") -> query_id -> text.
        judgments: split -> query_id -> {doc_id: grade}; every document that answers a query is there, with grade 1.
    """

    documents: dict[str, tuple[str, str]]
    queries: dict[str, dict[str, str]]
    judgments: dict[str, dict[str, dict[str, int]]]


def load_embedded(language: str) -> EmbeddedCollection:
    """Make the embedded collection of one language; the same result each time for one version of Babel.

    Args:
        language: one of ``LANGUAGES``.

    Raises:
        ValueError: for another language.
        ImportError: if Babel is not installed.
    """
    if language not in LANGUAGES:
        raise ValueError(f"the embedded collection has no language {language!r}, only {', '.join(LANGUAGES)}")
    try:
        import babel  # noqa: F401
    except ImportError as error:
        raise ImportError(
            "the embedded collection is made from the data of the package Babel: pip install 'st-clp[demo]'"
        ) from error
    made = _make(language)
    return EmbeddedCollection(
        dict(made.documents),
        {split: dict(queries) for split, queries in made.queries.items()},
        {split: {key: dict(grades) for key, grades in judged.items()} for split, judged in made.judgments.items()},
    )


@lru_cache(maxsize=len(LANGUAGES))
def _make(language: str) -> EmbeddedCollection:
    from st_clp.data.embedded.plan import SPLITS, make_plan
    from st_clp.data.embedded.render import Renderer

    plan, renderer = make_plan(), Renderer(language)
    documents = {
        f"{language}-{doc_id}": (renderer.title(document), renderer.text(document))
        for doc_id, document in plan.documents.items()
    }
    queries: dict[str, dict[str, str]] = {split: {} for split in SPLITS}
    judgments: dict[str, dict[str, dict[str, int]]] = {split: {} for split in SPLITS}
    for split, asked in plan.questions.items():
        for query_id, (question, answering) in asked.items():
            queries[split][f"{language}-{query_id}"] = renderer.question(question)
            judgments[split][f"{language}-{query_id}"] = {f"{language}-{doc_id}": 1 for doc_id in answering}
    return EmbeddedCollection(documents, queries, judgments)
