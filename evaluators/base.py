"""The base of all evaluators: names of metrics, entries in the model card, and files."""

from __future__ import annotations

import logging
import os
from abc import abstractmethod
from collections.abc import Iterable, Mapping
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sentence_transformers import SentenceTransformer
from sentence_transformers.base.evaluation import BaseEvaluator
from tqdm.auto import tqdm

from evaluators.evaluation import CollectionResult, Evaluation, judgments_fingerprint, write_evaluation
from evaluators.metrics import Metric, mean_scores, parse_metrics
from evaluators.runs import Run, append_row, file_part, require_columns, write_run
from st_clp.data import Corpus
from st_clp.encoding import model_fingerprint
from st_clp.files import write_json
from st_clp.options import EvaluationOptions

if TYPE_CHECKING:
    from evaluators.collection_evaluator import CollectionEvaluator


class EvaluationCall:
    """One call of an evaluator, used as a context manager.

    Args:
        model: The model; it must not change during the call.
        corpora: The corpus of each collection, in the order in which they are evaluated.
        show_progress_bar: Show one progress bar over the documents of all collections.

    Attributes:
        bar: The progress bar.
    """

    def __init__(self, model: SentenceTransformer, corpora: Iterable[Corpus], *, show_progress_bar: bool) -> None:
        self.model = model
        # If a size is not known before its corpus is read, the bar shows a rate but no estimate.
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
        """The model's fingerprint, computed once: if all embeddings are stored, this is most of the work."""
        return model_fingerprint(self.model)

    def begin(self, name: str) -> None:
        """Show which collection is being evaluated."""
        self.bar.set_description(f"Evaluating {name}")

    def finish(self, documents: int) -> None:
        """Advance the bar to the end of a collection, however few documents had to be encoded."""
        self._done += documents
        if not self.bar.disable:
            self.bar.update(self._done - self.bar.n)


def save_parts(
    folder: str | os.PathLike[str],
    parts: Mapping[str, CollectionEvaluator],
    *,
    model_name: str,
    model: SentenceTransformer | None = None,
    **settings: Any,
) -> Evaluation:
    """Save the last calls of several collections' evaluators as one evaluation.

    Args:
        folder: Where to; it is made if it is not there.
        parts: The name of each collection to its evaluator.
        model_name: What to call the model.
        model: The model, for a fingerprint of its weights; None where only runs were scored.
        **settings: Anything else that the figures depend on.

    Raises:
        RuntimeError: An evaluator has not been called.
        ValueError: An id holds white space, which a run file cannot carry.
    """
    return write_evaluation(
        folder,
        model=model_name,
        fingerprint=None if model is None else model_fingerprint(model),
        results={key: _result(key, part) for key, part in parts.items()},
        runs={key: part.run for key, part in parts.items()},
        query_scores={key: part.query_scores for key, part in parts.items()},
        settings={key: part.get_config_dict() for key, part in parts.items()} | _of_model(model) | settings,
    )


def _of_model(model: SentenceTransformer | None) -> dict[str, Any]:
    if model is None:
        return {}
    return {
        "max_seq_length": model.max_seq_length,
        "similarity": str(model.similarity_fn_name),
        "prompts": dict(model.prompts),
        "truncate_dim": model.truncate_dim,
    }


def _result(key: str, part: CollectionEvaluator) -> CollectionResult:
    collection = part.collection
    (counts,) = part.counts.values()
    return CollectionResult(
        key=key,
        source=collection.name,
        split=collection.split,
        language=collection.language,
        pooled=part.pooled,
        judgments=judgments_fingerprint(part.judgments),
        documents=part.num_documents,
        scores=mean_scores(part.query_scores.values()),
        counts=counts,
        computed_in=part.computed_in,
    )


logger = logging.getLogger(__name__)


