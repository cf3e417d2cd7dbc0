"""Generate training queries for documents without any, check them, and save a collection to train on.

After Dai et al. (2023), Promptagator, arXiv:2209.11755, and Wang et al. (2022), GPL, arXiv:2112.07577: a language model
writes a query for a document, and the pair is kept if a retriever finds the document by the query.
"""

from __future__ import annotations

import json
import logging
import os
import random
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

from sentence_transformers import SentenceTransformer

from st_clp.data import Collection, CollectionError, Corpus
from st_clp.encoding import EmbeddingStore
from st_clp.files import whole_folder
from st_clp.options import Encoding
from st_clp.queries import DocumentQueries, QueriesAccount, QueryChain, RoundTrip

logger = logging.getLogger(__name__)

LEAST_CHARACTERS = 20  # of a document that is worth a query
DEV_SHARE, MOST_DEV = 0.1, 500  # of the documents, whose queries are kept for evaluation


@dataclass
class PairsAccount:
    """The statistics of the documents that were drawn.

    Attributes:
        drawn: How many there were.
        left_out: Documents or queries without a pair: cause to count.
        train, dev: Queries kept for training and for evaluation.
        given: Training queries that the collection had before, which are kept too.
        writing: The statistics of the sources.
    """

    drawn: int
    left_out: Counter[str] = field(default_factory=Counter)
    train: int = 0
    dev: int = 0
    given: int = 0
    writing: QueriesAccount = field(default_factory=QueriesAccount)

    def __str__(self) -> str:
        lines = [f"{self.drawn:,} documents drawn: {self.train:,} queries to train on, {self.dev:,} to evaluate on"]
        lines += [f"{number:>9,}  {cause}" for cause, number in self.left_out.items()]
        if self.given:
            lines.append(f"{self.given:>9,}  training queries were there before, and are kept")
        return "\n".join(lines)


def write_pairs(
    corpus: Corpus,
    chain: QueryChain,
    output: str | os.PathLike[str],
    *,
    number: int,
    model: SentenceTransformer | None = None,
    given: Collection | None = None,
    language: str | None = None,
    round_trip_k: int = 10,
    seed: int = 42,
    encoding: Encoding | None = None,
    store_dir: str | os.PathLike[str] | None = None,
) -> PairsAccount:
    """Generate queries for documents of a corpus, and write a collection in BEIR's format with them.

    Args:
        corpus: The documents, all of which are in the new collection.
        chain: The sources, without judgments. What they generated before is not paid for again.
        output: The new folder; written atomically.
        number: Documents to draw, among those with enough text that no given query asks for.
        model: Keep a query only if this model finds its document by it; None keeps all.
        given: Existing training queries; they are kept, and their documents get no others.
        language: ISO 639 code of the documents, if known.
        round_trip_k: The document must be among so many of the best.
        seed: The random seed.
        encoding: How the model encodes; None takes the defaults.
        store_dir: A folder for the documents' embeddings, so that a stopped check can be resumed; None keeps them in
            memory.

    Raises:
        CollectionError: No document can get a query, or no query is left.
        EndpointError: An endpoint refuses the key or does not have the model.
    """
    asked_for = {doc_id for found in (given.positives() if given else {}).values() for doc_id in found}
    drawn = corpus.draw(
        number,
        seed,
        lambda document: document.doc_id not in asked_for and len(document.text.strip()) >= LEAST_CHARACTERS,
    )
    if not drawn:
        raise CollectionError(
            f"{corpus.name}: no document has {LEAST_CHARACTERS} characters and no query; there is nothing to write for"
        )
    account = PairsAccount(len(drawn), given=len(given.queries) if given else 0)
    found, account.writing = chain.generate(drawn, language=language)
    account.left_out.update(account.writing.without)
    answers = [found[document.doc_id] for document in drawn if document.doc_id in found]
    if model is not None:
        how = encoding or Encoding()
        store = EmbeddingStore.build(model, corpus, store_dir, encoding=how)
        answers, counts = RoundTrip(model, store, k=round_trip_k, action="drop", encoding=how).check(answers)
        if counts["dropped"]:
            cause = f"queries that do not find their document among the best {round_trip_k}"
            account.left_out[cause] = counts["dropped"]
    queries = _distinct(answers, account)
    if not queries:
        raise CollectionError(
            f"{corpus.name}: none of the queries that were written is left ({account}); look at the prompt, or check "
            "less strictly (--query-round-trip-k)"
        )
    _write(Path(output), corpus, given, queries, seed, account)
    return account


def _distinct(answers: Sequence[DocumentQueries], account: PairsAccount) -> dict[str, list[str]]:
    """Document id to its queries, without those written for several documents, whose answer is not known."""
    times = Counter(query.text for answer in answers for query in answer.queries)
    if shared := sum(number for number in times.values() if number > 1):
        account.left_out["queries that were written for several documents"] = shared
    queries = {answer.doc_id: [query.text for query in answer.queries if times[query.text] == 1] for answer in answers}
    return {doc_id: texts for doc_id, texts in queries.items() if texts}


def _write(
    output: Path,
    corpus: Corpus,
    given: Collection | None,
    queries: Mapping[str, Sequence[str]],
    seed: int,
    account: PairsAccount,
) -> None:
    held_out = set(random.Random(seed).sample(sorted(queries), min(MOST_DEV, int(len(queries) * DEV_SHARE))))
    with whole_folder(output) as folder:
        with open(folder / "corpus.jsonl", "w", encoding="utf-8") as file:
            for document in corpus:
                # The text includes the title, as models read it.
                _line(file, {"_id": document.doc_id, "text": document.text})
        (folder / "qrels").mkdir()
        with (
            open(folder / "queries.jsonl", "w", encoding="utf-8") as asked,
            open(folder / "qrels" / "train.tsv", "w", encoding="utf-8") as train,
            open(folder / "qrels" / "dev.tsv", "w", encoding="utf-8") as dev,
        ):
            for file in (train, dev):
                file.write("query-id\tcorpus-id\tscore\n")
            for query_id, text, grades in _given(given):
                _line(asked, {"_id": query_id, "text": text})
                train.writelines(f"{query_id}\t{doc_id}\t{grade}\n" for doc_id, grade in grades.items())
            for doc_id, texts in queries.items():
                into = dev if doc_id in held_out else train
                for place, text in enumerate(texts):
                    query_id = f"written-{doc_id}-{place}"
                    _line(asked, {"_id": query_id, "text": text})
                    into.write(f"{query_id}\t{doc_id}\t1\n")
        if not held_out:
            (folder / "qrels" / "dev.tsv").unlink()
    account.dev = sum(len(texts) for doc_id, texts in queries.items() if doc_id in held_out)
    account.train = sum(map(len, queries.values())) - account.dev


def _given(given: Collection | None) -> Iterator[tuple[str, str, Mapping[str, int]]]:
    if given is not None:
        for query_id, grades in given.judgments.items():
            yield query_id, given.queries[query_id], grades


def _line(file: IO[str], row: Mapping[str, str]) -> None:
    file.write(json.dumps(row, ensure_ascii=False) + "\n")
