"""A SQLite file of everything that was generated, so that nothing is paid for twice.

An answer is stored under its generator, its prompt and the document's text as soon as it arrives. One process at a time
generates into a file; others wait and then find its answers. The file also records the spending, so that a budget
covers all processes that share it, killed ones included. It is in SQLite's WAL mode: processes of one machine may share
it, not machines over a network file system.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import sqlite3
import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

from st_clp.data import Document
from st_clp.files import locked
from st_clp.queries.interface import DocumentQueries, GeneratingSource, QuerySource, Usage

FORMAT = 2  # 1, of versions before 0.2.0, had further tables, for processes that generated at the same time
NANO = 10**9  # money is counted in whole billionths, so that sums are exact

TABLES = """
CREATE TABLE IF NOT EXISTS answers (
  generator TEXT NOT NULL, prompt TEXT NOT NULL, document TEXT NOT NULL, queries TEXT NOT NULL, cause TEXT,
  prompt_tokens INTEGER NOT NULL, completion_tokens INTEGER NOT NULL, cost REAL NOT NULL, made REAL NOT NULL,
  PRIMARY KEY (generator, prompt, document)) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS generators (generator TEXT PRIMARY KEY, description TEXT NOT NULL) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS prompts (prompt TEXT PRIMARY KEY, template TEXT NOT NULL) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS spending (
  id INTEGER PRIMARY KEY CHECK (id = 1), tokens INTEGER NOT NULL, nano INTEGER NOT NULL);
INSERT OR IGNORE INTO spending VALUES (1, 0, 0);
"""


class Key(NamedTuple):
    """The key of an answer: hashes of the generator, the prompt and the document's text."""

    generator: str
    prompt: str
    document: str

    @classmethod
    def of(cls, generator: str, prompt: str, text: str) -> Key:
        """The key of a document's text."""
        return cls(digest(generator), digest(prompt), digest(text))


@dataclass(frozen=True)
class StoredAnswer:
    """A stored answer; ``usage`` is what it cost when it was made."""

    queries: tuple[str, ...]
    cause: str | None
    usage: Usage


