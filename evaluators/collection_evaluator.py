"""Evaluation on one collection."""

from __future__ import annotations

import hashlib
import logging
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from sentence_transformers import SentenceTransformer

from evaluators.base import EvaluationCall, RetrievalEvaluator
from evaluators.metrics import QueryScores, mean_scores, score_queries
from evaluators.runs import Run, cut_run, file_part, make_run, ranked, read_run, without_identical_ids, write_run
from st_clp.data import Collection, CollectionError, Corpus, MemoryCorpus
from st_clp.declaring import shows, takes
from st_clp.encoding import EmbeddingStore, computed_precision
from st_clp.encoding.working_model import Task
from st_clp.options import DEFAULT_METRICS, Encoding, EvaluationOptions
from st_clp.search import search

ReferenceRun = str | os.PathLike[str] | Mapping[str, Mapping[str, float]]


def pooled_collection(collection: Collection, reference: ReferenceRun | None, depth: int) -> tuple[Collection, str]:
    """The collection over its judged documents and, for each query, the best ``depth`` of a reference run.

    Use it to evaluate during training at a small share of the cost. Figures over a pool are higher than over the corpus
    and must not be compared with those.

    Args:
        collection: Its judged documents are always in the pool.
        reference: A TREC run file, or {query id: {document id: score}}; None pools the judged documents alone.
        depth: How many of the reference run's documents of each query to take.

    Returns:
        (the collection over the pool, how the pool was made).

    Raises:
        CollectionError: The run answers none of the collection's queries, or names only documents it does not have.
        ValueError: ``depth`` is below 1, or a line of the run file is broken.
    """
    if depth < 1:
        raise ValueError(f"pool_depth must be at least 1, got {depth}")
    wanted = {doc_id for grades in collection.judgments.values() for doc_id in grades}
    description = "judged documents"
    if reference is not None:
        name = "a run" if isinstance(reference, Mapping) else os.fspath(reference)
        run: Mapping[str, Mapping[str, float]] = reference if isinstance(reference, Mapping) else read_run(reference)
        answered = {query_id: run[query_id] for query_id in collection.judgments if query_id in run}
        if not answered:
            raise CollectionError(f"{name} answers none of the queries of {collection.name}; is it of another split?")
        for documents in answered.values():
            wanted.update(doc_id for doc_id, _ in ranked(documents)[:depth])
        description = f"judged documents and the best {depth} of {os.path.basename(name)}"
    found = collection.get_documents(wanted)
    if not found:
        raise CollectionError(f"{collection.name}: none of the {len(wanted)} documents of the pool is in the corpus")
    # The order does not depend on the run's, so that equal pools have equal embeddings on disk.
    texts = {doc_id: found[doc_id].text for doc_id in sorted(found)}
    digest = hashlib.blake2b("\n".join(texts).encode(), digest_size=4).hexdigest()
    corpus = MemoryCorpus(f"{collection.corpus_name} (pooled {digest})", texts)
    pool = replace(collection, corpus=corpus)
    pool.note_absent_documents(texts)
    return pool, f"{description}: {len(texts):,} documents"


logger = logging.getLogger(__name__)


