"""Everything that was generated, in one SQLite file: nothing is paid for twice.

An answer is kept under its generator, its prompt and the document's text. Before a document is worked on it is claimed,
so that two processes that share the file do not both pay for it; the claims of a process that died lapse at once where
this can be seen, and within seconds where it cannot. The file also holds what was spent, so that a budget covers all
who share it and outlives a process that is killed. It is in SQLite's WAL mode: processes of one machine may share it,
not machines over a network file system.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import logging
import os
import sqlite3
import threading
import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

from st_clp.data import Document
from st_clp.queries.interface import DocumentQueries, GeneratingSource, QuerySource, Usage

logger = logging.getLogger(__name__)

LEASE_SECONDS = 10.0  # without a sign of life for so long, a process's claims lapse
FORMAT = 1
NANO = 10**9  # money is counted in whole billionths, so that sums are exact

TABLES = """
CREATE TABLE IF NOT EXISTS answers (
  generator TEXT NOT NULL, prompt TEXT NOT NULL, document TEXT NOT NULL, queries TEXT NOT NULL, cause TEXT,
  prompt_tokens INTEGER NOT NULL, completion_tokens INTEGER NOT NULL, cost REAL NOT NULL, made REAL NOT NULL,
  PRIMARY KEY (generator, prompt, document)) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS generators (generator TEXT PRIMARY KEY, description TEXT NOT NULL) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS prompts (prompt TEXT PRIMARY KEY, template TEXT NOT NULL) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS claims (
  generator TEXT NOT NULL, prompt TEXT NOT NULL, document TEXT NOT NULL, owner TEXT NOT NULL,
  PRIMARY KEY (generator, prompt, document)) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS owners (
  owner TEXT PRIMARY KEY, machine TEXT NOT NULL, pid INTEGER NOT NULL, alive_until REAL NOT NULL) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS spending (
  id INTEGER PRIMARY KEY CHECK (id = 1), tokens INTEGER NOT NULL, nano INTEGER NOT NULL);
INSERT OR IGNORE INTO spending VALUES (1, 0, 0);
"""


class Key(NamedTuple):
    """What an answer is kept under: hashes of the generator, the prompt and the document's text."""

    generator: str
    prompt: str
    document: str

    @classmethod
    def of(cls, generator: str, prompt: str, text: str) -> Key:
        """The key of a document's text."""
        return cls(digest(generator), digest(prompt), digest(text))


@dataclass(frozen=True)
class StoredAnswer:
    """An answer as it is kept; ``usage`` is what it cost when it was made."""

    queries: tuple[str, ...]
    cause: str | None
    usage: Usage