class RetrievalEvaluator(BaseEvaluator):
    """The base class of evaluators: calls :meth:`evaluate`, then names, stores and writes the metrics.

    Args:
        name: The prefix of every metric, followed by an underscore; ``""`` for none.
        metrics: Names such as ``"ndcg@10"``. The first one is the primary metric.
        options: How to evaluate, and what to write to files.

    Raises:
        ValueError: A metric is unknown, or its cut-off is missing or below 1.
    """

    def __init__(self, name: str, metrics: Iterable[str], options: EvaluationOptions) -> None:
        super().__init__()
        self.name = name
        self.metrics: tuple[Metric, ...] = parse_metrics(metrics)
        self.options = options
        self.write_csv, self.write_json, self.save_runs = options.write_csv, options.write_json, options.save_runs
        stem = "_".join(filter(None, ["retrieval_evaluation", file_part(name)]))
        self.csv_file = f"{stem}_results.csv"
        self.json_file = f"{stem}_results.json"

    @abstractmethod
    def evaluate(self, model: SentenceTransformer) -> dict[str, float]:
        """Evaluate the model: {metric: value}, the primary metric first, without the prefix ``name``."""

    @abstractmethod
    def keys(self) -> list[str]:
        """The metrics of :meth:`evaluate`, in order."""

    @property
    @abstractmethod
    def runs(self) -> dict[str, Run]:
        """The last call's runs: {collection: {query id: {document id: score}}}."""

    @property
    @abstractmethod
    def parts(self) -> dict[str, CollectionEvaluator]:
        """The evaluator of each collection, by the collection's key."""

    @property
    @abstractmethod
    def counts(self) -> dict[str, dict[str, int]]:
        """For each collection, how many queries it has, how many without an answer, and what was left out."""

    @property
    def description(self) -> str:
        """The task, for the model card."""
        return "Information Retrieval"

    def __call__(  # type: ignore[override]  # as sentence-transformers' own: for one kind of model
        self, model: SentenceTransformer, output_path: str | None = None, epoch: float = -1, steps: int = -1
    ) -> dict[str, float]:
        """Evaluate the model.

        Args:
            model: Any SentenceTransformer.
            output_path: A folder for the CSV, JSON and run files; None writes none.
            epoch: The epoch, for those files; -1 outside training.
            steps: The training steps so far, for those files; -1 outside training.

        Returns:
            Metric to value, such as ``{"miracl_ko_ndcg@10": 0.64}``; the primary one is named by ``primary_metric``.

        Raises:
            ValueError: The CSV file in ``output_path`` is of an evaluator with other metrics.
        """
        folder = None if output_path is None else Path(output_path)
        if folder is not None and self.write_csv:
            require_columns(folder / self.csv_file, ["epoch", "steps", *self.keys()])
        scores = self.evaluate(model)
        self.primary_metric = next(iter(scores))
        metrics = self.prefix_name_to_metrics(scores, self.name)
        logger.info("%s: %s", self.name, ", ".join(f"{metric} {value:.4f}" for metric, value in scores.items()))
        self.store_metrics_in_model_card_data(model, metrics, epoch, steps)  # type: ignore[arg-type]
        if folder is not None:
            self._write(folder, metrics, scores, epoch, steps)
        return metrics

    def write_runs(self, folder: str | Path, *, suffix: str = "") -> list[Path]:
        """Write the last call's run of each collection as a TREC run file.

        Args:
            folder: Where to; it is made if it is not there.
            suffix: Appended to the collection's name in the file name.

        Returns:
            The files.

        Raises:
            RuntimeError: The evaluator has not been called.
            ValueError: An id holds white space (see :func:`evaluators.runs.write_run`).
        """
        paths = {key: Path(folder) / f"{file_part(key)}{suffix}.trec" for key in self.runs}
        for key, path in paths.items():
            write_run(self.runs[key], path)
        return list(paths.values())

    def save(
        self, folder: str | Path, *, model_name: str, model: SentenceTransformer | None = None, **settings: Any
    ) -> Evaluation:
        """Write the last call to a folder: runs, every query's scores, and what they are of.

        ``st-clp compare`` and ``st-clp report`` read such folders, and so does
        :func:`evaluators.evaluation.read_evaluation`.

        Args:
            folder: Where to; it is made if it is not there.
            model_name: What to call the model.
            model: The model, for a fingerprint of its weights; None where only a run was scored.
            **settings: Anything else that the figures depend on.

        Raises:
            RuntimeError: The evaluator has not been called.
            ValueError: An id holds white space, which a run file cannot carry.
        """
        return save_parts(folder, self.parts, model_name=model_name, model=model, **settings)

    def _write(
        self, folder: Path, metrics: dict[str, float], scores: dict[str, float], epoch: float, steps: int
    ) -> None:
        if self.write_csv:
            append_row(folder / self.csv_file, {"epoch": epoch, "steps": steps, **scores})
        if self.write_json:
            content: dict[str, Any] = {
                "epoch": epoch,
                "steps": steps,
                "primary_metric": self.primary_metric,
                "metrics": metrics,
                "counts": self.counts,
            }
            if pooled := {key: part.pooled for key, part in self.parts.items() if part.pooled}:
                content["pooled"] = pooled
            write_json(folder / self.json_file, content)
        if self.save_runs:
            self.write_runs(folder, suffix="" if steps == -1 else f"_{steps}_steps")