@shows(options=EvaluationOptions)
class CollectionEvaluator(RetrievalEvaluator):
    """How well a model finds a collection's relevant documents: nDCG, recall, MRR and others, by trec_eval's rules.

    Every document is encoded with ``model.encode_document`` and every judged query with ``model.encode_query``, and the
    best documents are found exactly, by the model's own similarity function. See :class:`evaluators.metrics.Metric` for
    the metrics. Each metric is the mean over all judged queries; one without a relevant document (no grade above 0)
    scores 0 and counts, as in trec_eval.

    Args:
        collection: Documents, queries and judgments.
        name: The prefix of every metric. None: the collection's name, as in ``miracl_ko_dev``.
        metrics: ``ndcg``, ``recall``, ``map``, ``precision`` (or ``p``) or ``mrr``, each cut at any rank, as in
            ``"ndcg@10"``. The first one is the primary metric, by which the Trainer may choose the best model.
        store_dir: The folder to keep the documents' embeddings in, and beside it the queries'. It is reused while model
            and documents stay the same, by the miner too (with the same ``dtype``), and overwritten otherwise; an
            evaluation that was stopped goes on where it was. None: in memory, during the call only.
        reference_run: For a pool, a TREC run file or {query id: {document id: score}}; None: judged documents alone.
        options

    In bfloat16 a figure may differ in the third digit. The default is the miner's, so that both use one store.

    Attributes:
        run: The last call's run, {query id: {document id: score}}, best first.
        query_scores: The metrics of each query in the last call, {query id: {metric: value}}.
        computed_in: The precision that the last call's embeddings were computed in, such as ``"float32"``; None of a
            run that was only scored.
        counts: For the collection, the queries, those without a relevant document, and what was left out.

    Raises:
        CollectionError: The collection has no judgments.
        ValueError: A metric is unknown, a cut-off is below 1, ``run_depth`` is below a cut-off, or a pool is asked for
            that cannot be made.

    Example:
        ::

            from sentence_transformers import SentenceTransformer
            from st_clp import Collection
            from evaluators import CollectionEvaluator

            evaluator = CollectionEvaluator(Collection.load("miracl/ko/dev"))
            metrics = evaluator(SentenceTransformer("BAAI/bge-m3"))
            print(metrics["miracl_ko_dev_ndcg@10"])
            evaluator.write_run("ko.trec")
    """

    @takes(options=EvaluationOptions)
    def __init__(
        self,
        collection: Collection,
        name: str | None = None,
        metrics: Iterable[str] = DEFAULT_METRICS,
        *,
        store_dir: str | os.PathLike[str] | None = None,
        reference_run: ReferenceRun | None = None,
        options: EvaluationOptions,
    ) -> None:
        name = default_name(collection) if name is None else name
        if options.corpus == "full" and reference_run is not None:
            raise ValueError("a reference_run is for a pool; give corpus='pooled' too")
        self.pooled: str | None = None
        if options.corpus == "pooled":
            collection, self.pooled = pooled_collection(collection, reference_run, options.pool_depth)
            name = "_".join(filter(None, [name, "pooled"]))
            # Beside the whole corpus's embeddings, without replacing them.
            store_dir = None if store_dir is None else f"{os.fspath(store_dir)}.pooled"
        super().__init__(name, metrics, options)
        deepest = max(metric.k for metric in self.metrics)
        self.run_depth = options.run_depth or deepest
        if self.run_depth < deepest:
            raise ValueError(f"run_depth {self.run_depth} is too small for a metric cut at {deepest}")
        self.collection = collection
        self.num_documents: int | None = None  # known once they are encoded
        self.computed_in: str | None = None
        options.require_folder(store_dir, "store_dir")
        self.store_dir = store_dir
        self.judgments = _judged_queries(collection)
        self._run: Run | None = None
        self._query_scores: QueryScores = {}
        self._absent = collection.absent_documents or frozenset()
        self._counts = self._count_queries()
        self._warn_of_low_figures()
        self.primary_metric = "_".join(filter(None, [self.name, self.keys()[0]]))

    def keys(self) -> list[str]:
        return [metric.name for metric in self.metrics]

    def evaluate(self, model: SentenceTransformer) -> dict[str, float]:
        with EvaluationCall(model, [self.collection.corpus], show_progress_bar=self.options.show_progress_bar) as call:
            return self.evaluate_in(call)

    def evaluate_in(self, call: EvaluationCall) -> dict[str, float]:
        """As :meth:`evaluate`, within a call that evaluators of other collections share."""
        call.begin(self.name or default_name(self.collection))
        store = self._store(call, self.collection.corpus, self.store_dir, "document")
        self.num_documents = len(store)
        judged = {doc_id for grades in self.judgments.values() for doc_id in grades}
        self._absent = frozenset(judged - store.positions(judged).keys())
        query_ids = list(self.judgments)
        asked = {query_id: self.collection.queries[query_id] for query_id in query_ids}
        # Under the collection's name: the miner keeps the embeddings of other queries beside the same store.
        folder = f"{os.fspath(self.store_dir)}.{default_name(self.collection)}.queries" if self.store_dir else None
        queries = self._store(call, MemoryCorpus(f"{self.collection.name} queries", asked), folder, "query")
        ignored = self.options.ignore_identical_ids and not set(query_ids).isdisjoint(store.ids)
        # One more document, in case the query's own is among them.
        found = search(
            call.model, queries.rows(range(len(queries))), store, self.run_depth + ignored, cluster=self.options
        )
        run = make_run(query_ids, *found)
        if ignored:
            run = cut_run(run, self.run_depth)
        call.finish(len(store))
        scores = self.score(run)
        self.computed_in = computed_precision(call.model, self.options.encode_dtype)
        return scores

    def _store(
        self, call: EvaluationCall, corpus: Corpus, folder: str | os.PathLike[str] | None, task: Task
    ) -> EmbeddingStore:
        return EmbeddingStore.build(
            call.model,
            corpus,
            folder,
            task=task,
            encoding=Encoding.of(self.options, show_progress_bar=False),
            progress=call.bar if task == "document" else None,
            fingerprint=call.fingerprint if folder else None,
        )

    def score(self, run: Run) -> dict[str, float]:
        """Score a run of another system; it is kept like that of a call.

        Raises:
            CollectionError: The run answers none of the judged queries.
        """
        answered = {query_id: run[query_id] for query_id in self.judgments if query_id in run}
        if not answered:
            raise CollectionError(
                f"the run answers none of the queries of {self.collection.name}: it has queries such as "
                f"{', '.join(list(run)[:3])}, the collection such as {', '.join(list(self.judgments)[:3])}"
            )
        self.computed_in = None
        self._counts = self._count_queries()
        if self.options.ignore_identical_ids:
            answered, own = without_identical_ids(answered)
            if own:
                self._counts["documents with the query's own id, left out"] = own
        if others := len(run) - len(answered):
            self._counts["queries of the run without judgments, left out"] = others
        if unanswered := len(self.judgments) - len(answered):
            self._counts["judged queries that the run does not answer, at 0"] = unanswered
        self._run = answered
        self._query_scores = score_queries(self.judgments, answered, self.metrics)
        return mean_scores(self._query_scores.values())

    @property
    def parts(self) -> dict[str, CollectionEvaluator]:
        return {self.name or default_name(self.collection): self}

    @property
    def run(self) -> Run:
        if self._run is None:
            raise RuntimeError(f"nothing has been retrieved yet: call the evaluator {self.name!r} with a model first")
        return self._run

    @property
    def query_scores(self) -> QueryScores:
        _ = self.run
        return self._query_scores

    @property
    def runs(self) -> dict[str, Run]:
        return {self.name or default_name(self.collection): self.run}

    @property
    def counts(self) -> dict[str, dict[str, int]]:
        return {self.name or default_name(self.collection): self._counts}

    def write_run(self, path: str | os.PathLike[str], *, tag: str = "st_clp") -> None:
        """Write the last call's run as a TREC run file; see :func:`evaluators.runs.write_run`.

        Raises:
            RuntimeError: The evaluator has not been called.
            ValueError: An id holds white space.
        """
        write_run(self.run, path, tag=tag)

    def get_config_dict(self) -> dict[str, Any]:
        """The settings that the metrics depend on, for the model card."""
        return {
            "collection": self.collection.name,
            "queries": len(self.judgments),
            "ignore_identical_ids": self.options.ignore_identical_ids,
            **({"pooled": self.pooled} if self.pooled else {}),
        }

    def _count_queries(self) -> dict[str, int]:
        relevant = [any(grade > 0 for grade in grades.values()) for grades in self.judgments.values()]
        counts = {"queries": len(relevant), "queries without a relevant document": relevant.count(False)}
        absent = [
            (grade > 0, doc_id in self._absent)
            for grades in self.judgments.values()
            for doc_id, grade in grades.items()
        ]
        unreachable = sum(
            any(grade > 0 for grade in grades.values())
            and all(doc_id in self._absent for doc_id, grade in grades.items() if grade > 0)
            for grades in self.judgments.values()
        )
        further = {
            "judgments of documents that the corpus does not have": sum(gone for _, gone in absent),
            "judgments of relevant documents that the corpus does not have": sum(
                relevant and gone for relevant, gone in absent
            ),
            "queries whose relevant documents are all absent, at 0": unreachable,
            **{f"{cause}, left out at reading": number for cause, number in self.collection.left_out.items()},
        }
        return counts | {what: number for what, number in further.items() if number}

    def _warn_of_low_figures(self) -> None:
        """Warn of anything that makes figures lower than they should be."""
        name = self.collection.name
        if number := self._counts["queries without a relevant document"]:
            unanswerable = (
                q for q, grades in self.judgments.items() if not any(grade > 0 for grade in grades.values())
            )
            logger.warning(
                "%s: %d of %d queries have no relevant document (such as %s); they score 0, as in trec_eval",
                name,
                number,
                len(self.judgments),
                next(unanswerable),
            )
        own = [query_id for query_id, grades in self.judgments.items() if grades.get(query_id, 0) > 0]
        if own and self.options.ignore_identical_ids:
            logger.warning(
                "%s: for %d queries (such as %s) a document with the query's own id is judged relevant, but such "
                "documents are left out as in BEIR; if queries and documents merely share their numbering, set "
                "ignore_identical_ids=False",
                name,
                len(own),
                own[0],
            )


