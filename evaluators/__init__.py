"""Evaluate the retrieval of any SentenceTransformer: on MIRACL, on BEIR, or on a collection of your own.

Every evaluator can be called with a model, or handed to the Trainer or ``model.fit`` as ``evaluator``.
"""

from evaluators.beir import BEIREvaluator
from evaluators.beir_search import BEIRSearch
from evaluators.benchmark import BenchmarkEvaluator
from evaluators.collection import CollectionEvaluator
from evaluators.miracl import MIRACLEvaluator

__all__ = ["BEIREvaluator", "BEIRSearch", "BenchmarkEvaluator", "CollectionEvaluator", "MIRACLEvaluator"]