class QueryStore:
    """Answers of generators in a SQLite file, or in memory alone.

    Args:
        path: The file; it is made at the first access, or by :meth:`open`. None keeps everything in memory.

    Every method raises:
        ValueError: The file is not a store of queries, is damaged, or has a later format.
        OSError: The file cannot be opened, made, read or written.
    """

    def __init__(self, path: str | os.PathLike[str] | None = None) -> None:
        self.path = None if path is None else Path(path)
        self._lock = threading.RLock()
        self._closed = False
        self._connection: sqlite3.Connection | None = None

    def open(self) -> QueryStore:
        """Open the file now."""
        with self._reading():
            return self

    @contextmanager
    def _reading(self) -> Iterator[sqlite3.Connection]:
        """The open file, for this thread alone; errors of SQLite become messages with a remedy."""
        with self._lock:
            try:
                if self._connection is None:
                    self._connection = self._connect()
                yield self._connection
            except sqlite3.ProgrammingError:  # ours, such as a store that was closed
                raise
            except sqlite3.OperationalError as error:
                raise OSError(f"the store of queries {self.path} cannot be used: {error}") from error
            except sqlite3.DatabaseError as error:
                raise ValueError(
                    f"{self.path} is no store of queries, or a damaged one ({error}); name another file, or put a copy "
                    "of it back"
                ) from error

    def _connect(self) -> sqlite3.Connection:
        if self.path is not None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
        connection = sqlite3.connect(
            ":memory:" if self.path is None else self.path,
            timeout=60,  # another process's transaction is waited for; each is short
            isolation_level=None,
            check_same_thread=False,
        )
        try:
            self._require_ours(connection)
            _use_wal(connection)
            # A killed process loses nothing; a power cut may lose the last answers.
            connection.execute("PRAGMA synchronous = NORMAL")
            connection.execute("BEGIN IMMEDIATE")
            for statement in TABLES.split(";"):
                connection.execute(statement)
            connection.execute(f"PRAGMA user_version = {FORMAT}")
            connection.execute("COMMIT")
        except BaseException:
            connection.close()
            raise
        return connection

    def _require_ours(self, connection: sqlite3.Connection) -> None:
        """Refuse another program's file, and a damaged one, before anything in it is changed."""
        version = connection.execute("PRAGMA user_version").fetchone()[0]
        found = _columns(connection)
        with closing(sqlite3.connect(":memory:")) as ours:
            ours.executescript(TABLES)
            expected = _columns(ours)
        if version > FORMAT and found.keys() >= expected.keys():
            raise ValueError(f"{self.path} was written by a later version of st_clp (format {version})")
        if found and any(found.get(name) != columns for name, columns in expected.items()):
            raise ValueError(f"{self.path} is no store of queries: its tables are another program's; name another file")
        (verdict,) = connection.execute("PRAGMA quick_check(1)").fetchone()
        if verdict != "ok":
            raise sqlite3.DatabaseError(" ".join(verdict.split()))

    @contextmanager
    def _transaction(self) -> Iterator[sqlite3.Connection]:
        with self._reading() as database:
            database.execute("BEGIN IMMEDIATE")
            try:
                yield database
            except BaseException:
                if database.in_transaction:  # SQLite has ended it itself where the disk is full
                    database.execute("ROLLBACK")
                raise
            database.execute("COMMIT")

    def get(self, keys: Sequence[Key]) -> dict[Key, StoredAnswer]:
        """Look up answers; keys without one are left out."""
        found: dict[Key, StoredAnswer] = {}
        kinds: dict[tuple[str, str], list[str]] = {}
        for key in keys:
            kinds.setdefault((key.generator, key.prompt), []).append(key.document)
        for kind, documents in kinds.items():
            for begin in range(0, len(documents), 500):
                some = documents[begin : begin + 500]
                with self._reading() as database:
                    rows = database.execute(
                        "SELECT document, queries, cause, prompt_tokens, completion_tokens, cost FROM answers "
                        f"WHERE generator = ? AND prompt = ? AND document IN ({','.join('?' * len(some))})",
                        (*kind, *some),
                    ).fetchall()
                for document, queries, cause, *usage in rows:
                    found[Key(*kind, document)] = StoredAnswer(tuple(json.loads(queries)), cause, Usage(*usage))
        return found

    @contextmanager
    def generating(self) -> Iterator[None]:
        """Hold the lock for generating into this file. A killed process releases it."""
        if self.path is None:
            yield
            return
        with locked(self.path.with_name(f"{self.path.name}.lock"), f"generating into {self.path}"):
            yield

    def put(self, key: Key, answer: StoredAnswer) -> None:
        """Store an answer."""
        usage = answer.usage
        with self._transaction() as database:
            database.execute(
                "INSERT OR REPLACE INTO answers VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)",
                (
                    *key,
                    json.dumps(answer.queries, ensure_ascii=False),
                    answer.cause,
                    usage.prompt_tokens,
                    usage.completion_tokens,
                    usage.cost,
                    time.time(),
                ),
            )

    def name(self, generator: str, description: str, prompt: str) -> None:
        """Record which generator and prompt the hashes stand for."""
        with self._transaction() as database:
            database.execute("INSERT OR IGNORE INTO generators VALUES (?, ?)", (digest(generator), description))
            database.execute("INSERT OR IGNORE INTO prompts VALUES (?, ?)", (digest(prompt), prompt))

    def spend(self, tokens: int, nano: int, max_tokens: int | None = None, max_nano: int | None = None) -> bool:
        """Add to the spending, or subtract from it; False, and nothing is added, if a limit would be exceeded."""
        with self._transaction() as database:
            changed = database.execute(
                "UPDATE spending SET tokens = tokens + ?1, nano = nano + ?2 "
                "WHERE (?3 IS NULL OR tokens + ?1 <= ?3) AND (?4 IS NULL OR nano + ?2 <= ?4)",
                (tokens, nano, max_tokens, max_nano),
            )
            return changed.rowcount == 1

    def spent(self) -> tuple[int, float]:
        """(tokens, money) spent in this file, requests in flight at their highest possible cost."""
        with self._reading() as database:
            tokens, nano = database.execute("SELECT tokens, nano FROM spending").fetchone()
        return tokens, nano / NANO

    def __len__(self) -> int:
        with self._reading() as database:
            return int(database.execute("SELECT COUNT(*) FROM answers").fetchone()[0])

    def close(self) -> None:
        """Close the file."""
        with self._lock:
            self._closed = True
            if self._connection is not None:
                self._connection.close()

    def __enter__(self) -> QueryStore:
        return self.open()

    def __exit__(self, *exception: object) -> None:
        self.close()


