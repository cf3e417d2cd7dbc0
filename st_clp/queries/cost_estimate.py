"""What a chain of sources would have to do for some documents, before it does."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from st_clp.data import Document
from st_clp.queries.cached_source import CachedSource
from st_clp.queries.chain import QueryChain
from st_clp.queries.interface import JUDGMENTS, QuerySource, SourceEstimate
from st_clp.queries.judgments import JudgedQueries


@dataclass(frozen=True)
class SourceCost:
    """What one source would have to do.

    Attributes:
        name: The source, with its model.
        documents: Documents that it would be asked for: those that the sources before it are known to have none for.
        known: How many of them it has a query for already, free or in the store.
        failed: How many of them the store says it could not write a query for.
        estimate: What the others would cost; None where nothing costs.
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
    """What each source would have to do for these documents. Nothing is generated, sent or written.

    Which documents a source that generates will leave for the next is not known before: the next is counted as if it
    left none but those that the store says it failed for.
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
