"""A local model's queries on a Ray cluster: the same queries as in one process."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from typing import Any

import torch

from st_clp.data import Document
from st_clp.distributed import Workers, keep
from st_clp.options import ClusterOptions
from st_clp.queries.interface import DocumentQueries, GeneratingSource, SourceEstimate
from st_clp.queries.local import WINDOW, LocalQueries


class ClusterQueries(GeneratingSource):
    """Queries by a local model in every worker, which loads it by its folder or name.

    Documents are handed out in the same windows that one process would sort by length, so the queries are the same,
    except for near ties that another kind of processor may decide otherwise.

    Args:
        source: The model and how it writes.
        cluster: Where.
    """

    name = LocalQueries.name

    def __init__(self, source: LocalQueries, cluster: ClusterOptions) -> None:
        self._source = source
        self._cluster = ClusterOptions.of(cluster)
        self.weight = source.weight

    def prepare(self) -> None:
        """Look for the model here."""
        self._source.prepare()

    def fingerprint(self) -> str:
        """That of the model as it is opened here."""
        return self._source.fingerprint()

    def prompt(self, language: str | None) -> str:
        """The model's."""
        return self._source.prompt(language)

    def describe(self) -> str:
        """The model's name."""
        return self._source.describe()

    def estimate(self, documents: Iterable[Document], language: str | None) -> SourceEstimate:
        """Tokens, which do not depend on who reads them."""
        return self._source.estimate(documents, language)

    def generate(self, documents: Iterable[Document], *, language: str | None = None) -> Iterator[DocumentQueries]:
        """Yield answers as workers finish.

        Raises:
            RuntimeError: Five workers were lost at the same documents.
            ValueError: A worker cannot load the model; the message names its machine.
        """
        stream = iter(documents)
        first = list(itertools.islice(stream, WINDOW))
        if (more := next(stream, None)) is None:  # done before a worker has opened the model
            yield from self._source.generate(first, language=language)
            return
        what = self._source.unloaded(), language, self._cluster.cpus_per_worker
        with Workers(self._cluster, _Writer, *what) as workers:
            for _, answers in workers.run(_windows(first, itertools.chain([more], stream))):
                yield from answers


def _windows(first: list[Document], rest: Iterator[Document]) -> Iterator[tuple[int, Any]]:
    """(number, documents in the cluster's memory)."""
    for number in itertools.count():
        window = list(itertools.islice(rest, WINDOW)) if number else first
        if not window:
            return
        yield number, keep(window)


class _Writer:
    """Generates queries in a worker."""

    def __init__(self, source: LocalQueries, language: str | None, threads: int) -> None:
        if not torch.cuda.is_available():
            torch.set_num_threads(threads)
        self._source, self._language = source, language

    def __call__(self, number: int, documents: list[Document]) -> list[DocumentQueries]:
        return list(self._source.generate(documents, language=self._language))
