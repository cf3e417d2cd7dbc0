"""Collections (documents, queries, judgments) and where they come from."""

import st_clp.data.sources  # noqa: F401  # each registers itself
from st_clp.data.checks import CollectionError
from st_clp.data.collection import Collection
from st_clp.data.corpus import Corpus, Document, MemoryCorpus
from st_clp.data.registry import open_corpus

__all__ = ["Collection", "CollectionError", "Corpus", "Document", "MemoryCorpus", "open_corpus"]