def _columns(connection: sqlite3.Connection) -> dict[str, list[str]]:
    """The tables of a file with the names of their columns."""
    tables = [name for (name,) in connection.execute("SELECT name FROM sqlite_master WHERE type = 'table'")]
    return {
        name: [row[0] for row in connection.execute("SELECT name FROM pragma_table_info(?)", (name,))]
        for name in tables
        if not name.startswith("sqlite_")
    }


def _use_wal(connection: sqlite3.Connection) -> None:
    # Of two processes that open a new file at once, SQLite refuses the second without waiting.
    for attempt in range(50):
        try:
            connection.execute("PRAGMA journal_mode = WAL")
            return
        except sqlite3.OperationalError as error:
            if "locked" not in str(error) or attempt == 49:
                raise
            time.sleep(0.1)


def digest(text: str) -> str:
    """32 hexadecimal digits of a text's hash."""
    return hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=16).hexdigest()


LOOKED_UP_TOGETHER = 1000


class CachedSource(QuerySource):
    """A generating source with a store in front of it.

    Args:
        source: Generates answers that the store does not have.
        store: Stores each answer when it arrives.
    """

    def __init__(self, source: GeneratingSource, store: QueryStore) -> None:
        self.source = source
        self.store = store
        self.name = source.name
        self.weight = source.weight

    def generate(self, documents: Iterable[Document], *, language: str | None = None) -> Iterator[DocumentQueries]:
        """As :meth:`QuerySource.generate`; documents with equal texts are generated for once."""
        self.store.name(self.source.fingerprint(), self.source.describe(), self.source.prompt(language))
        unknown: dict[Key, list[Document]] = {}
        for document, key, stored in self._look_up(documents, language):
            if stored is None:
                unknown.setdefault(key, []).append(document)
            else:
                yield self._known(document, stored)
        if not unknown:
            return
        with self.store.generating():
            # The process that held the lock may have generated some.
            for key, stored in self.store.get(list(unknown)).items():
                yield from (self._known(document, stored) for document in unknown.pop(key))
            keys = {key.document: key for key in unknown}
            # The key replaces the id: documents with different ids may have the same text.
            wanted = (same[0]._replace(doc_id=key.document) for key, same in list(unknown.items()))
            for found in self.source.generate(wanted, language=language):
                key = keys[found.doc_id]
                texts = tuple(query.text for query in found.queries)
                if found.final:
                    self.store.put(key, StoredAnswer(texts, found.cause, found.usage))
                for number, document in enumerate(unknown.pop(key)):
                    usage = found.usage if number == 0 else Usage()
                    yield replace(found, doc_id=document.doc_id, queries=self._mark(texts), usage=usage)

    def _known(self, document: Document, stored: StoredAnswer) -> DocumentQueries:
        return DocumentQueries(document.doc_id, self._mark(stored.queries), stored.cause)

    def missing(self, documents: Iterable[Document], language: str | None) -> tuple[list[Document], int]:
        """(one document for each text without an answer in the store, the number of documents with one)."""
        missing: dict[Key, Document] = {}
        known = 0
        for document, key, stored in self._look_up(documents, language):
            known += stored is not None
            if stored is None:
                missing.setdefault(key, document)
        return list(missing.values()), known

    def failed(self, documents: Iterable[Document], language: str | None) -> list[Document]:
        """The documents for which, by the store, no usable query was written."""
        looked_up = self._look_up(documents, language)
        return [document for document, _, stored in looked_up if stored is not None and not stored.queries]

    def _look_up(
        self, documents: Iterable[Document], language: str | None
    ) -> Iterator[tuple[Document, Key, StoredAnswer | None]]:
        generator, prompt = self.source.fingerprint(), self.source.prompt(language)
        stream = iter(documents)
        while some := list(itertools.islice(stream, LOOKED_UP_TOGETHER)):
            keys = [Key.of(generator, prompt, document.text) for document in some]
            found = self.store.get(keys)
            yield from ((document, key, found.get(key)) for document, key in zip(some, keys, strict=True))
