"""A corpus: the documents of a collection, streamed in order or fetched by id."""

from __future__ import annotations

import gzip
import hashlib
import random
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from st_clp.data.checks import CollectionError, require_id, require_text
from st_clp.files import parse_object


def find_file(folder: Path, name: str) -> Path | None:
    """The file ``name`` in ``folder``, plain or with ``.gz`` after it; None where neither is there."""
    for candidate in (folder / name, folder / f"{name}.gz"):
        if candidate.is_file():
            return candidate
    return None


def read_lines(path: Path) -> Iterator[tuple[int, str]]:
    """Yield (line number from 1, line without its end) of a UTF-8 text file, skipping blank lines.

    Raises:
        CollectionError: The file does not exist, is truncated, or is not UTF-8.
    """
    number = 0
    try:
        with gzip.open(path, "rt", encoding="utf-8") if path.suffix == ".gz" else open(path, encoding="utf-8") as file:
            for number, line in enumerate(file, start=1):
                if line.strip():
                    yield number, line.rstrip("\r\n").lstrip("\ufeff" if number == 1 else "")
    except FileNotFoundError as error:
        raise CollectionError(f"{path} is not there") from error
    except UnicodeDecodeError as error:
        raise CollectionError(
            f"{path}, after line {number}: not UTF-8 text ({error.reason}); save it as UTF-8"
        ) from error
    except (gzip.BadGzipFile, EOFError) as error:
        raise CollectionError(
            f"{path}, after line {number}: damaged or cut-off gzip file ({error}); copy it again"
        ) from error


def read_jsonl(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield (line number, object) of a JSON-lines file.

    Raises:
        CollectionError: A line is not a JSON object; the message names file and line.
    """
    for number, line in read_lines(path):
        where = f"{path}, line {number}"
        yield number, parse_object(line, where, error=CollectionError, remedy="each line must be one JSON object")


def text_field(path: Path, number: int, row: dict[str, Any], name: str, *, default: str | None = None) -> str:
    """The string under ``name`` in a row; numbers become strings, since ids are often written as numbers.

    Raises:
        CollectionError: The field is missing (and has no default), is not text, or contains a lone surrogate.
    """
    value = row.get(name, default)
    if isinstance(value, int) and not isinstance(value, bool):
        value = str(value)
    if value is None and name in row and default is not None:
        value = default
    if value is None:
        raise CollectionError(
            f"{path}, line {number}: no {name!r}; the line has {', '.join(map(repr, row)) or 'nothing'}"
        )
    return require_text(value, repr(name), f"{path}, line {number}")


def id_field(path: Path, number: int, row: dict[str, Any], what: str) -> str:
    """The id under ``_id`` of a row; ``what`` says whether it is a query or a document.

    Raises:
        CollectionError: It is missing, or cannot be written to a run file.
    """
    value = row.get("_id")
    if value is None or (isinstance(value, int) and not isinstance(value, bool)):
        value = text_field(path, number, row, "_id")
    if not isinstance(value, str):
        raise CollectionError(f"{path}, line {number}: '_id' must be text, not {type(value).__name__}")
    return require_id(value, what, f"{path}, line {number}")


SMALL_CORPUS_BYTES = 64 * 2**20


class Document(NamedTuple):
    """A document: its id, the text that a model encodes, and its title if the source has one."""

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
        """Fetch documents by id; unknown ids are left out."""

    @abstractmethod
    def fingerprint(self) -> str:
        """A short text that changes when the documents may have changed, without reading them all."""

    def expected_size(self) -> int | None:
        """The number of documents, for progress bars; None if it is not known before they are read."""
        return None

    def draw(self, number: int, seed: int, fits: Callable[[Document], bool] = lambda document: True) -> list[Document]:
        """Draw documents uniformly at random, returned in corpus order.

        Args:
            number: How many to draw (at most all of them); so many are held in memory.
            seed: Of the draw.
            fits: Whether a document may be drawn.
        """
        from tqdm.auto import tqdm  # the command line imports this module to print its help

        generator = random.Random(seed)
        drawn: list[tuple[int, Document]] = []
        bar = tqdm(
            self, desc=f"Drawing from {self.name}", total=self.expected_size(), unit=" documents", delay=5, leave=False
        )
        for size, document in enumerate(filter(fits, bar), start=1):
            if len(drawn) < number:
                drawn.append((size, document))
            elif (at := generator.randrange(size)) < number:
                drawn[at] = (size, document)
        return [document for _, document in sorted(drawn, key=lambda pair: pair[0])]

    def __deepcopy__(self, memo: object) -> Corpus:
        # A corpus is never changed, and a model's card holds its evaluator: copying a model would copy all texts.
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
