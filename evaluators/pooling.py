"""A small part of a corpus that stands for all of it: judged documents and the best of a reference run.

It is there for evaluation in the middle of training: a small share of the cost. Figures over a pool come out higher
than over the corpus and are never to be compared with those.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from dataclasses import replace

from evaluators.runs import ranked, read_run
from st_clp.data import Collection, CollectionError, MemoryCorpus

ReferenceRun = str | os.PathLike[str] | Mapping[str, Mapping[str, float]]


def pooled_collection(collection: Collection, reference: ReferenceRun | None, depth: int) -> tuple[Collection, str]:
    """The collection over its judged documents and, for each query, the best ``depth`` of a reference run.

    Args:
        collection: Its judged documents are always in the pool.
        reference: A TREC run file, or {query id: {document id: score}}; None pools the judged documents alone.
        depth: How many of the reference run's documents of each query to take.

    Returns:
        (the collection over the pool, how the pool was made).

    Raises:
        CollectionError: The run answers none of the collection's queries, or names only documents it does not have.
        ValueError: ``depth`` is below 1, or a line of the run file is broken.
    """
    if depth < 1:
        raise ValueError(f"pool_depth must be at least 1, got {depth}")
    wanted = {doc_id for grades in collection.judgments.values() for doc_id in grades}
    description = "judged documents"
    if reference is not None:
        name = "a run" if isinstance(reference, Mapping) else os.fspath(reference)
        run: Mapping[str, Mapping[str, float]] = reference if isinstance(reference, Mapping) else read_run(reference)
        answered = {query_id: run[query_id] for query_id in collection.judgments if query_id in run}
        if not answered:
            raise CollectionError(f"{name} answers none of the queries of {collection.name}; is it of another split?")
        for documents in answered.values():
            wanted.update(doc_id for doc_id, _ in ranked(documents)[:depth])
        description = f"judged documents and the best {depth} of {os.path.basename(name)}"
    found = collection.get_documents(wanted)
    if not found:
        raise CollectionError(f"{collection.name}: none of the {len(wanted)} documents of the pool is in the corpus")
    # In an order that does not depend on the run's, so that equal pools have equal embeddings on disk.
    texts = {doc_id: found[doc_id].text for doc_id in sorted(found)}
    digest = hashlib.blake2b("\n".join(texts).encode(), digest_size=4).hexdigest()
    corpus = MemoryCorpus(f"{collection.corpus_name} (pooled {digest})", texts)
    pool = replace(collection, corpus=corpus)
    pool.note_absent_documents(texts)
    return pool, f"{description}: {len(texts):,} documents"
