"""A chain of sources: the first that knows a query wins."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from tqdm.auto import tqdm

from st_clp.data import Document
from st_clp.queries.interface import (
    JUDGMENTS,
    DocumentQueries,
    GeneratingSource,
    NegativeQuery,
    QuerySource,
    SourceEstimate,
    Usage,
)
from st_clp.queries.judgments import JudgedQueries
from st_clp.queries.query_store import CachedSource, QueryStore
from st_clp.queries.roundtrip import RoundTrip

BARRED = "only the row's own query, or one that its positive answers"
UNCOUNTED = "tokens at most for requests without an answer or a count, which may be billed"


class Need(NamedTuple):
    """A negative of one row that needs a query."""

    query_id: str
    positive_id: str
    negative_id: str


@dataclass
class QueriesAccount:
    """Where the queries of negatives came from, and why some negatives have none.

    Attributes:
        asked: Documents that each source was asked about.
        without: Documents for which a generating source found no query, ``"source: cause"`` to count.
        barred: Negatives whose queries from a source could not be used in their row.
        round_trip: Queries that were checked, that found their document, that were dropped or down-weighted.
        usage: What this call has cost.
    """

    asked: dict[str, int] = field(default_factory=dict)
    without: Counter[str] = field(default_factory=Counter)
    barred: int = 0
    round_trip: Counter[str] = field(default_factory=Counter)
    usage: Usage = field(default_factory=Usage)


class QueryChain:
    """Several sources, asked in order.

    Args:
        sources: Sources; ``"judgments"`` stands for the judgments of the collection that is mined.
        store: Keeps what is generated.
        show_progress_bar: Show progress, and what was spent.

    Raises:
        ValueError: There is no source, or one is named twice.
    """

    def __init__(
        self, sources: Sequence[QuerySource | str], *, store: QueryStore | None = None, show_progress_bar: bool = True
    ) -> None:
        for source in sources:
            if isinstance(source, str) and source != JUDGMENTS:
                raise ValueError(f"{source!r} is no source of queries; a chain takes sources, and {JUDGMENTS!r}")
        if not sources:
            raise ValueError("a chain needs at least one source of queries")
        if list(sources).count(JUDGMENTS) > 1:
            raise ValueError(f"{JUDGMENTS!r} stands twice in the chain")
        self.store = QueryStore() if store is None else store
        self.show_progress_bar = show_progress_bar
        self.sources: list[QuerySource | str] = [
            CachedSource(source, self.store) if isinstance(source, GeneratingSource) else source for source in sources
        ]

    @property
    def has_judgments(self) -> bool:
        """Whether the judgments are one of the sources."""
        return JUDGMENTS in self.sources

    def close(self) -> None:
        """Close the store."""
        self.store.close()

    def __enter__(self) -> QueryChain:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    @property
    def generates(self) -> bool:
        """Whether there is any other source than the judgments."""
        return self.sources != [JUDGMENTS]

    def assign(
        self,
        needs: Iterable[Need],
        judged: JudgedQueries,
        documents: Mapping[str, Document],
        *,
        number: int = 1,
        language: str | None = None,
        round_trip: RoundTrip | None = None,
    ) -> tuple[dict[Need, tuple[NegativeQuery, ...]], QueriesAccount]:
        """Find up to ``number`` queries for every negative of every row.

        None is the row's own query, or one that the row's positive is known to answer.

        Args:
            needs: The rows' negatives.
            judged: What the judgments know.
            documents: The negatives and the rows' positives, by id.
            number: Queries for each negative at most.
            language: ISO 639 code of the documents, where it is known.
            round_trip: Checks what does not come from the judgments; None takes it as it is.

        Returns:
            The queries; negatives without any are absent. And the account.
        """
        found: dict[Need, tuple[NegativeQuery, ...]] = {}
        account = QueriesAccount()
        open_needs = list(dict.fromkeys(needs)) if number else []
        for source in self.sources:
            if source == JUDGMENTS:
                account.asked[JUDGMENTS] = len({need.negative_id for need in open_needs})
                chosen = {need: judged.find_marked(**need._asdict(), number=number) for need in open_needs}
            else:
                assert isinstance(source, QuerySource)
                wanted = dict.fromkeys(need.negative_id for need in open_needs)
                answers = self._answers(source, [documents[doc_id] for doc_id in wanted], language, account, round_trip)
                near = _of_positives(source, open_needs, documents, language)
                chosen = {
                    need: judged.choose(
                        answers[need.negative_id].queries,
                        **need._asdict(),
                        number=number,
                        near=near.get(need.positive_id, ()),
                    )
                    for need in open_needs
                }
                account.barred += sum(
                    bool(answers[need.negative_id].queries) and not queries for need, queries in chosen.items()
                )
            found.update({need: queries for need, queries in chosen.items() if queries})
            open_needs = [need for need in open_needs if need not in found]
        return found, account

    def generate(
        self, documents: Sequence[Document], judged: JudgedQueries | None = None, *, language: str | None = None
    ) -> tuple[dict[str, DocumentQueries], QueriesAccount]:
        """Find queries for documents ahead of time, for whichever rows they will be in.

        Documents with a query in the judgments are not given to later sources, although some row may be unable to use
        that query.

        Returns:
            Document id to its queries; documents without any are absent. And the account.
        """
        found: dict[str, DocumentQueries] = {}
        account = QueriesAccount()
        for source in self.sources:
            if source == JUDGMENTS and judged is None:
                continue
            left = [document for document in documents if document.doc_id not in found]
            actual = judged if source == JUDGMENTS else source
            assert isinstance(actual, QuerySource)
            answers = self._answers(actual, left, language, account, None)
            found.update({doc_id: answer for doc_id, answer in answers.items() if answer.queries})
        return found, account

    def _answers(
        self,
        source: QuerySource,
        documents: Sequence[Document],
        language: str | None,
        account: QueriesAccount,
        round_trip: RoundTrip | None,
    ) -> dict[str, DocumentQueries]:
        """Ask a source; its answers, checked and counted, by document id."""
        answers = list(self._progress(source, documents, language, account))
        if round_trip is not None:
            answers, counts = round_trip.check(answers)
            account.round_trip += counts
        account.asked[source.name] = len(documents)
        account.without += Counter(f"{source.name}: {answer.cause}" for answer in answers if answer.cause)
        return {answer.doc_id: answer for answer in answers}

    def _progress(
        self, source: QuerySource, documents: Sequence[Document], language: str | None, account: QueriesAccount
    ) -> Iterator[DocumentQueries]:
        number = len(documents)
        bar = tqdm(
            total=number,
            desc=f"Queries by {source.name}",
            # No bar and no rate: what is spent must fit into 80 columns.
            bar_format="{desc}: {percentage:3.0f}% {n_fmt}/{total_fmt} [{elapsed}<{remaining}{postfix}]",
            disable=not (self.show_progress_bar and isinstance(source, CachedSource)),
        )
        paid = 0
        spent = Usage()
        try:
            with bar:
                for answer in source.generate(documents, language=language):
                    paid += bool(answer.usage.tokens_at_most)
                    spent += answer.usage
                    bar.update()
                    if spent.tokens_at_most:
                        # What is left may be known already, so this is what it comes to at most, as things go.
                        rest = (number - bar.n) / paid if paid else 0.0
                        bar.set_postfix_str(_spent(spent, rest), refresh=False)
                    yield answer
        finally:
            account.usage += spent


def _of_positives(
    source: QuerySource, needs: Sequence[Need], documents: Mapping[str, Document], language: str | None
) -> dict[str, tuple[NegativeQuery, ...]]:
    """A free source's answers for the rows' positives: a title that both share is not a query of the negative alone."""
    if not source.free:
        return {}
    positives = dict.fromkeys(need.positive_id for need in needs)
    asked = [documents[doc_id] for doc_id in positives if doc_id in documents]
    return {answer.doc_id: answer.queries for answer in source.generate(asked, language=language)}


def _spent(spent: Usage, more: float) -> str:
    if spent.cost:
        digits = 4 if spent.cost < 1 else 2
        return f"spent {spent.cost:.{digits}f} of about {spent.cost * (1 + more):.{digits}f}"
    tokens = spent.tokens_at_most
    return f"{tokens:,} tokens of about {tokens * (1 + more):,.0f}"


@dataclass(frozen=True)
class SourceCost:
    """The work of one source.

    Attributes:
        name: The source, with its model.
        documents: Documents that it would be asked about: those for which earlier sources are known to have none.
        known: How many of them have a query already, free or in the store.
        failed: How many of them it has failed to write a query for, by the store.
        estimate: The cost of the others; None if there is none.
    """

    name: str
    documents: int
    known: int
    failed: int = 0
    estimate: SourceEstimate | None = None

    def __str__(self) -> str:
        text = f"{self.name}: asked for {self.documents:,} documents, {self.known:,} of them known"
        if self.failed:
            text += f", {self.failed:,} tried before without a good query"
        if self.estimate is None:
            return text
        found = self.estimate
        text += f", {found.documents:,} texts to generate for"
        if not found.documents:
            return text
        text += f": about {found.prompt_tokens:,} tokens to read and {found.completion_tokens:,} to write"
        if found.cost is not None:
            text += f", about {found.cost:.4f}"
        if found.most is not None:
            most = f"{found.most.tokens:,} tokens" + (f", {found.most.cost:.4f}" if found.cost is not None else "")
            text += f" (at the very most {most})"
        return text


def estimate_cost(
    chain: QueryChain,
    documents: Sequence[Document],
    judged: JudgedQueries | None = None,
    *,
    language: str | None = None,
) -> list[SourceCost]:
    """Estimate the work of each source for these documents. Nothing is generated, sent or written.

    It is not known in advance for which documents a generating source will fail: the next source is counted as if it
    failed only for those that the store records.
    """
    found: list[SourceCost] = []
    left = list(documents)
    for source in chain.sources:
        if source == JUDGMENTS and judged is None:
            continue
        if isinstance(source, CachedSource):
            asked = len(left)
            name = f"{source.name} ({source.source.describe()})"
            missing, known = source.missing(left, language)
            estimate = source.source.estimate(missing, language)
            left = source.failed(left, language)
            found.append(SourceCost(name, asked, known - len(left), len(left), estimate))
            continue
        actual = judged if source == JUDGMENTS else source
        assert isinstance(actual, QuerySource)
        with_query = {answer.doc_id for answer in actual.generate(left, language=language) if answer.queries}
        found.append(SourceCost(actual.name, len(left), len(with_query)))
        left = [document for document in left if document.doc_id not in with_query]
    return found
