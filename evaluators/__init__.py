"""Evaluate the retrieval of any SentenceTransformer: on MIRACL, on BEIR, or on a collection of your own.

Every evaluator can be called with a model, or handed to the Trainer or ``model.fit`` as ``evaluator``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from evaluators.beir import BEIREvaluator
from evaluators.benchmark import BenchmarkEvaluator, MIRACLEvaluator
from evaluators.collection_evaluator import CollectionEvaluator

if TYPE_CHECKING:
    from evaluators.beir_search import BEIRSearch

__all__ = ["BEIREvaluator", "BEIRSearch", "BenchmarkEvaluator", "CollectionEvaluator", "MIRACLEvaluator"]


def __getattr__(name: str) -> Any:
    # The one thing here that needs beir, which not every machine that evaluates has.
    if name == "BEIRSearch":
        from evaluators.beir_search import BEIRSearch

        return BEIRSearch
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
