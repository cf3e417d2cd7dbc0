"""Search for beir's ``EvaluateRetrieval`` with this project's encoder and exact search."""

from __future__ import annotations

import hashlib
import itertools
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import cast

from beir.retrieval.search import BaseSearch
from sentence_transformers import SentenceTransformer
from torch import device as Device

from evaluators.runs import Run, make_run, without_identical_ids
from st_clp.data import CollectionError, Corpus, Document, MemoryCorpus
from st_clp.data.checks import require_ids
from st_clp.declaring import shows, takes
from st_clp.encoding import EmbeddingStore
from st_clp.encoding.shards import MANIFEST
from st_clp.encoding.working_model import Task
from st_clp.files import inside
from st_clp.options import Encoding
from st_clp.search import search

Texts = Mapping[str, Mapping[str, str]]  # document id -> {"title", "text"}
SCORE_FUNCTIONS = {"cos_sim": "cosine", "dot": "dot"}


@shows(encoding=Encoding)
class BEIRSearch(BaseSearch):
    """A search for beir's ``EvaluateRetrieval``, in place of its ``DenseRetrievalExactSearch``.

    Documents are encoded with ``model.encode_document`` and queries with ``model.encode_query``, both into folders; a
    search reads these a part at a time, so that its memory is that of one part, independent of the corpus's size. Every
    document is compared, and a query's own id is left out, as by beir's dense search, whose figures come out.

    Args:
        model: Any SentenceTransformer.
        store_dir: The folder to keep the documents' embeddings in, and beside it the queries'. They are used again as
            long as model and texts stay the same, and a search that was stopped goes on where it was. None: a temporary
            folder, for one search.
        encoding

    Example:
        ::

            from beir.datasets.data_loader import GenericDataLoader
            from beir.retrieval.evaluation import EvaluateRetrieval
            from sentence_transformers import SentenceTransformer
            from evaluators import BEIRSearch

            corpus, queries, qrels = GenericDataLoader("scifact").load(split="test")
            model = SentenceTransformer("BAAI/bge-m3")
            retrieval = EvaluateRetrieval(BEIRSearch(model, store_dir="embeddings"), score_function="cos_sim")
            results = retrieval.retrieve(corpus, queries)
            ndcg, mean_average_precision, recall, precision = retrieval.evaluate(qrels, results, retrieval.k_values)
    """

    @takes(encoding=Encoding)
    def __init__(
        self,
        model: SentenceTransformer,
        store_dir: str | os.PathLike[str] | None = None,
        *,
        encoding: Encoding,
    ) -> None:
        self.model = model
        self.store_dir = store_dir
        self.encoding = encoding
        self.results: Run = {}

    def search(
        self,
        corpus: Texts,
        queries: Mapping[str, str],
        top_k: int,
        score_function: str | None = None,
        *,
        return_sorted: bool = True,
    ) -> Run:
        """The best documents of every query.

        Args:
            corpus: Document id to ``{"title": …, "text": …}``; a missing title is none.
            queries: Query id to text.
            top_k: How many documents a query gets; fewer where the corpus is smaller.
            score_function: ``"cos_sim"`` or ``"dot"``; None: the model's own similarity.
            return_sorted: For beir, which does not sort otherwise; these are always best first.

        Returns:
            Query id to {document id: score}.

        Raises:
            CollectionError: There are no documents or no queries, an id cannot stand in a run, or a text is none.
            ValueError: The score function is not known, or ``top_k`` is below 1.
        """
        similarity = self._similarity(score_function)
        with ExitStack() as temporary:
            if self.store_dir is None:
                place = inside(temporary.enter_context(tempfile.TemporaryDirectory(prefix="st-clp-beir-")), "corpus")
            else:
                place = os.fspath(self.store_dir)
            asked, documents = self._encode(queries, corpus, f"{place}.queries", place)
            self.results = _retrieve(similarity, asked, [documents], top_k)
        return self.results

    def encode(
        self,
        corpus: Texts,
        queries: Mapping[str, str],
        encode_output_path: str = "./embeddings/",
        overwrite: bool = False,
        query_filename: str = "queries.pkl",
        corpus_filename: str = "corpus.*.pkl",
    ) -> None:
        """Encode corpus and queries to disk, for :meth:`search_from_files`: ``EvaluateRetrieval.encode_and_retrieve``.

        Args:
            corpus: As in :meth:`search`.
            queries: As in :meth:`search`.
            encode_output_path: The folder to write to.
            overwrite: Encode anew what is there of the same model and texts; of others it is anyway.
            query_filename: What to call the queries' embeddings. With any ending, it is a folder of arrays and
                JSON: nothing is pickled.
            corpus_filename: What to call the documents', with 0 in place of ``*``.

        Raises:
            CollectionError: As in :meth:`search`.
            ValueError: The folder holds other files.
        """
        folder = Path(encode_output_path)
        asked, documents = folder / query_filename, folder / corpus_filename.replace("*", "0")
        for store in (asked, documents):
            if store.is_file():
                raise ValueError(f"{store} is a file, such as beir's own; move it away, or name another folder")
            if overwrite and (store / MANIFEST).is_file():
                shutil.rmtree(store)
        self._encode(queries, corpus, str(asked), str(documents))

    def search_from_files(
        self,
        query_embeddings_file: str,
        corpus_embeddings_files: Sequence[str],
        top_k: int,
        score_function: str | None = None,
    ) -> Run:
        """The best documents of every query, from what :meth:`encode` wrote.

        Args:
            query_embeddings_file: The queries' embeddings.
            corpus_embeddings_files: The documents'; several may be searched together.
            top_k: As in :meth:`search`.
            score_function: As in :meth:`search`.

        Raises:
            FileNotFoundError: Something there is no finished store of embeddings.
            ValueError: As in :meth:`search`, or there are no documents' embeddings.
        """
        if not corpus_embeddings_files:
            raise ValueError("there are no embeddings of documents to search: encode them first")
        for path in (query_embeddings_file, *corpus_embeddings_files):
            if Path(path).is_file():
                raise ValueError(f"{path} is a file, such as beir's own pickles, which are not read; encode it again")
        asked = EmbeddingStore.open(query_embeddings_file)
        documents = [EmbeddingStore.open(path) for path in corpus_embeddings_files]
        self.results = _retrieve(self._similarity(score_function), asked, documents, top_k)
        return self.results

    def _encode(
        self, queries: Mapping[str, str], corpus: Texts, query_folder: str, folder: str
    ) -> tuple[EmbeddingStore, EmbeddingStore]:
        """The stores of queries and documents."""
        # What cannot be scored in the end is refused before the corpus is encoded.
        require_ids(queries, "query", "the queries")
        require_ids(corpus, "document", "the corpus")
        asked = self._store(MemoryCorpus("queries", dict(queries)), query_folder, "query")
        return asked, self._store(_BEIRCorpus(corpus), folder, "document")

    def _store(self, corpus: Corpus, folder: str, task: Task) -> EmbeddingStore:
        return EmbeddingStore.build(
            self.model,
            corpus,
            folder,
            task=task,
            encoding=self.encoding,
        )

    def _similarity(self, score_function: str | None) -> SentenceTransformer:
        """What :func:`st_clp.search.search` asks for the similarity function: the model, or only a function's name."""
        if score_function is None:
            return self.model
        if score_function not in SCORE_FUNCTIONS:
            raise ValueError(
                f"score_function must be one of {', '.join(SCORE_FUNCTIONS)}, or None for the model's own similarity; "
                f"got {score_function!r}"
            )
        return cast(SentenceTransformer, _Similarity(SCORE_FUNCTIONS[score_function], self.model.device))


