"""What evaluators of several collections share in one call: the model's fingerprint, and one progress bar."""

from __future__ import annotations

from collections.abc import Iterable
from functools import cached_property

from sentence_transformers import SentenceTransformer
from tqdm.auto import tqdm

from st_clp.data import Corpus
from st_clp.encoding import model_fingerprint


class EvaluationCall:
    """One call of an evaluator; use it as a context.

    Args:
        model: The model that is evaluated; it must not change until the call is over.
        corpora: The corpus of each collection, in the order in which they are evaluated.
        show_progress_bar: Show one bar over the documents of all of them, with its rate and the time that remains.

    Attributes:
        bar: The bar.
    """

    def __init__(self, model: SentenceTransformer, corpora: Iterable[Corpus], *, show_progress_bar: bool) -> None:
        self.model = model
        # Where one size is not known before the corpus is read, there is a rate but no estimate.
        sizes = [corpus.expected_size() for corpus in corpora] if show_progress_bar else []
        total = None if None in sizes else sum(size for size in sizes if size)
        self.bar = tqdm(total=total, desc="Evaluating", unit=" documents", disable=not show_progress_bar)
        self._done = 0

    def __enter__(self) -> EvaluationCall:
        return self

    def __exit__(self, *exception: object) -> None:
        self.bar.close()

    @cached_property
    def fingerprint(self) -> str:
        """The model's, computed once: where all embeddings are there, this is most of the work."""
        return model_fingerprint(self.model)

    def begin(self, name: str) -> None:
        """Say which collection is being evaluated."""
        self.bar.set_description(f"Evaluating {name}")

    def finish(self, documents: int) -> None:
        """A collection of so many documents is done, however few of them had to be encoded."""
        self._done += documents
        if not self.bar.disable:
            self.bar.update(self._done - self.bar.n)
