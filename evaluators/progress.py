"""One progress bar for all the collections of an evaluation, with its rate and what remains."""

from __future__ import annotations

from collections.abc import Iterable

from tqdm.auto import tqdm

from st_clp.data import Corpus


class EvaluationProgress:
    """A bar over the documents of several corpora.

    Args:
        corpora: One for each collection, in the order in which they are evaluated.
        show: Whether it is shown.
    """

    def __init__(self, corpora: Iterable[Corpus], *, show: bool) -> None:
        # Where one size is not known before the corpus is read, there is a rate but no estimate.
        sizes = [corpus.expected_size() for corpus in corpora] if show else []
        total = None if None in sizes else sum(size for size in sizes if size)
        self.bar = tqdm(total=total, desc="Evaluating", unit=" documents", disable=not show)
        self._done = 0

    def __enter__(self) -> EvaluationProgress:
        return self

    def __exit__(self, *exception: object) -> None:
        self.bar.close()

    def begin(self, name: str) -> None:
        """Say which collection is being evaluated."""
        self.bar.set_description(f"Evaluating {name}")

    def finish(self, documents: int) -> None:
        """A collection of so many documents is done, however few of them had to be encoded."""
        self._done += documents
        if not self.bar.disable:
            self.bar.update(self._done - self.bar.n)
