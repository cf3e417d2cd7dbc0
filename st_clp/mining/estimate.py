"""What mining would cost, from a sample and a short trial, before it is begun."""

from __future__ import annotations

import itertools
import os
import random
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from sentence_transformers import SentenceTransformer
from tqdm.auto import tqdm

from st_clp.data import Collection
from st_clp.encoding import ComputeDtype, EmbeddingStore
from st_clp.encoding.batches import tokenise
from st_clp.encoding.building import Builder
from st_clp.encoding.encode import encode
from st_clp.encoding.shards import KEY_BYTES
from st_clp.encoding.working_model import Task, WorkingModel
from st_clp.mining.options import MiningOptions
from st_clp.mining.ranking import query_store_dir
from st_clp.search import search_rows

SAMPLE = 512  # documents, and queries, whose length is looked at
WARM_UP = 16
TRIAL_SECONDS = 10.0
SEARCH_DOCUMENTS, SEARCH_QUERIES = 16_384, 256


@dataclass(frozen=True)
class TextCost:
    """What encoding some texts would cost.

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
    """What mining would cost.

    Attributes:
        collection: The collection's name.
        documents: Of encoding the documents.
        queries: Of encoding the training queries.
        search_seconds: Of an exact search.
        computed_in: What the model would compute in.
    """

    collection: str
    documents: TextCost
    queries: TextCost
    search_seconds: float
    computed_in: str

    @property
    def seconds(self) -> float:
        """Of everything together."""
        return self.documents.seconds + self.queries.seconds + self.search_seconds

    def __str__(self) -> str:
        lines = [f"{self.collection}: about {_duration(self.seconds)} in all"]
        for name, cost in (("documents", self.documents), ("queries", self.queries)):
            already = f", {cost.already:,} of them encoded before" if cost.already else ""
            lines.append(
                f"  {cost.number:,} {name} of {cost.tokens:.0f} tokens on average{already}: "
                f"{_duration(cost.seconds)} in {self.computed_in}, {_size(cost.bytes_on_disk)} on disk"
            )
        lines.append(f"  search: {_duration(self.search_seconds)}")
        return "\n".join(lines)


def estimate(
    model: SentenceTransformer,
    collection: Collection,
    options: MiningOptions | None = None,
    *,
    dtype: ComputeDtype = "auto",
    batch_size: int | None = None,
    store_dir: str | os.PathLike[str] | None = None,
    show_progress_bar: bool = True,
) -> MiningEstimate:
    """Estimate what :func:`st_clp.mining.mine` with the same arguments would cost. Nothing is written.

    The corpus is read once; a sample of it is tokenised, and encoded for some seconds. An approximate index, BM25 and
    a cross-encoder are not part of the estimate.

    Raises:
        CollectionError: No query has a relevant document, or there are no documents.
    """
    options = options or MiningOptions()
    collection.require_positives()
    seen = tqdm(
        (document.text for document in collection.documents()),
        total=collection.corpus.expected_size(),
        desc=f"Reading {collection.corpus_name}",
        unit=" documents",
        disable=not show_progress_bar,
    )
    documents, number = _sample(seen, options.seed)
    queries = [collection.queries[query_id] for query_id in collection.positives()][: options.max_queries]
    builder = Builder(model, collection.corpus, "document", dtype, batch_size, show_progress_bar=False)
    tokens_a_second = _tokens_a_second(model, documents, dtype, batch_size)

    def cost(task: Task, sample: Sequence[str], number: int, already: int) -> TextCost:
        tokens = _mean_tokens(model, sample, task)
        # An id and its line, besides the embedding and the key.
        row = builder.row_bytes + KEY_BYTES + 24
        already = min(already, number)
        return TextCost(number, tokens, already, number * row, (number - already) * tokens / tokens_a_second)

    encoded = {"document": 0, "query": 0}
    if store_dir is not None:
        encoded["document"] = builder.already_encoded(Path(store_dir))
        asking = Builder(model, collection.corpus, "query", dtype, batch_size, show_progress_bar=False)
        encoded["query"] = asking.already_encoded(Path(query_store_dir(store_dir)))
    return MiningEstimate(
        collection.name,
        cost("document", documents, number, encoded["document"]),
        cost("query", queries[:SAMPLE], len(queries), encoded["query"]),
        _search_seconds(model, builder.dim, number, len(queries), options.range_max),
        builder.computed_in,
    )


def _sample(texts: Iterable[str], seed: int) -> tuple[list[str], int]:
    """(so many of the texts, each as likely as any other; how many there are), in one pass."""
    generator = random.Random(seed)
    stream = iter(texts)
    sample = list(itertools.islice(stream, SAMPLE))
    number = len(sample)
    for text in stream:
        number += 1
        place = generator.randrange(number)
        if place < SAMPLE:
            sample[place] = text
    generator.shuffle(sample)
    return sample, number


def _mean_tokens(model: SentenceTransformer, texts: Sequence[str], task: Task) -> float:
    working = WorkingModel(model, task)
    if not working.by_tokens:
        return float(np.mean([len(text.split()) for text in texts]))
    window = tokenise(working.preprocess, list(texts))
    return window.tokens / len(window)


def _tokens_a_second(
    model: SentenceTransformer, texts: Sequence[str], dtype: ComputeDtype, batch_size: int | None
) -> float:
    def seconds(chosen: Sequence[str]) -> float:
        started = time.perf_counter()
        for _ in encode(model, chosen, "document", dtype=dtype, batch_size=batch_size):
            pass
        return time.perf_counter() - started

    few = texts[:WARM_UP]
    seconds(few)
    number = max(len(few), min(len(texts), int(TRIAL_SECONDS / max(seconds(few), 1e-9) * len(few))))
    chosen = texts[:number]
    return _mean_tokens(model, chosen, "document") * len(chosen) / seconds(chosen)


def _search_seconds(model: SentenceTransformer, dim: int, documents: int, queries: int, depth: int) -> float:
    """Measured on a small search with random embeddings, and multiplied up."""
    generator = np.random.default_rng(0)
    few_documents, few_queries = min(documents, SEARCH_DOCUMENTS), min(queries, SEARCH_QUERIES)
    matrix = generator.normal(size=(few_documents, dim)).astype(np.float16)
    asked = generator.normal(size=(few_queries, dim)).astype(np.float32)
    store = EmbeddingStore(list(map(str, range(few_documents))), matrix)
    started = time.perf_counter()
    search_rows(model, asked, store, min(depth, few_documents))
    return (time.perf_counter() - started) * (documents / few_documents) * (queries / few_queries)


def _duration(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, hours = seconds / 60, seconds / 3600
    return f"{minutes:.1f} min" if minutes < 60 else f"{hours:.1f} h"


def _size(number: float) -> str:
    for unit in ("B", "kB", "MB", "GB"):
        if number < 1000:
            return f"{number:.1f} {unit}"
        number /= 1000
    return f"{number:.1f} TB"
