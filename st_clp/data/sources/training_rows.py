"""A JSON-lines file of training rows, in the format of the paper's code and of FlagEmbedding.

``{"query": str, "pos": [str, …], "neg": [str, …], "neg_q": [str, …]}``: ``neg_q[i]`` is a query that ``neg[i]``
answers, null where none is known. ``neg`` and ``neg_q`` may be missing. ``neg_q_source`` and ``neg_q_weight``, where
they are there, hold for each negative a list with where each query comes from and its weight. Rows have no ids, so
texts stand for themselves: the same text is the same document, the same query.
"""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from st_clp.data.checks import CollectionError, readable_path, require_text
from st_clp.data.collection import Collection
from st_clp.data.corpus import Corpus, MemoryCorpus, read_jsonl, text_field
from st_clp.data.registry import register_source

SPLIT = "train"


def recognises(source: str) -> bool:
    return source.endswith((".jsonl", ".jsonl.gz")) and Path(source).is_file()


def known_names() -> list[str]:
    return []


def splits(source: str) -> list[str]:
    return [SPLIT]


def load(source: str, *, split: str | None, text_fields: Sequence[str] | None) -> Collection:
    if split not in (None, SPLIT):
        raise CollectionError(f"{source}: a file of training rows has only the split 'train', not {split!r}")
    if text_fields:
        raise CollectionError(f"{source}: a file of training rows has no fields to choose; leave text_fields out")
    path = Path(source)
    documents: dict[str, str] = {}
    queries: dict[str, str] = {}
    judgments: dict[str, dict[str, int]] = {}
    known_queries: dict[str, list[str]] = {}
    query_marks: dict[str, dict[str, tuple[str, float]]] = {}
    contradictions = 0
    for number, row in read_jsonl(path):
        query = text_field(path, number, row, "query")
        query_id = text_id(query)
        queries[query_id] = query
        grades = judgments.setdefault(query_id, {})
        for text in _texts(path, number, row, "pos", required=True):
            documents[text_id(text)] = text
            grades[text_id(text)] = 1
        negatives = _texts(path, number, row, "neg")
        entries = _negative_queries(path, number, row, len(negatives))
        marks = _marks(path, number, row, entries)
        for text, negative_queries, marked in zip(negatives, entries, marks, strict=True):
            documents[text_id(text)] = text
            # A document that is relevant in one row stays relevant even if another row lists it as a negative.
            contradictions += grades.setdefault(text_id(text), 0) > 0
            known = known_queries.setdefault(text_id(text), [])
            known += [negative_query for negative_query in negative_queries if negative_query not in known]
            query_marks.setdefault(text_id(text), {}).update(marked)
    if not queries:
        raise CollectionError(f'{path} is empty; each line must be {{"query": …, "pos": […]}}')
    name = readable_path(source)
    collection = Collection.checked(MemoryCorpus(name, documents), queries, judgments, name=name, split=SPLIT)
    collection.known_queries = {doc_id: known for doc_id, known in known_queries.items() if known}
    collection.query_marks = {doc_id: marked for doc_id, marked in query_marks.items() if marked}
    collection.judged_negatives = any(0 in grades.values() for grades in judgments.values())
    if contradictions:
        collection.left_out["negatives that are also a positive of the same query"] = contradictions
    return collection


def documents(source: str, *, text_fields: Sequence[str] | None) -> Corpus:
    return load(source, split=None, text_fields=text_fields).corpus


def text_id(text: str) -> str:
    """An id for a text that has none: 16 hexadecimal digits of its hash."""
    return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()


def _texts(path: Path, number: int, row: dict[str, Any], name: str, *, required: bool = False) -> list[str]:
    values = row.get(name)
    if isinstance(values, str):
        values = [values]
    if values is None and not required:
        return []
    if not isinstance(values, list) or not all(isinstance(value, str) for value in values):
        raise CollectionError(f"{path}, line {number}: {name!r} must be a list of texts")
    for value in values:
        require_text(value, repr(name), f"{path}, line {number}")
    if required and not any(value.strip() for value in values):
        raise CollectionError(f"{path}, line {number}: {name!r} has no text; give each row at least one positive")
    return values


def _negative_queries(path: Path, number: int, row: dict[str, Any], num_negatives: int) -> list[list[str]]:
    """For each negative the queries that it answers: ``neg_q`` holds a text, null, or a list of texts for each."""
    values = row.get("neg_q")
    if values is None:
        return [[] for _ in range(num_negatives)]
    if not isinstance(values, list) or len(values) != num_negatives:
        got = len(values) if isinstance(values, list) else type(values).__name__
        raise CollectionError(
            f"{path}, line {number}: 'neg_q' must give one entry for each of the {num_negatives} in 'neg' "
            f"(null where no query is known), got {got}"
        )
    found = [[value] if isinstance(value, str) else value or [] for value in values]
    if not all(isinstance(entry, list) and all(isinstance(text, str) for text in entry) for entry in found):
        raise CollectionError(f"{path}, line {number}: each entry of 'neg_q' must be a text, a list of texts or null")
    for text in (text for entry in found for text in entry):
        require_text(text, "'neg_q'", f"{path}, line {number}")
    return [[text for text in entry if text.strip()] for entry in found]


def _marks(
    path: Path, number: int, row: dict[str, Any], entries: list[list[str]]
) -> list[dict[str, tuple[str, float]]]:
    """For each negative {query: (source, weight)}, where the row says them."""
    sources, weights = row.get("neg_q_source"), row.get("neg_q_weight")
    if sources is None and weights is None:
        return [{} for _ in entries]
    marks = []
    for place, queries in enumerate(entries):
        try:
            own_sources = ["given"] * len(queries) if sources is None else sources[place]
            own_weights = [1.0] * len(queries) if weights is None else weights[place]
            pairs = [(str(s), float(w)) for s, w in zip(own_sources, own_weights, strict=True)]
            if not all(0 <= weight < float("inf") for _, weight in pairs):
                raise ValueError
            marks.append(dict(zip(queries, pairs, strict=True)))
        except (TypeError, ValueError, IndexError) as error:
            raise CollectionError(
                f"{path}, line {number}: 'neg_q_source' and 'neg_q_weight' must give for each entry of 'neg_q' a list "
                "with a name, or a number of at least 0, for each of its queries"
            ) from error
    return marks


register_source(sys.modules[__name__])