class QueryStore:
    """Answers of generators in a SQLite file, or in memory alone.

    Args:
        path: The file; made when something is first looked up or kept, or by :meth:`open`. None keeps everything in
            memory.

    Every method raises:
        ValueError: The file is no store of queries, is damaged, or of a later format.
        OSError: The file cannot be opened, made, read or written.
    """

    def __init__(self, path: str | os.PathLike[str] | None = None) -> None:
        self.path = None if path is None else Path(path)
        self.owner = uuid.uuid4().hex
        self._machine = _machine()
        self._lock = threading.RLock()
        self._closed = threading.Event()
        self._heart: threading.Thread | None = None
        self._connection: sqlite3.Connection | None = None

    def open(self) -> QueryStore:
        """Open the file now."""
        with self._reading():
            return self

    @contextmanager
    def _reading(self) -> Iterator[sqlite3.Connection]:
        """The open file, for this thread alone; what SQLite objects to, said so that a user can do something."""
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
            # A killed process loses nothing; the last answers before a power cut may be lost.
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
        if found and found != expected:
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
        """The answers that are there; keys without one are absent."""
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

    def claim(self, key: Key) -> bool:
        """Take a document to work on; False where it was answered meanwhile or a living process works on it."""
        self._live()
        with self._transaction() as database:
            where = "WHERE generator = ? AND prompt = ? AND document = ?"
            if database.execute(f"SELECT 1 FROM answers {where}", key).fetchone():
                return False
            self._bury(database)
            changed = database.execute(
                "INSERT INTO claims VALUES (?, ?, ?, ?) ON CONFLICT DO UPDATE SET owner = excluded.owner "
                "WHERE owner = excluded.owner OR owner NOT IN (SELECT owner FROM owners WHERE alive_until > ?)",
                (*key, self.owner, time.time()),
            )
            return changed.rowcount == 1

    def _bury(self, database: sqlite3.Connection) -> None:
        """Strike off owners of this machine whose process is no more."""
        if not self._machine:
            return
        for owner, pid in database.execute(
            "SELECT owner, pid FROM owners WHERE machine = ? AND pid != ?", (self._machine, os.getpid())
        ).fetchall():
            try:
                os.kill(pid, 0)
            except ProcessLookupError:
                database.execute("DELETE FROM owners WHERE owner = ?", (owner,))
            except OSError:
                continue

    def put(self, key: Key, answer: StoredAnswer) -> None:
        """Keep an answer and let go of its document."""
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
            self._release(database, [key])

    def release(self, keys: Sequence[Key]) -> None:
        """Let go of documents that were claimed and not answered."""
        with self._transaction() as database:
            self._release(database, keys)

    def _release(self, database: sqlite3.Connection, keys: Sequence[Key]) -> None:
        database.executemany(
            "DELETE FROM claims WHERE generator = ? AND prompt = ? AND document = ? AND owner = ?",
            [(*key, self.owner) for key in keys],
        )

    def name(self, generator: str, description: str, prompt: str) -> None:
        """Write down which generator and prompt the hashes stand for."""
        with self._transaction() as database:
            database.execute("INSERT OR IGNORE INTO generators VALUES (?, ?)", (digest(generator), description))
            database.execute("INSERT OR IGNORE INTO prompts VALUES (?, ?)", (digest(prompt), prompt))

    def spend(self, tokens: int, nano: int, max_tokens: int | None = None, max_nano: int | None = None) -> bool:
        """Add to what was spent, or take from it; False, and nothing is added, where a limit would be passed."""
        with self._transaction() as database:
            changed = database.execute(
                "UPDATE spending SET tokens = tokens + ?1, nano = nano + ?2 "
                "WHERE (?3 IS NULL OR tokens + ?1 <= ?3) AND (?4 IS NULL OR nano + ?2 <= ?4)",
                (tokens, nano, max_tokens, max_nano),
            )
            return changed.rowcount == 1

    def spent(self) -> tuple[int, float]:
        """(tokens, money) that all answers of this file have cost, with what is in flight at its worst."""
        with self._reading() as database:
            tokens, nano = database.execute("SELECT tokens, nano FROM spending").fetchone()
        return tokens, nano / NANO

    def __len__(self) -> int:
        with self._reading() as database:
            return int(database.execute("SELECT COUNT(*) FROM answers").fetchone()[0])

    def _live(self) -> None:
        """Say that this process is alive, now and from now on."""
        if self._heart is None:
            self._beat()
            self._heart = threading.Thread(target=self._beat_on, name="st_clp-query-store", daemon=True)
            self._heart.start()

    def _beat(self) -> None:
        now = time.time()
        with self._transaction() as database:
            database.execute(
                "INSERT OR REPLACE INTO owners VALUES (?, ?, ?, ?)",
                (self.owner, self._machine, os.getpid(), now + LEASE_SECONDS),
            )
            database.execute("DELETE FROM owners WHERE alive_until < ?", (now - 100 * LEASE_SECONDS,))

    def _beat_on(self) -> None:
        while not self._closed.wait(LEASE_SECONDS / 5):
            with self._lock:
                if not self._closed.is_set():
                    self._try(self._beat, "claims lapse until it can be written again")

    def close(self) -> None:
        """Let go of everything, of what killed processes have left too, and close the file."""
        with self._lock:
            if self._closed.is_set():
                return
            self._closed.set()
            if self._connection is not None:
                # What is asked for may be over for another reason, which this must not hide.
                self._try(self._let_go, "claims lapse by themselves")
                self._connection.close()

    def _let_go(self) -> None:
        with self._transaction() as database:
            database.execute("DELETE FROM owners WHERE owner = ?", (self.owner,))
            self._bury(database)
            database.execute("DELETE FROM claims WHERE owner NOT IN (SELECT owner FROM owners)")

    def _try(self, work: Callable[[], None], otherwise: str) -> None:
        try:
            work()
        except (OSError, ValueError) as error:
            logger.warning("%s; %s", error, otherwise)

    def __enter__(self) -> QueryStore:
        return self.open()

    def __exit__(self, *exception: object) -> None:
        self.close()


