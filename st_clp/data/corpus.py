"""A corpus: the documents of a collection, streamed in order or fetched by id."""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

from st_clp.data.errors import CollectionError

SMALL_CORPUS_BYTES = 64 * 2**20


class Document(NamedTuple):
    """A document's id in its corpus, the text that a model encodes, and its title where the source knows one."""

    doc_id: str
    text: str
    title: str = ""


class Corpus(ABC):
    """Documents that are streamed or fetched by id. Subclasses say where they come from."""

    name: str

    @abstractmethod
    def __iter__(self) -> Iterator[Document]:
        """Stream the documents, always in the same order."""

    @abstractmethod
    def get(self, doc_ids: Iterable[str]) -> dict[str, Document]:
        """The documents with these ids; ids that the corpus does not have are absent from the answer."""

    @abstractmethod
    def fingerprint(self) -> str:
        """A short text that changes when the documents may have changed, without reading them all."""

    def expected_size(self) -> int | None:
        """How many documents to expect, for progress bars; None where nobody knows before they are read."""
        return None

    def __deepcopy__(self, memo: object) -> Corpus:
        # Nothing changes a corpus, and a model's card remembers its evaluator: a copy of a model would copy all texts.
        return self


class MemoryCorpus(Corpus):
    """Documents held in memory: for small collections."""

    def __init__(self, name: str, documents: dict[str, str], titles: Mapping[str, str] | None = None) -> None:
        self.name = name
        self._texts = documents
        self._titles = titles or {}

    def _document(self, doc_id: str) -> Document:
        return Document(doc_id, self._texts[doc_id], self._titles.get(doc_id, ""))

    def __iter__(self) -> Iterator[Document]:
        return map(self._document, self._texts)

    def get(self, doc_ids: Iterable[str]) -> dict[str, Document]:
        return {doc_id: self._document(doc_id) for doc_id in doc_ids if doc_id in self._texts}

    def fingerprint(self) -> str:
        digest = hashlib.blake2b(digest_size=16)
        for doc_id, text in self._texts.items():
            digest.update(f"{doc_id}\0{text}\0".encode("utf-8", "surrogatepass"))
        return digest.hexdigest()

    def expected_size(self) -> int:
        return len(self._texts)


class FileCorpus(Corpus):
    """Documents read from one file each time they are asked for, unless the file is small.

    Every pass checks the file: a broken line and an id that comes twice with different texts are errors, an
    id that comes twice with the same text counts once. Ids are fetched in one pass over the file, so ask for
    many at once.

    Args:
        name: The corpus's name.
        path: The file.
        read: Yields (line number, document) from the file.
    """

    def __init__(self, name: str, path: Path, read: Callable[[Path], Iterator[tuple[int, Document]]]) -> None:
        self.name = name
        self._path = path
        self._read = read
        self._size: int | None = None
        self._held: dict[str, Document] | None = None
        self.repeated = 0  # ids that came again with the same text
        # Compressed text is several times as large once it is read.
        share = 0.25 if path.suffix == ".gz" else 1.0
        if path.stat().st_size <= SMALL_CORPUS_BYTES * share:
            self._held = {document.doc_id: document for document in self._stream()}

    def _stream(self) -> Iterator[Document]:
        # A hash of each text instead of the text: the check must not hold the corpus.
        seen: dict[str, int] = {}
        repeated = 0
        for number, document in self._read(self._path):
            text_hash = hash(document.text)
            if document.doc_id in seen:
                if seen[document.doc_id] != text_hash:
                    raise CollectionError(
                        f"{self._path}, line {number}: the document id {document.doc_id!r} was there before with "
                        "another text; give each document an id of its own"
                    )
                repeated += 1
                continue
            seen[document.doc_id] = text_hash
            yield document
        self._size, self.repeated = len(seen), repeated

    def __iter__(self) -> Iterator[Document]:
        if self._held is None:
            return self._stream()
        return iter(self._held.values())

    def get(self, doc_ids: Iterable[str]) -> dict[str, Document]:
        wanted = set(doc_ids)
        if self._held is not None:
            return {doc_id: self._held[doc_id] for doc_id in wanted if doc_id in self._held}
        return {document.doc_id: document for document in self._stream() if document.doc_id in wanted}

    def fingerprint(self) -> str:
        status = self._path.stat()
        return f"{self._path.resolve()}:{status.st_size}:{status.st_mtime_ns}"

    def expected_size(self) -> int | None:
        return self._size