def default_name(collection: Collection) -> str:
    """The collection's name as a metric's prefix: ``miracl/ko/dev`` becomes ``miracl_ko_dev``; for a path, its end."""
    parts = collection.name.replace("\\", "/").strip("/").split("/")
    is_path = collection.name.startswith(("/", "\\", ".", "~"))
    return file_part("_".join(parts[-2:] if is_path else parts))


def distinct_names(collections: Sequence[Collection]) -> list[str]:
    """A name for each collection: the default one, or more of the path where two would be equal.

    Raises:
        ValueError: A collection is given twice.
    """
    sources = [collection.name for collection in collections]
    if repeated := [source for source in sources if sources.count(source) > 1]:
        raise ValueError(f"the collection {repeated[0]} is named twice")
    names = [default_name(collection) for collection in collections]
    alike = [source for source, name in zip(sources, names, strict=True) if names.count(name) > 1]
    longer = {source: file_part(source.replace("\\", "/").strip("/.~")) for source in alike}
    taken = [*longer.values(), *(name for name in names if names.count(name) == 1)]
    for source in alike:
        # Characters that file names cannot have, or that were cut off, may have been the only difference.
        if taken.count(longer[source]) > 1:
            longer[source] = f"{longer[source][-90:]}_{hashlib.blake2b(source.encode(), digest_size=4).hexdigest()}"
    return [longer.get(source, name) for source, name in zip(sources, names, strict=True)]


def _judged_queries(collection: Collection) -> dict[str, dict[str, int]]:
    """The judgments of queries that have a text.

    Raises:
        CollectionError: There are none.
    """
    judgments = {
        query_id: collection.judgments[query_id]
        for query_id in collection.queries
        if collection.judgments.get(query_id)
    }
    unknown = sum(map(bool, collection.judgments.values())) - len(judgments)
    if unknown:
        logger.warning("%s: left out the judgments of %d queries that have no text", collection.name, unknown)
    if not judgments:
        raise CollectionError(
            f"{collection.name} has no judgments of its queries, so there is nothing to evaluate; "
            "name a split that has them, such as dev"
        )
    return judgments
