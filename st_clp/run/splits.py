"""The splits of its collections that a run trains and evaluates on, and their queries made of sentences."""

from __future__ import annotations

import dataclasses
import itertools
import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from st_clp.data import Collection, CollectionError
from st_clp.losses.document_batches import QUERIES_PER_DOCUMENT
from st_clp.mining.rows import TrainingRow
from st_clp.queries import add_sentence_queries
from st_clp.queries.own_text import is_made
from st_clp.settings import RunSettings, SettingsError

logger = logging.getLogger(__name__)

SENTENCES, MOST_SENTENCES = 8, 40_000  # queries made of sentences: a document, and a collection
EVAL_SPLITS = ("dev", "validation", "valid", "val", "test")


@dataclass
class Collections:
    """The collections that a run trains and evaluates on."""

    train: list[Collection]
    evaluate: list[Collection]

    def describe(self) -> dict[str, Any]:
        """Names and counts, for the report."""
        return {
            kind: {
                collection.name: {
                    "corpus": collection.corpus_name,
                    "language": collection.language,
                    "queries": len(collection.queries),
                    "made_of_sentences": sum(map(is_made, collection.queries)),
                    "judgments": sum(map(len, collection.judgments.values())),
                    "left_out": collection.left_out,
                }
                for collection in collections
            }
            for kind, collections in (("train", self.train), ("evaluate", self.evaluate))
        }


def load_collections(settings: RunSettings, *, unasked: bool | None = None) -> Collections:
    """Find and load the splits to train and evaluate on.

    Args:
        settings: The run's.
        unasked: Whether queries are made of sentences if the settings give no number of them; None decides by
            :func:`makes_unasked`.

    Raises:
        CollectionError: A collection cannot be read, or has nothing to train or evaluate on.
        SettingsError: A collection is named twice.
    """
    fields = settings.text_field or None
    train, evaluate = [], []
    for source, collection in zip(settings.collection, load_training_collections(settings), strict=True):
        if not settings.eval_collection:
            found = _eval_split(source, settings)
            if found is not None:
                evaluate.append(Collection.load(found[0], split=found[1], text_fields=fields))
            elif settings.holdout:
                collection, held_out = collection.hold_out(settings.holdout, settings.seed)
                logger.warning(
                    "%s has no split to evaluate on: %d of its training queries are held out for that. Their documents "
                    "may occur in training; name --eval-collection for a cleaner figure.",
                    source,
                    len(held_out.queries),
                )
                evaluate.append(held_out)
        if settings.max_train_queries is not None:
            collection = collection.sample(settings.max_train_queries, settings.seed)
            collection.require_positives()
        train.append(with_sentence_queries(collection, settings, unasked=unasked))
    for source in settings.eval_collection:
        split = find_eval_split(source, settings.eval_split)
        evaluate.append(Collection.load(source, split=split, text_fields=fields))
    if not evaluate:
        raise CollectionError("there is nothing to evaluate on: name --eval-collection, or give --holdout a share")
    for collection in evaluate:
        _require_ids_for_run_files(collection)
    return Collections(train, evaluate)


def makes_unasked(settings: RunSettings) -> bool:
    """Whether queries are made of sentences by default, if the settings give no number of them.

    They are worth their time if training sees every document several times. In batches of rows they would take several
    times as long, so none are made there.
    """
    return settings.sentence_queries is None and not _needs_rows(settings)


