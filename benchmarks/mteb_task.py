"""Collections as a retrieval task of MTEB: the same queries, documents and judgments, evaluated MTEB's way."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import mteb
from mteb.abstasks.retrieval import AbsTaskRetrieval
from mteb.abstasks.task_metadata import TaskMetadata
from sentence_transformers import SentenceTransformer

from st_clp import Collection

SPLIT = "dev"
LANGUAGES = {"ko": "kor-Hang", "fa": "fas-Arab", "hi": "hin-Deva", "en": "eng-Latn"}


def make_task(collections: Mapping[str, Collection]) -> AbsTaskRetrieval:
    """A task with a subset for each collection; the keys are two-letter codes of languages."""

    class CollectionRetrieval(AbsTaskRetrieval):
        metadata = TaskMetadata(
            name="CollectionRetrieval",
            description="Collections that are at hand.",
            dataset={"path": "local/collections", "revision": "0000000000000000000000000000000000000000"},
            type="Retrieval",
            category="t2t",
            modalities=["text"],
            eval_splits=[SPLIT],
            eval_langs={key: [LANGUAGES[key]] for key in collections},
            main_score="ndcg_at_10",
            reference=None,
            date=None,
            domains=None,
            task_subtypes=None,
            license=None,
            annotations_creators=None,
            dialect=None,
            sample_creation=None,
            bibtex_citation=None,
        )

        def load_data(self, num_proc: int | None = None, **options: Any) -> None:
            if self.data_loaded:
                return
            self.queries = {key: {SPLIT: dict(found.queries)} for key, found in collections.items()}
            self.corpus = {
                key: {SPLIT: {document.doc_id: {"text": document.text} for document in found.documents()}}
                for key, found in collections.items()
            }
            self.relevant_docs = {
                key: {SPLIT: {q: dict(grades) for q, grades in found.judgments.items()}}
                for key, found in collections.items()
            }
            self.data_loaded = True

    return CollectionRetrieval()


def evaluate(
    model: SentenceTransformer,
    collections: Mapping[str, Collection],
    *,
    predictions: Path | None = None,
    **options: Any,
) -> dict[str, dict[str, float]]:
    """MTEB's scores of a model: {collection: {metric: value}}.

    Args:
        model: Any SentenceTransformer.
        collections: Two-letter code of its language to each collection.
        predictions: A folder for MTEB's runs.
        **options: Handed to the model's ``encode``, such as ``batch_size``.
    """
    result = mteb.evaluate(
        model,
        make_task(collections),
        cache=None,
        overwrite_strategy="always",
        prediction_folder=predictions,
        encode_kwargs={"show_progress_bar": False, **options},
        show_progress_bar=False,
    )
    (found,) = result.task_results
    return {scores["hf_subset"]: scores for scores in found.scores[SPLIT]}
