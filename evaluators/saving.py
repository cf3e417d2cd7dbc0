"""What evaluators found, saved as an evaluation."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from sentence_transformers import SentenceTransformer

from evaluators.evaluation import CollectionResult, Evaluation, judgments_fingerprint, write_evaluation
from evaluators.metrics import mean_scores
from st_clp.encoding import model_fingerprint

if TYPE_CHECKING:
    from evaluators.collection import CollectionEvaluator


def save_parts(
    folder: str | os.PathLike[str],
    parts: Mapping[str, CollectionEvaluator],
    *,
    model_name: str,
    model: SentenceTransformer | None = None,
    **settings: Any,
) -> Evaluation:
    """Save what evaluators of single collections found in their last calls as one evaluation.

    Args:
        folder: Where to; it is made if it is not there.
        parts: What to call each collection, and its evaluator.
        model_name: What to call the model.
        model: The model, for a fingerprint of its weights; None where only runs were scored.
        **settings: Anything else that the figures depend on.

    Raises:
        RuntimeError: An evaluator has not been called.
        ValueError: An id holds white space, which a run file cannot carry.
    """
    return write_evaluation(
        folder,
        model=model_name,
        fingerprint=None if model is None else model_fingerprint(model),
        results={key: _result(key, part) for key, part in parts.items()},
        runs={key: part.run for key, part in parts.items()},
        query_scores={key: part.query_scores for key, part in parts.items()},
        settings={key: part.get_config_dict() for key, part in parts.items()} | _of_model(model) | settings,
    )


def _of_model(model: SentenceTransformer | None) -> dict[str, Any]:
    if model is None:
        return {}
    return {
        "max_seq_length": model.max_seq_length,
        "similarity": str(model.similarity_fn_name),
        "prompts": dict(model.prompts),
        "truncate_dim": model.truncate_dim,
    }


def _result(key: str, part: CollectionEvaluator) -> CollectionResult:
    collection = part.collection
    (counts,) = part.counts.values()
    return CollectionResult(
        key=key,
        source=collection.name,
        split=collection.split,
        language=collection.language,
        pooled=part.pooled,
        judgments=judgments_fingerprint(part.judgments),
        documents=part.num_documents,
        scores=mean_scores(part.query_scores.values()),
        counts=counts,
        computed_in=part.computed_in,
    )
