"""Estimate the cost of mining from a sample and a short trial."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from sentence_transformers import SentenceTransformer
from tqdm.auto import tqdm

from st_clp.data import Collection
from st_clp.declaring import takes
from st_clp.encoding import EmbeddingStore
from st_clp.encoding.building import Builder
from st_clp.encoding.encode import SAMPLE, WARM_UP, sample_of, token_counts, tokens_a_second
from st_clp.encoding.store import builder_for
from st_clp.encoding.working_model import Task
from st_clp.mining.ranking import PAIRS_A_BATCH, queries_of, query_store_dir, require_one_score
from st_clp.options import Encoding, MiningOptions
from st_clp.search import search_rows
from st_clp.terminal import duration, size

if TYPE_CHECKING:
    from sentence_transformers import CrossEncoder

TRIAL_SECONDS = 10.0
SEARCH_DOCUMENTS, SEARCH_QUERIES = 16_384, 256


@dataclass(frozen=True)
class TextCost:
    """The cost of encoding some texts.

    Attributes:
        number: How many texts.
        tokens: Tokens of a text on average, after cutting to the model's length.
        already: How many of them are encoded already.
        bytes_on_disk: What their embeddings take.
        seconds: To encode those that are not encoded yet.
    """

    number: int
    tokens: float
    already: int
    bytes_on_disk: int
    seconds: float


@dataclass(frozen=True)
class MiningEstimate:
    """The cost of mining.

    Attributes:
        collection: The collection's name.
        documents: Of encoding the documents.
        queries: Of encoding the training queries.
        search_seconds: Of an exact search.
        computed_in: What the model would compute in.
        rescored: Pairs of a query and a document that a cross-encoder would score, at most.
        rescoring_seconds: Of that.
        left_out: Work that was not tried and so is not in the estimate.
    """

    collection: str
    documents: TextCost
    queries: TextCost
    search_seconds: float
    computed_in: str
    rescored: int = 0
    rescoring_seconds: float = 0.0
    left_out: tuple[str, ...] = ()

    @property
    def seconds(self) -> float:
        """Of everything together."""
        return self.documents.seconds + self.queries.seconds + self.search_seconds + self.rescoring_seconds

    def __str__(self) -> str:
        lines = [f"{self.collection}: about {duration(self.seconds)} in all"]
        for name, cost in (("documents", self.documents), ("queries", self.queries)):
            already = f", {cost.already:,} of them encoded before" if cost.already else ""
            lines.append(
                f"  {cost.number:,} {name} of {cost.tokens:.0f} tokens on average{already}: "
                f"{duration(cost.seconds)} in {self.computed_in}, {size(cost.bytes_on_disk)} on disk"
            )
        lines.append(f"  search: {duration(self.search_seconds)}")
        if self.rescored:
            lines.append(f"  {self.rescored:,} pairs for the cross-encoder: {duration(self.rescoring_seconds)}")
        lines += [f"  not in this estimate: {work}" for work in self.left_out]
        return "\n".join(lines)


@takes(encoding=Encoding)
def estimate(
    model: SentenceTransformer,
    collection: Collection,
    options: MiningOptions | None = None,
    *,
    cross_encoder: CrossEncoder | None = None,
    store_dir: str | os.PathLike[str] | None = None,
    encoding: Encoding,
) -> MiningEstimate:
    """Estimate what :func:`st_clp.mining.mine` with the same arguments would cost. Nothing is written.

    The corpus is read once; a sample of it is tokenised, and encoded for some seconds. A cross-encoder scores pairs of
    the sample for some seconds. What an approximate index or BM25 takes is not tried, and the estimate says so.

    Raises:
        CollectionError: No query has a relevant document, or there are no documents.
        ValueError: The cross-encoder gives more than one number for a pair.
    """
    options = options or MiningOptions()
    collection.require_positives()
    seen = tqdm(
        (document.text for document in collection.documents()),
        total=collection.corpus.expected_size(),
        desc=f"Reading {collection.corpus_name}",
        unit=" documents",
        disable=not encoding.show_progress_bar,
    )
    documents, number = sample_of(seen, options.seed)
    queries = [collection.queries[query_id] for query_id in collection.positives()][: options.max_queries]
    builder = Builder(model, collection.corpus, "document", encoding)
    rate = tokens_a_second(model, documents, encoding, seconds=TRIAL_SECONDS)

    def cost(task: Task, sample: Sequence[str], number: int, already: int) -> TextCost:
        tokens = float(token_counts(model, sample, task).mean())
        already = min(already, number)
        return TextCost(number, tokens, already, number * builder.stored_bytes, (number - already) * tokens / rate)

    rescored, rescoring = 0, 0.0
    if cross_encoder is not None:
        depth = options.range_max + max(map(len, collection.positives().values()))
        rescored = len(queries) * min(number, depth)
        rescoring = rescored * _seconds_a_pair(cross_encoder, queries[:SAMPLE], documents, encoding)
    encoded = {"document": 0, "query": 0}
    if store_dir is not None:
        kind = builder_for(store_dir, encoding)
        encoded["document"] = kind(model, collection.corpus, "document", encoding).already_encoded(os.fspath(store_dir))
        asking = kind(model, queries_of(collection), "query", encoding)
        encoded["query"] = asking.already_encoded(query_store_dir(store_dir))
    return MiningEstimate(
        collection.name,
        cost("document", documents, number, encoded["document"]),
        cost("query", queries[:SAMPLE], len(queries), encoded["query"]),
        search_seconds(model, builder.dim, number, len(queries), options.range_max),
        builder.computed_in,
        rescored,
        rescoring,
        tuple(_left_out(options)),
    )


def _left_out(options: MiningOptions) -> Iterator[str]:
    if options.candidates != "model":
        yield "ranking by BM25"
    if options.index is not None and options.candidates != "bm25":
        yield f"building the index {options.index}, which takes the place of the exact search"


def _seconds_a_pair(
    cross_encoder: CrossEncoder, queries: Sequence[str], documents: Sequence[str], encoding: Encoding
) -> float:
    require_one_score(cross_encoder)
    batch_size = encoding.encode_batch_size or PAIRS_A_BATCH
    pairs = [(queries[place % len(queries)], document) for place, document in enumerate(documents)]

    def seconds(number: int) -> float:
        started = time.perf_counter()
        cross_encoder.predict(pairs[:number], batch_size=batch_size, show_progress_bar=False)
        return time.perf_counter() - started

    few = min(len(pairs), WARM_UP)
    seconds(few)
    number = max(few, min(len(pairs), int(TRIAL_SECONDS / max(seconds(few), 1e-9) * few)))
    return seconds(number) / number


def search_seconds(model: SentenceTransformer, dim: int, documents: int, queries: int, depth: int) -> float:
    """The time of an exact search, extrapolated from a small one with random embeddings."""
    generator = np.random.default_rng(0)
    few_documents, few_queries = min(documents, SEARCH_DOCUMENTS), min(queries, SEARCH_QUERIES)
    matrix = generator.normal(size=(few_documents, dim)).astype(np.float16)
    asked = generator.normal(size=(few_queries, dim)).astype(np.float32)
    store = EmbeddingStore(list(map(str, range(few_documents))), matrix)
    started = time.perf_counter()
    search_rows(model, asked, store, min(depth, few_documents))
    return (time.perf_counter() - started) * (documents / few_documents) * (queries / few_queries)
