"""The generator of the collection that comes with st_clp: true statements about territories, currencies and languages.

``python -m tools.embedded`` writes ``st_clp/data/embedded.json.gz`` anew. The facts and the names are CLDR's (Unicode
Common Locale Data Repository), which the package Babel carries; the sentences and questions are our own. Questions in
the dev split concern documents that no question of the train split has for an answer, and since the same territories,
currencies and languages are in the dev split of every language, none can be learned from another.
"""

from __future__ import annotations

from typing import Any

from tools.embedded.plan import SPLITS, make_plan
from tools.embedded.render import Renderer

LANGUAGES = ("ko", "fa", "hi", "en")


def make_collections() -> dict[str, Any]:
    """Language to its documents {id: [title, text]}, and by split its queries {id: text} and judgments {id: {id: 1}}.

    Every document that answers a query is judged. The same each time, for one version of Babel.
    """
    return {language: _make(language) for language in LANGUAGES}


def _make(language: str) -> dict[str, Any]:
    plan, renderer = make_plan(), Renderer(language)
    documents = {
        f"{language}-{doc_id}": [renderer.title(document), renderer.text(document)]
        for doc_id, document in plan.documents.items()
    }
    queries: dict[str, dict[str, str]] = {split: {} for split in SPLITS}
    judgments: dict[str, dict[str, dict[str, int]]] = {split: {} for split in SPLITS}
    for split, asked in plan.questions.items():
        for query_id, (question, answering) in asked.items():
            queries[split][f"{language}-{query_id}"] = renderer.question(question)
            judgments[split][f"{language}-{query_id}"] = {f"{language}-{doc_id}": 1 for doc_id in answering}
    return {"documents": documents, "queries": queries, "judgments": judgments}