@dataclass(frozen=True)
class _Similarity:
    """Cosine or dot product, regardless of the model's own similarity."""

    similarity_fn_name: str
    device: Device


class _BEIRCorpus(Corpus):
    """A corpus as beir holds it; title and text are joined when they are asked for, as beir's models join them."""

    name = "corpus"

    def __init__(self, documents: Texts) -> None:
        self._documents = documents

    def __iter__(self) -> Iterator[Document]:
        return map(self._document, self._documents)

    def get(self, doc_ids: Iterable[str]) -> dict[str, Document]:
        return {doc_id: self._document(doc_id) for doc_id in doc_ids if doc_id in self._documents}

    def fingerprint(self) -> str:
        digest = hashlib.blake2b(digest_size=16)
        for document in self:
            digest.update(f"{document.doc_id}\0{document.text}\0".encode("utf-8", "surrogatepass"))
        return digest.hexdigest()

    def expected_size(self) -> int:
        return len(self._documents)

    def _document(self, doc_id: str) -> Document:
        fields = self._documents[doc_id]
        if not isinstance(fields, Mapping) or not isinstance(fields.get("text"), str):
            raise CollectionError(f"the corpus: the document {doc_id!r} must have a 'text', and may have a 'title'")
        title = fields.get("title") or ""
        return Document(doc_id, f"{title} {fields['text']}".strip(), title)


def _retrieve(
    similarity: SentenceTransformer, asked: EmbeddingStore, corpora: Sequence[EmbeddingStore], top_k: int
) -> Run:
    if top_k < 1:
        raise ValueError(f"top_k must be at least 1, got {top_k}")
    queries = asked.rows(range(len(asked)))
    found: Run = {query_id: {} for query_id in asked.ids}
    for documents in corpora:
        # One document more makes up for the query's own.
        run = make_run(asked.ids, *search(similarity, queries, documents, top_k + 1))
        for query_id, scores in run.items():
            found[query_id].update(scores)
    if len(corpora) > 1:
        found = {query_id: dict(sorted(docs.items(), key=lambda item: -item[1])) for query_id, docs in found.items()}
    others, _ = without_identical_ids(found)
    return {query_id: dict(itertools.islice(scores.items(), top_k)) for query_id, scores in others.items()}
