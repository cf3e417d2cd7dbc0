"""What a case of bad input is, and what the cases build their input from."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from endpoint import Endpoint
from materials import small_collection, tiny_model
from processes import command, run_forked

DEEP = "[" * 100_000 + "]" * 100_000
DOCUMENTS = {f"d{i}": f"document {i} : the red river of the north and lake {i}" for i in range(6)}
QUERIES = {"q0": "where is the red river", "q1": "what lake is in the north", "q2": "which river is new"}
SHORT = ("--num-negatives", "1", "--range-max", "5")


class Materials:
    """What the cases spoil copies of: good input, made once, by the commands themselves, when it is first asked for.

    Args:
        folder: For everything.
        endpoint: What writes queries.
    """

    def __init__(self, folder: Path, endpoint: Endpoint) -> None:
        self.folder, self.endpoint = folder, endpoint

    @cached_property
    def model(self) -> Path:
        return tiny_model(self.folder / "tiny")

    @cached_property
    def collection(self) -> Path:
        return small_collection(self.folder / "small")

    @cached_property
    def evaluation(self) -> Path:
        return self._made("evaluation", "evaluate", str(self.model))

    @cached_property
    def other_evaluation(self) -> Path:
        """By another model, of the same collection."""
        return self._made("other_evaluation", "evaluate", str(tiny_model(self.folder / "other", seed=1)))

    @cached_property
    def mined(self) -> Path:
        return self._made("mined", "mine", "--model", str(self.model), *SHORT)

    @cached_property
    def run(self) -> Path:
        return self._made("run", "run", "--model", str(self.model), *SHORT, "--epochs", "0.5", "--no-bf16")

    @cached_property
    def queries(self) -> Path:
        """A store of queries."""
        asked = ("--negative-queries", "openai:tiny", "--query-base-url", self.endpoint.url)
        return self._made("queries.sqlite", "queries", *asked, output="--query-store")

    def _made(self, name: str, *argv: str, output: str = "--output") -> Path:
        made = self.folder / name
        argv = (*argv, "--collection", str(self.collection), output, str(made))
        ending = run_forked(command(argv), self.folder / "log")
        if ending.code:
            raise RuntimeError(f"good input ends with {ending.code}: {argv}\n{ending.output}")
        return made


@dataclass(frozen=True)
class Place:
    """A case's own folder, and the materials."""

    folder: Path
    materials: Materials

    @property
    def out(self) -> Path:
        """What to give as ``--output``."""
        return self.folder / "out"

    def copy(self, name: str) -> Path:
        """A copy of one of the materials, to be spoilt."""
        return Path(shutil.copytree(getattr(self.materials, name), self.folder / name))

    def write(self, name: str, content: str | bytes) -> Path:
        """A file."""
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode("utf-8", "surrogatepass"))
        return path

    def beir(
        self,
        *,
        name: str = "data",
        corpus: Iterable[str | bytes] | None = None,
        queries: Iterable[str] | None = None,
        qrels: Iterable[str] | None = None,
        header: bool = True,
    ) -> Path:
        """A BEIR folder with these lines in place of good ones; train and dev have the same judgments."""
        judged = [f"{query}\td{number}\t1" for number, query in enumerate(QUERIES)] if qrels is None else list(qrels)
        judged = ["query-id\tcorpus-id\tscore", *judged] if header else judged
        asked = [json.dumps({"_id": i, "text": text}) for i, text in QUERIES.items()] if queries is None else queries
        lines = {
            "corpus.jsonl": documents() if corpus is None else corpus,
            "queries.jsonl": asked,
            "qrels/train.tsv": judged,
            "qrels/dev.tsv": judged,
        }
        for file, content in lines.items():
            raw = [line if isinstance(line, bytes) else line.encode() for line in content]
            self.write(f"{name}/{file}", b"".join(line + b"\n" for line in raw))
        return self.folder / name

    def evaluate(self, collection: Path | str | None = None, *more: str, model: Path | None = None) -> list[str]:
        """``st-clp evaluate``, on a good collection where none is given."""
        given = ("--collection", str(collection or self.beir()), "--output", str(self.out))
        return ["evaluate", str(model or self.materials.model), *given, *more]

    def mine(self, collection: Path | str | None = None, *more: str, output: Path | None = None) -> list[str]:
        """``st-clp mine``."""
        return self._work("mine", collection, *more, output=output)

    def run(self, *more: str, collection: Path | None = None, output: Path | None = None) -> list[str]:
        """``st-clp run``, a short one."""
        return self._work("run", collection, "--epochs", "0.2", "--no-bf16", *more, output=output)

    def _work(self, name: str, collection: Path | str | None, *more: str, output: Path | None) -> list[str]:
        given = ("--model", str(self.materials.model), "--collection", str(collection or self.materials.collection))
        return [name, *given, "--output", str(output or self.out), *SHORT, *more]

    def queries(self, *more: str, store: Path | None = None) -> list[str]:
        """``st-clp queries`` for a good collection."""
        given = ("--collection", str(self.beir()), "--query-store", str(store or self.out / "q.sqlite"))
        return ["queries", *given, "--query-concurrency", "2", *more]


@dataclass(frozen=True)
class Case:
    """Bad input, or odd input that is good.

    Attributes:
        name: What is wrong.
        build: Makes the input in its place, and says what to run: arguments of st-clp, or a function.
        message: A regular expression that what is printed must match, spaces and line breaks made one.
        code: The exit status.
        never: What must not be printed.
        leaves: Whether the output folder may be there after an error: what was finished before is kept.
        environment: Variables of the process.
        encoding: Of the terminal.
        setup: Called in the process before anything, to set limits or another user.
    """

    name: str
    build: Callable[[Place], Sequence[str] | Callable[[], Any]]
    message: str
    code: int = 1
    never: tuple[str, ...] = ()
    leaves: bool = False
    environment: dict[str, str] = field(default_factory=dict)
    encoding: str = "utf-8"
    setup: Callable[[], None] | None = None


def documents(**changed: Any) -> list[Any]:
    """The lines of a corpus; ``d1=...`` replaces the line of a document."""
    lines = {i: json.dumps({"_id": i, "title": "", "text": text}) for i, text in DOCUMENTS.items()}
    return [*{**lines, **changed}.values()]


def edit_json(path: Path, **changed: Any) -> None:
    """Change fields of a JSON object in a file."""
    path.write_text(json.dumps({**json.loads(path.read_text()), **changed}))


def one(folder: Path, pattern: str) -> Path:
    """The only file of a pattern in a folder."""
    (found,) = folder.glob(pattern)
    return found


def cut(path: Path, size: int) -> None:
    """Leave the first ``size`` bytes of a file."""
    os.truncate(path, size)


def as_nobody() -> None:
    """Be a user who may write nothing of ours: root may write everywhere."""
    os.setgid(65534)
    os.setuid(65534)


def with_small_files() -> None:
    """Let no file grow beyond 20,000 bytes, as on a full disk."""
    import resource
    import signal

    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
