"""Encoding texts as a stream, and stores of a corpus's embeddings."""

from st_clp.encoding.encode import encode_documents, encode_queries
from st_clp.encoding.store import EmbeddingStore
from st_clp.encoding.working_model import computed_precision, hardware_has_bf16, kernels, model_fingerprint
from st_clp.options import ComputeDtype

__all__ = [
    "ComputeDtype",
    "EmbeddingStore",
    "computed_precision",
    "encode_documents",
    "encode_queries",
    "hardware_has_bf16",
    "kernels",
    "model_fingerprint",
]