def _columns(connection: sqlite3.Connection) -> dict[str, list[str]]:
    """The tables of a file, each with the names of its columns."""
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


def _machine() -> str:
    """What the processes share whose numbers can be looked up; empty where that is not known."""
    try:
        # Containers may have one machine's name and kernel, and numbers of their own.
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return ""


def digest(text: str) -> str:
    """32 hexadecimal digits of a text's hash."""
    return hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=16).hexdigest()


LOOKED_UP_TOGETHER = 1000
LOOK_AGAIN_SECONDS = 0.2


class CachedSource(QuerySource):
    """A generating source that asks the store first.

    Args:
        source: Generates what the store does not have.
        store: Keeps each answer as it comes.
    """

    def __init__(self, source: GeneratingSource, store: QueryStore) -> None:
        self.source = source
        self.store = store
        self.name = source.name
        self.weight = source.weight

    def generate(self, documents: Iterable[Document], *, language: str | None = None) -> Iterator[DocumentQueries]:
        """As :meth:`QuerySource.generate`; documents with one text are generated for once."""
        generator, prompt = self.source.fingerprint(), self.source.prompt(language)
        self.store.name(generator, self.source.describe(), prompt)
        same: dict[Key, list[Document]] = {}  # what is generated for, and who else has that text
        mine: set[Key] = set()
        elsewhere: dict[Key, None] = {}

        def answer(key: Key, stored: StoredAnswer) -> Iterator[DocumentQueries]:
            for document in same.pop(key):
                yield DocumentQueries(document.doc_id, self._mark(stored.queries), stored.cause)

        def claimed(keys: Iterable[Key]) -> Iterator[Document]:
            """The documents to generate for; each is claimed when the source has room for it."""
            for key in keys:
                if self.store.claim(key):
                    mine.add(key)
                    # Its key in place of its id: ids of several documents stand for one text.
                    yield same[key][0]._replace(doc_id=key.document)
                else:
                    elsewhere[key] = None

        def generated(keys: list[Key]) -> Iterator[DocumentQueries]:
            by_hash = {key.document: key for key in keys}
            for found in self.source.generate(claimed(keys), language=language):
                key = by_hash[found.doc_id]
                texts = tuple(query.text for query in found.queries)
                if found.final:
                    self.store.put(key, StoredAnswer(texts, found.cause, found.usage))
                else:
                    self.store.release([key])
                mine.discard(key)
                for number, document in enumerate(same.pop(key)):
                    usage = found.usage if number == 0 else type(found.usage)()
                    yield replace(found, doc_id=document.doc_id, queries=self._mark(texts), usage=usage)

        try:
            stream = iter(documents)
            unknown: list[Key] = []
            while some := list(itertools.islice(stream, LOOKED_UP_TOGETHER)):
                fresh = []
                for document in some:
                    key = Key.of(generator, prompt, document.text)
                    if key not in same:
                        fresh.append(key)
                    same.setdefault(key, []).append(document)
                known = self.store.get(fresh)
                unknown += [key for key in fresh if key not in known]
                for key, stored in known.items():
                    yield from answer(key, stored)
            while unknown:
                yield from generated(unknown)
                unknown = []
                # What other processes work on is waited for; where one died, its documents are taken over.
                while elsewhere and not unknown:
                    for key, stored in self.store.get(list(elsewhere)).items():
                        del elsewhere[key]
                        yield from answer(key, stored)
                    unknown = [key for key in elsewhere if self.store.claim(key)]
                    for key in unknown:
                        del elsewhere[key]
                        mine.add(key)
                    if elsewhere and not unknown:
                        time.sleep(LOOK_AGAIN_SECONDS)
        finally:
            self.store.release(list(mine))

    def missing(self, documents: Iterable[Document], language: str | None) -> tuple[list[Document], int]:
        """(one document for each text that the store has no answer for, how many documents it has an answer for)."""
        missing: dict[Key, Document] = {}
        known = 0
        for document, key, stored in self._look_up(documents, language):
            known += stored is not None
            if stored is None:
                missing.setdefault(key, document)
        return list(missing.values()), known

    def failed(self, documents: Iterable[Document], language: str | None) -> list[Document]:
        """The documents of which the store says that no good query was written."""
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
