"""A collection of random words to work on, and what a store holds."""

from __future__ import annotations

import os
import random
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from sentence_transformers import SentenceTransformer

from st_clp.data import Collection, Document, MemoryCorpus

WORDS = "river lake mountain city king queen book song red blue green water fire stone gold one two three".split()
NUMBER = 2500  # documents: five windows


def collection_of_words(number: int = NUMBER, queries: int = 20) -> Collection:
    """Documents, and queries that each have one of them as their answer."""
    generator = random.Random(0)
    documents = {f"d{n}": " ".join(generator.choices(WORDS, k=generator.randrange(1, 12))) for n in range(number)}
    asked = {f"q{n}": " ".join(generator.choices(WORDS, k=3)) for n in range(queries)}
    judgments = {query_id: {f"d{generator.randrange(number)}": 1} for query_id in asked}
    return Collection.from_dict(documents, asked, judgments, name="words")


class SlowCorpus(MemoryCorpus):
    """Takes a while to read, so that there is something to kill.

    Args:
        name, documents: As in :class:`MemoryCorpus`.
        pause: Seconds before each 64 documents.
    """

    def __init__(self, name: str, documents: dict[str, str], *, pause: float) -> None:
        super().__init__(name, documents)
        self._pause = pause

    def __iter__(self) -> Iterator[Document]:
        for place, document in enumerate(super().__iter__()):
            if place % 64 == 0:
                time.sleep(self._pause)
            yield document


class CountTexts:
    """A hook that notes in a file how many texts each forward pass has, in whatever process it is.

    Args:
        file: The file.
        killed_at: The first process that passes so many in all is killed; None kills nobody.
    """

    def __init__(self, file: Path, killed_at: int | None = None) -> None:
        self._file, self._killed_at = file, killed_at

    def __call__(self, module: Any, arguments: Any, output: Any) -> None:
        with open(self._file, "ab", buffering=0) as file:
            file.write(f"{len(arguments[0]['input_ids'])}\n".encode())
        killed = self._file.with_suffix(".killed")
        if self._killed_at is not None and counted(self._file) > self._killed_at and not killed.exists():
            killed.touch()
            os.kill(os.getpid(), signal.SIGKILL)


def count_texts(model: SentenceTransformer, file: Path, killed_at: int | None = None) -> None:
    """Have what the model encodes counted, also where a copy of it does; :func:`counted` is how many texts it was."""
    model[0].register_forward_hook(CountTexts(file, killed_at))


def counted(file: Path) -> int:
    return sum(map(int, file.read_text().split()))


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}