def with_sentence_queries(collection: Collection, settings: RunSettings, *, unasked: bool | None = None) -> Collection:
    """Add as many queries made of sentences as the settings give, or as can be made.

    If they give no number and queries are made by default, there are up to :data:`SENTENCES` a document and up to
    :data:`MOST_SENTENCES` in all, of documents drawn at random if these do not suffice for all; none if people asked
    that many.
    """
    wanted, each = settings.sentence_queries, 1
    if wanted is None and not (makes_unasked(settings) if unasked is None else unasked):
        wanted = 0
    if wanted is None:
        documents = sum(1 for _ in itertools.islice(collection.corpus, MOST_SENTENCES // SENTENCES))
        wanted = documents * SENTENCES if len(collection.queries) < MOST_SENTENCES else 0
        each = QUERIES_PER_DOCUMENT  # what a batch encodes a document for once
    more = add_sentence_queries(collection, wanted, settings.seed, each=each)
    made = len(more.queries) - len(collection.queries)
    if settings.sentence_queries is not None and made < wanted:
        logger.warning(
            "%s: %d queries could be made of its documents' sentences, of %d that are asked for",
            collection.name,
            made,
            wanted,
        )
    return more


def _needs_rows(settings: RunSettings) -> bool:
    """Whether batches have to be of rows, because something is asked for that only rows have."""
    of_rows = settings.refresh_every is not None or not settings.in_batch_negatives or settings.names_penalty
    return settings.batches != "documents" and (of_rows or settings.batches == "rows")


def settle_batches(settings: RunSettings, query_ids: Iterable[str]) -> RunSettings:
    """Resolve ``batches=auto`` for these training queries."""
    if settings.batches != "auto":
        return settings
    documents = not _needs_rows(settings) and any(map(is_made, query_ids))
    return dataclasses.replace(settings, batches="documents" if documents else "rows")


def in_turn(rows: Mapping[str, Sequence[TrainingRow]], settings: RunSettings) -> list[Mapping[str, list[TrainingRow]]]:
    """The parts of the training: in batches of documents all queries, then only those that people asked.

    Queries made of sentences teach a model its documents. Asked queries are then learnt better by themselves than among
    made ones that outnumber them (``benchmarks/recipe.md``).

    Args:
        rows: Collection name to its rows.
        settings: The run's settings, resolved by :func:`settle_batches`.
    """
    everything = {name: list(found) for name, found in rows.items()}
    asked = {name: [row for row in found if not is_made(row.query_id)] for name, found in rows.items()}
    asked = {name: found for name, found in asked.items() if found}
    if not settings.of_documents or not asked or asked == everything:
        return [everything]
    return [everything, asked]


def find_eval_split(source: str, split: str | None) -> str | None:
    """The split to evaluate on: the given one, or dev, validation or test; None if the source has none of them."""
    return split or next((name for name in EVAL_SPLITS if name in Collection.splits(source)), None)


def load_training_collections(settings: RunSettings) -> list[Collection]:
    """Find and load the splits to train on, with all their queries.

    Raises:
        CollectionError: A collection cannot be read or has nothing to train on.
        SettingsError: A collection is named twice.
    """
    if len(set(settings.collection)) < len(settings.collection):
        raise SettingsError(f"a collection is named twice: {', '.join(settings.collection)}")
    found = []
    for source in settings.collection:
        split = _train_split(source, settings)
        collection = Collection.load(source, split=split, text_fields=settings.text_field or None)
        collection.require_positives()
        found.append(collection)
    return found


def _require_ids_for_run_files(collection: Collection) -> None:
    """Refuse ids that cannot be written to a TREC run file, before anything is encoded."""
    for query_id, documents in collection.judgments.items():
        for kind, identifier in [("query", query_id), *(("document", doc_id) for doc_id in documents)]:
            if identifier.split() != [identifier]:
                raise CollectionError(
                    f"{collection.name}: the {kind} id {identifier!r} is empty or holds white space, which the run "
                    "files of an evaluation cannot carry; give the collection ids without white space"
                )


def _train_split(source: str, settings: RunSettings) -> str | None:
    """The split to train on; None if the source's name includes it."""
    splits = Collection.splits(source)
    if settings.train_split in splits:
        return settings.train_split
    if splits:
        raise CollectionError(
            f"{source} has no split {settings.train_split!r} to train on; it has {', '.join(splits)} "
            "(name one with --train-split)"
        )
    return None


def _eval_split(source: str, settings: RunSettings) -> tuple[str, str] | None:
    """(source, split) to evaluate on; None if there is none."""
    splits = Collection.splits(source)
    if not splits and "/" in source:
        # The source's name includes a split, like miracl/ko/train: look for its siblings.
        parent, _, own = source.rpartition("/")
        try:
            splits = [name for name in Collection.splits(parent) if name != own]
        except CollectionError:
            return None
        source = parent
    if settings.eval_split:
        if settings.eval_split not in splits:
            have = ", ".join(splits) or "none"
            raise CollectionError(f"{source} has no split {settings.eval_split!r} to evaluate on; it has {have}")
        return source, settings.eval_split
    chosen = next((name for name in EVAL_SPLITS if name in splits and name != settings.train_split), None)
    return (source, chosen) if chosen else None
