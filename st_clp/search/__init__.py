"""Top-k search over a corpus's embeddings."""

from st_clp.search.exact import pair_scores, search

__all__ = ["pair_scores", "search"]
