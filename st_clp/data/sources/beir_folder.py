"""A BEIR folder: ``corpus.jsonl``, ``queries.jsonl`` and ``qrels/SPLIT.tsv``, each plain or gzipped."""

from __future__ import annotations

import sys
from collections.abc import Container, Iterator, Sequence
from functools import partial
from pathlib import Path

from st_clp.data.checks import (
    CollectionError,
    add_judgment,
    read_grade,
    readable_path,
    require_grade,
    require_id,
)
from st_clp.data.collection import Collection
from st_clp.data.corpus import Corpus, Document, FileCorpus, find_file, id_field, read_jsonl, read_lines, text_field
from st_clp.data.registry import register_source
from st_clp.files import shown

DEFAULT_FIELDS = ("title", "text")


def recognises(source: str) -> bool:
    return find_file(Path(source), "corpus.jsonl") is not None


def known_names() -> list[str]:
    return []


def splits(source: str) -> list[str]:
    return sorted(_split_files(Path(source)))


def load(source: str, *, split: str | None, text_fields: Sequence[str] | None) -> Collection:
    folder = Path(source)
    corpus_file = find_file(folder, "corpus.jsonl")
    queries_file = find_file(folder, "queries.jsonl")
    if corpus_file is None or queries_file is None:
        raise CollectionError(f"{folder}: a BEIR folder needs corpus.jsonl and queries.jsonl; one of them is missing")
    split, judgments_file = _choose_split(folder, split)
    corpus = _corpus(folder, corpus_file, text_fields)
    name = corpus.name
    # Read the user's files through once, so that all errors in them are reported before any work is done.
    known_ids = {document.doc_id for document in corpus}
    _require_documents(known_ids, corpus_file)
    queries = _read_queries(queries_file)
    judgments, repeated = _read_judgments(judgments_file, queries, known_ids)
    collection = Collection.checked(corpus, queries, judgments, name=f"{name}/{split}", split=split)
    collection.note_absent_documents(known_ids)
    if not collection.without_missing_documents(known_ids).judgments:
        causes = collection.causes() or "the file is empty"
        raise CollectionError(
            f"{judgments_file}: no judgment joins a query of {queries_file.name} to a document of {corpus_file.name} "
            f"({causes}); its lines must be query-id, corpus-id, score"
        )
    collection.left_out |= repeated
    if corpus.repeated:
        collection.left_out["documents that came twice"] = corpus.repeated
    return collection


def documents(source: str, *, text_fields: Sequence[str] | None) -> Corpus:
    folder = Path(source)
    corpus_file = find_file(folder, "corpus.jsonl")
    assert corpus_file is not None  # or the folder would not have been recognised
    corpus = _corpus(folder, corpus_file, text_fields)
    _require_documents({document.doc_id for document in corpus}, corpus_file)
    return corpus


def _corpus(folder: Path, file: Path, text_fields: Sequence[str] | None) -> FileCorpus:
    fields = tuple(text_fields or DEFAULT_FIELDS)
    return FileCorpus(readable_path(folder), file, partial(_read_documents, fields=fields))


def _require_documents(known_ids: set[str], file: Path) -> None:
    if not known_ids:
        raise CollectionError(f'{file} has no documents; each line must be {{"_id": …, "title": …, "text": …}}')


def _split_files(folder: Path) -> dict[str, Path]:
    return {
        path.name.removesuffix(".gz").removesuffix(".tsv"): path
        for path in sorted((folder / "qrels").glob("*"))
        if path.name.endswith((".tsv", ".tsv.gz"))
    }


def _choose_split(folder: Path, split: str | None) -> tuple[str, Path]:
    files = _split_files(folder)
    if not files:
        raise CollectionError(
            f"{folder}: there are no judgments; put them in {folder / 'qrels' / 'train.tsv'}, a line each of "
            "query-id, corpus-id, score, separated by tabs, under a header line"
        )
    if split is None and len(files) == 1:
        split = next(iter(files))
    if split is None or split not in files:
        asked = "name the split to read" if split is None else f"there is no split {split!r}"
        raise CollectionError(f"{folder}: {asked}; it has {', '.join(files)}")
    return split, files[split]


def _read_documents(path: Path, fields: tuple[str, ...]) -> Iterator[tuple[int, Document]]:
    for number, row in read_jsonl(path):
        if not any(name in row for name in fields):
            raise CollectionError(
                f"{path}, line {number}: none of the fields {', '.join(fields)}; the line has {', '.join(row)}"
            )
        texts = [text_field(path, number, row, name, default="") for name in fields]
        title = row.get("title")
        yield (
            number,
            Document(
                id_field(path, number, row, "document"),
                " ".join(text for text in texts if text),
                title.strip() if isinstance(title, str) else "",
            ),
        )


def _read_queries(path: Path) -> dict[str, str]:
    queries: dict[str, str] = {}
    for number, row in read_jsonl(path):
        query_id, text = id_field(path, number, row, "query"), text_field(path, number, row, "text")
        if queries.setdefault(query_id, text) != text:
            raise CollectionError(
                f"{path}, line {number}: the query id {query_id!r} was there before with another text"
            )
    return queries


def _read_judgments(
    path: Path, queries: Container[str], documents: Container[str]
) -> tuple[dict[str, dict[str, int]], dict[str, int]]:
    """(judgments, what came again with another grade: cause to count)."""
    judgments: dict[str, dict[str, int]] = {}
    repeated: dict[str, int] = {}
    for number, line in read_lines(path):
        where = f"{path}, line {number}"
        parts = _columns(line)
        if number == 1 and len(parts) == 3 and _is_header(parts, queries, documents):
            continue
        grade = read_grade(parts[2]) if len(parts) == 3 else None
        if grade is None:
            raise CollectionError(
                f"{where}: expected query-id, corpus-id and a whole-number score separated by tabs, or TREC's four "
                f"columns, got {shown(line)}"
            )
        query_id, doc_id = require_id(parts[0], "query", where), require_id(parts[1], "document", where)
        add_judgment(judgments, query_id, doc_id, require_grade(grade, where), repeated)
    return judgments, repeated


def _columns(line: str) -> list[str]:
    """Split a line into query id, document id and grade; TREC's qrels have an unused column between the first two."""
    parts = [part.strip() for part in line.split("\t")]
    if len(parts) == 1:
        parts = line.split()
    return [parts[0], *parts[2:]] if len(parts) == 4 else parts


def _is_header(parts: list[str], queries: Container[str], documents: Container[str]) -> bool:
    """Whether the first line is a header; it is not if it names a known query or document."""
    if parts[0] in queries or parts[1] in documents:
        return False
    return len(parts[2]) > 1 and not any(letter.isnumeric() for letter in parts[2])


register_source(sys.modules[__name__])
