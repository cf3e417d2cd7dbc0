"""Collections of the ir_datasets catalogue, such as ``miracl/ko/train`` or ``beir/scifact``.

ir_datasets downloads what it needs on first use, to the folder that ``IR_DATASETS_HOME`` names.
"""

from __future__ import annotations

import errno
import importlib.util
import logging
import sys
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from st_clp.data.checks import CollectionError, add_judgment, require_grade
from st_clp.data.collection import Collection
from st_clp.data.corpus import Corpus, Document
from st_clp.data.registry import register_source

logger = logging.getLogger(__name__)

COUNTING_SECONDS = 20.0
_COUNTS: dict[str, int | None] = {}  # a corpus's fingerprint to how many documents it has


class IrdsCorpus(Corpus):
    """The documents of an ir_datasets dataset; ids are fetched through its document store."""

    def __init__(self, dataset: Any, text_fields: Sequence[str] | None) -> None:
        self.name = dataset.docs_namespace() or dataset.dataset_id()
        self._dataset = dataset
        self._fields = tuple(text_fields or ())
        missing = [name for name in self._fields if name not in dataset.docs_cls()._fields]
        if missing:
            raise CollectionError(
                f"{self.name}: its documents have no field {', '.join(missing)}; they have "
                f"{', '.join(dataset.docs_cls()._fields)}"
            )

    def __reduce__(self) -> tuple[Any, ...]:
        # A dataset of ir_datasets cannot be pickled, but its id is enough to load it again.
        return _reopen, (self._dataset.dataset_id(), self._fields)

    def _text(self, document: Any) -> str:
        if not self._fields:
            return document.default_text()
        return " ".join(text for name in self._fields if (text := str(getattr(document, name))))

    def _document(self, document: Any) -> Document:
        return Document(document.doc_id, self._text(document), str(getattr(document, "title", None) or "").strip())

    def __iter__(self) -> Iterator[Document]:
        with _readable(self.name, "documents"):
            yield from map(self._document, self._dataset.docs_iter())

    def get(self, doc_ids: Iterable[str]) -> dict[str, Document]:
        with _readable(self.name, "documents"):
            found = self._dataset.docs_store().get_many(list(dict.fromkeys(doc_ids)))
        return {doc_id: self._document(document) for doc_id, document in found.items()}

    def fingerprint(self) -> str:
        # Other files in the home make another corpus under the same name.
        return f"ir_datasets:{self.name}:{','.join(self._fields)}:{self._home()}:{self._first_file()}"

    def _first_file(self) -> str:
        """Size and time of the first file of documents, the one that ir_datasets names; nothing where it names none."""
        try:
            path = Path(self._dataset.docs_path(force=False))
            if not path.exists():
                # Downloaded now and not when it is read, or it would be another corpus from then on.
                path = Path(self._dataset.docs_path(force=True))
            state = path.stat()
        except Exception as error:  # not every dataset has one, and each says so in its own way
            logger.debug("%s: no file to tell its documents by: %s", self.name, error)
            return ""
        return f"{state.st_size}:{state.st_mtime_ns}"

    @staticmethod
    def _home() -> str:
        import ir_datasets

        return str(ir_datasets.util.home_path())

    def expected_size(self) -> int | None:
        """The number of documents present, if they can be counted in a few seconds; otherwise the catalogue's number.

        The home may hold only a part of a corpus; a bar over the whole would then never end.
        """
        key = self.fingerprint()
        if key not in _COUNTS:
            _COUNTS[key] = self._count()
        return _COUNTS[key]

    def _count(self) -> int | None:
        ends = time.monotonic() + COUNTING_SECONDS
        number = 0
        with _readable(self.name, "documents"):
            for number, _ in enumerate(self._dataset.docs_iter(), start=1):
                if number % 1024 == 0 and time.monotonic() > ends:
                    return self._dataset.docs_count()
        return number


@contextmanager
def _readable(name: str, what: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:  # what a failed download raises is one too
        if error.errno == errno.ENOSPC:
            raise
        raise CollectionError(
            f"{name}: ir_datasets could not download or read its {what} ({error}). Check the network, or put the files "
            f"into {IrdsCorpus._home()} (IR_DATASETS_HOME says where else)"
        ) from error


def _reopen(dataset_id: str, text_fields: Sequence[str]) -> IrdsCorpus:
    return IrdsCorpus(_load(dataset_id), text_fields)


def recognises(source: str) -> bool:
    if importlib.util.find_spec("ir_datasets") is None:
        return False
    return _is_registered(source)


def known_names() -> list[str]:
    return [] if importlib.util.find_spec("ir_datasets") is None else list(_registry())


def splits(source: str) -> list[str]:
    prefix = f"{source}/"
    children = [name for name in known_names() if name.startswith(prefix) and "/" not in name[len(prefix) :]]
    return sorted(name[len(prefix) :] for name in children if _load(name).has_qrels())


def load(source: str, *, split: str | None, text_fields: Sequence[str] | None) -> Collection:
    dataset_id = source if split is None else f"{source}/{split}"
    if not _is_registered(dataset_id):
        raise CollectionError(f"{source}: there is no split {split!r}; it has {', '.join(splits(source)) or 'none'}")
    dataset = _load(dataset_id)
    if not (dataset.has_docs() and dataset.has_queries() and dataset.has_qrels()):
        have = splits(source)
        advice = f"name one of its splits: {', '.join(have)}" if have else "it has documents only"
        raise CollectionError(f"{dataset_id}: there are no queries with judgments here; {advice}")
    judgments: dict[str, dict[str, int]] = {}
    repeated: dict[str, int] = {}
    with _readable(dataset_id, "queries and judgments"):
        queries = {query.query_id: query.default_text() for query in dataset.queries_iter()}
        for judgment in dataset.qrels_iter():
            grade = require_grade(int(judgment.relevance), f"{dataset_id}, query {judgment.query_id}")
            add_judgment(judgments, judgment.query_id, judgment.doc_id, grade, repeated)
    language = dataset.queries_lang() or dataset.docs_lang()
    if split is None and _is_registered(dataset_id.rpartition("/")[0]):
        split = dataset_id.rpartition("/")[2]
    collection = Collection.checked(
        IrdsCorpus(dataset, text_fields), queries, judgments, name=dataset_id, language=language, split=split
    )
    collection.left_out |= repeated
    return collection


def documents(source: str, *, text_fields: Sequence[str] | None) -> Corpus:
    dataset = _load(source)
    if not dataset.has_docs():
        raise CollectionError(f"{source}: there are no documents here")
    return IrdsCorpus(dataset, text_fields)


def _is_registered(dataset_id: str) -> bool:
    return dataset_id in _registry()


def _registry() -> Mapping[str, Any]:
    """The catalogue, id to dataset; there is no public way to list it."""
    import ir_datasets

    found: Mapping[str, Any] = ir_datasets.registry._registered
    return found


def _load(dataset_id: str) -> Any:
    import ir_datasets

    return ir_datasets.load(dataset_id)


register_source(sys.modules[__name__])
