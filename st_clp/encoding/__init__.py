"""From texts to embeddings: encoding in a stream, and the store that keeps a corpus's embeddings."""

from st_clp.encoding.encode import encode_documents, encode_queries
from st_clp.encoding.fingerprint import model_fingerprint
from st_clp.encoding.store import EmbeddingStore

__all__ = ["EmbeddingStore", "encode_documents", "encode_queries", "model_fingerprint"]
