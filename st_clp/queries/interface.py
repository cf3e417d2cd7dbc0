"""The interface of sources of queries, and their answers."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

from st_clp.data import Document

JUDGMENTS = "judgments"


@dataclass(frozen=True)
class NegativeQuery:
    """A query that a document answers.

    Attributes:
        text: The query.
        source: Where it comes from: ``"judgments"``, ``"local"``, ``"openai"``, ``"title"``, ``"lead"`` …
        weight: Its weight in the loss's penalty, 0 or more; 1 counts in full.
    """

    text: str
    source: str = JUDGMENTS
    weight: float = 1.0


@dataclass(frozen=True)
class Usage:
    """The cost of an answer.

    Attributes:
        prompt_tokens: Tokens that were read.
        completion_tokens: Tokens that were written.
        cost: Money, in the currency of the prices; 0 where there are none.
        requests: Requests that were sent.
        uncounted_tokens: The most tokens that requests of unknown usage (no answer, or no count) may have taken.
    """

    prompt_tokens: int = 0
    completion_tokens: int = 0
    cost: float = 0.0
    requests: int = 0
    uncounted_tokens: int = 0

    @property
    def tokens(self) -> int:
        """Prompt and completion tokens."""
        return self.prompt_tokens + self.completion_tokens

    @property
    def tokens_at_most(self) -> int:
        """Prompt and completion tokens, with the uncounted ones."""
        return self.tokens + self.uncounted_tokens

    def __add__(self, other: Usage) -> Usage:
        return Usage(
            self.prompt_tokens + other.prompt_tokens,
            self.completion_tokens + other.completion_tokens,
            self.cost + other.cost,
            self.requests + other.requests,
            self.uncounted_tokens + other.uncounted_tokens,
        )


@dataclass(frozen=True)
class DocumentQueries:
    """A source's answer for one document.

    Attributes:
        doc_id: The document's id.
        queries: Queries that it answers, best first; empty where the source has none.
        cause: Why there are none; None if there are some, or if the source simply knows of none.
        usage: What the answer has cost in this call; nothing if it was known before.
        final: Whether the answer is kept: asking again would pay again for the same. Answers that are not final (the
            endpoint was down, the budget used up) are asked for again next time.
    """

    doc_id: str
    queries: tuple[NegativeQuery, ...] = ()
    cause: str | None = None
    usage: Usage = field(default_factory=Usage)
    final: bool = True


class QuerySource(ABC):
    """A source of queries that documents answer.

    Attributes:
        name: The name in :attr:`NegativeQuery.source`.
        weight: The weight of its queries.
        free: Whether asking costs next to nothing: such a source is asked about the rows' positives too, whose queries
            are none for the negatives.
    """

    name: str
    weight: float = 1.0
    free: bool = False

    @abstractmethod
    def generate(self, documents: Iterable[Document], *, language: str | None = None) -> Iterator[DocumentQueries]:
        """Yield one answer for each document, as they come and not always in the documents' order.

        Args:
            documents: Documents; they are taken from the stream when there is room to work on them.
            language: ISO 639 code of the documents, where it is known.
        """

    def _mark(self, texts: Iterable[str]) -> tuple[NegativeQuery, ...]:
        return tuple(NegativeQuery(text, self.name, self.weight) for text in dict.fromkeys(texts))


@dataclass(frozen=True)
class SourceEstimate:
    """The estimated cost of a source's answers for some documents.

    Attributes:
        documents: How many documents.
        prompt_tokens: Tokens to read, about.
        completion_tokens: Tokens to write, about.
        cost: Money, about; None where there are no prices.
        most: The highest possible cost in tokens and money; None if nothing is billed.
    """

    documents: int
    prompt_tokens: int
    completion_tokens: int
    cost: float | None = None
    most: Usage | None = None


class GeneratingSource(QuerySource):
    """A source whose answers take time or money, so that they are kept (:class:`..store.QueryStore`)."""

    def prepare(self) -> None:
        """Check early that the source can work, for example that its model exists."""

    @abstractmethod
    def fingerprint(self) -> str:
        """A text that changes with everything that the answers depend on besides prompt and document."""

    @abstractmethod
    def prompt(self, language: str | None) -> str:
        """The prompt's template for documents of a language; empty where there is no prompt."""

    @abstractmethod
    def describe(self) -> str:
        """A readable name of the generator, for inspecting the store; never used as a key."""

    @abstractmethod
    def estimate(self, documents: Iterable[Document], language: str | None) -> SourceEstimate:
        """Estimate the cost of answers for these documents. Nothing is sent or generated."""
