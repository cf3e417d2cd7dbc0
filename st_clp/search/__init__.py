"""Top-k search over a corpus's embeddings: exact, or by a FAISS index with its recall."""

from st_clp.search.approximate import ApproximateIndex, ApproximateResult, require_index
from st_clp.search.eligibility import is_own_document, is_own_text, may_be_negative, normalised_text
from st_clp.search.exact import pair_scores, search, search_rows

__all__ = [
    "ApproximateIndex",
    "ApproximateResult",
    "is_own_document",
    "is_own_text",
    "may_be_negative",
    "normalised_text",
    "pair_scores",
    "require_index",
    "search",
    "search_rows",
]
