"""Evaluation on several collections and their mean."""

from __future__ import annotations

import difflib
import hashlib
import logging
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from sentence_transformers import SentenceTransformer

from evaluators.base import EvaluationCall, RetrievalEvaluator
from evaluators.collection_evaluator import CollectionEvaluator, ReferenceRun
from evaluators.metrics import QueryScores, mean_scores
from evaluators.runs import Run, file_part
from st_clp.data import Collection, CollectionError
from st_clp.declaring import shows, takes
from st_clp.files import inside
from st_clp.options import DEFAULT_METRICS, EvaluationOptions

Datasets = Mapping[str, "Collection | Mapping[str, Collection]"]


@shows(options=EvaluationOptions)
class BenchmarkEvaluator(RetrievalEvaluator):
    """How well a model does on each of several datasets, and on average.

    The metrics are ``NAME_DATASET_METRIC`` for each dataset and ``NAME_mean_METRIC`` for the mean over datasets, in
    which each counts the same, regardless of its number of queries. A dataset of several parts scores the mean of its
    parts, which appear as ``NAME_DATASET_PART_METRIC``.

    Args:
        datasets: What to call a dataset, to its collection or, for one of several parts, {part: collection}.
        name: Goes before every metric, with an underscore.
        store_dir: A folder for the documents' embeddings, with a folder in it for each corpus. None: they are kept in
            memory, those of one corpus at a time.
        reference_runs: For ``corpus="pooled"``, {key: TREC run file or run}, or a folder with a file ``KEY.trec`` for
            each collection, as ``write_runs`` leaves one.
        metrics: As in :class:`CollectionEvaluator`.
        options

    Attributes:
        evaluators: The :class:`CollectionEvaluator` of each collection, by its key.
        runs: What the last call retrieved, {key: {query id: {document id: score}}}.
        query_scores: The metrics of each query in the last call, {key: {query id: {metric: value}}}.

    Raises:
        CollectionError: A collection has no judgments.
        ValueError: There are no datasets, or one has a reserved or repeated name; or a setting is wrong.
    """

    @takes(options=EvaluationOptions)
    def __init__(
        self,
        datasets: Datasets,
        name: str,
        metrics: Iterable[str] = DEFAULT_METRICS,
        *,
        store_dir: str | os.PathLike[str] | None = None,
        reference_runs: Mapping[str, ReferenceRun] | str | os.PathLike[str] | None = None,
        options: EvaluationOptions,
    ) -> None:
        plain_name = name
        if options.corpus == "pooled":
            name = "_".join(filter(None, [name, "pooled"]))
        super().__init__(name, metrics, options)
        self._parts, collections = _keys_of_parts(datasets)
        references = _references(reference_runs, collections)
        stores = _store_names(collection.corpus_name for collection in collections.values())
        self.evaluators: dict[str, CollectionEvaluator] = {
            key: CollectionEvaluator(
                collection,
                name="_".join(filter(None, [plain_name, key])),
                metrics=[metric.name for metric in self.metrics],
                store_dir=None if store_dir is None else inside(store_dir, stores[collection.corpus_name]),
                reference_run=references.get(key),
                options=options,
            )
            for key, collection in collections.items()
        }
        self.primary_metric = "_".join(filter(None, [name, self.keys()[0]]))

    def keys(self) -> list[str]:
        rows = ["mean"]
        for dataset, keys in self._parts.items():
            rows += [dataset, *(key for key in keys if key != dataset)]
        return [f"{row}_{metric.name}" for row in rows for metric in self.metrics]

    def evaluate(self, model: SentenceTransformer) -> dict[str, float]:
        corpora = [evaluator.collection.corpus for evaluator in self.evaluators.values()]
        with EvaluationCall(model, corpora, show_progress_bar=self.options.show_progress_bar) as call:
            scores = {key: evaluator.evaluate_in(call) for key, evaluator in self.evaluators.items()}
        datasets = {dataset: mean_scores(scores[key] for key in keys) for dataset, keys in self._parts.items()}
        rows = {"mean": mean_scores(datasets.values()), **datasets, **scores}
        found = {f"{row}_{metric}": value for row, values in rows.items() for metric, value in values.items()}
        return {key: found[key] for key in self.keys()}

    @property
    def parts(self) -> dict[str, CollectionEvaluator]:
        return self.evaluators

    @property
    def runs(self) -> dict[str, Run]:
        return {key: evaluator.run for key, evaluator in self.evaluators.items()}

    @property
    def query_scores(self) -> dict[str, QueryScores]:
        return {key: evaluator.query_scores for key, evaluator in self.evaluators.items()}

    @property
    def counts(self) -> dict[str, dict[str, int]]:
        return {key: evaluator.counts[evaluator.name] for key, evaluator in self.evaluators.items()}

    def get_config_dict(self) -> dict[str, Any]:
        """The settings that the metrics depend on, for the model card."""
        return {key: evaluator.get_config_dict() for key, evaluator in self.evaluators.items()}


def _store_names(corpus_names: Iterable[str]) -> dict[str, str]:
    """A folder for each corpus; what cannot stand in a folder's name may have been all that told two apart."""
    names = dict.fromkeys(corpus_names)
    parts = [file_part(name) for name in names]
    return {
        name: part
        if parts.count(part) == 1
        else f"{part[-90:]}_{hashlib.blake2b(name.encode(), digest_size=4).hexdigest()}"
        for name, part in zip(names, parts, strict=True)
    }


def _references(
    given: Mapping[str, ReferenceRun] | str | os.PathLike[str] | None, collections: Mapping[str, Collection]
) -> dict[str, ReferenceRun]:
    """For each collection's key the run that its pool is made of."""
    if given is None:
        return {}
    if not isinstance(given, Mapping):
        files = {key: Path(given) / f"{file_part(key)}.trec" for key in collections}
        if missing := [path for path in files.values() if not path.is_file()]:
            raise ValueError(f"there is no reference run {missing[0]}; a pool needs one for each collection")
        return dict(files)
    if missing_keys := collections.keys() - given.keys():
        raise ValueError(f"reference_runs has no run for {', '.join(sorted(missing_keys))}")
    return dict(given)


def _keys_of_parts(datasets: Datasets) -> tuple[dict[str, list[str]], dict[str, Collection]]:
    """For each dataset the keys of its collections; and for each key its collection."""
    if not datasets:
        raise ValueError("there is nothing to evaluate on: name at least one dataset")
    parts: dict[str, list[str]] = {}
    collections: dict[str, Collection] = {}
    for dataset, content in datasets.items():
        named = {dataset: content} if isinstance(content, Collection) else _with_dataset(dataset, content)
        parts[dataset] = list(named)
        if repeated := named.keys() & collections.keys():
            raise ValueError(f"two collections would both be called {', '.join(sorted(repeated))}")
        if unusable := [key for key in named if file_part(key) != key]:
            raise ValueError(
                f"{unusable[0]!r} cannot be a dataset's name: it stands in metrics and file names, so at most 100 "
                "letters, digits and . _ - + @ are allowed"
            )
        collections.update(named)
    if "mean" in collections.keys() | parts.keys():
        raise ValueError("a dataset cannot be called 'mean': that is the mean over all of them")
    return parts, collections


def _with_dataset(dataset: str, content: Mapping[str, Collection]) -> dict[str, Collection]:
    if not content:
        raise ValueError(f"the dataset {dataset} has no parts")
    return {f"{dataset}_{part}": collection for part, collection in content.items()}


logger = logging.getLogger(__name__)

MIRACL_LANGUAGES = tuple("ar bn de en es fa fi fr hi id ja ko ru sw te th yo zh".split())


class MIRACLEvaluator(BenchmarkEvaluator):
    """How well a model retrieves on MIRACL, in each language and on average (Zhang et al., 2023).

    The metrics are ``miracl_ko_ndcg@10`` and the like, and ``miracl_mean_ndcg@10`` over the languages, which is the
    primary one. The collections come through ir_datasets, which downloads what is not there to the folder that
    ``IR_DATASETS_HOME`` names; the document text is title, a space and text.

    Args:
        languages: Two-letter codes, or ``"all"``: every language that has the split (18 have dev, 16 have train).
        split: ``"dev"`` or ``"train"``; the answers to test-a and test-b are not public.
        name: Goes before every metric. None: ``miracl``, and ``miracl_train`` for the train split.
        **settings: All other arguments of :class:`BenchmarkEvaluator`.

    Raises:
        CollectionError: A language is not in MIRACL, or does not have the split; the message names those that do.
        ValueError: A language is named twice, or a setting is wrong.

    Example:
        ::

            from sentence_transformers import SentenceTransformer
            from evaluators import MIRACLEvaluator

            evaluator = MIRACLEvaluator(languages=("ko", "fa", "hi"), store_dir="embeddings")
            metrics = evaluator(SentenceTransformer("BAAI/bge-m3"), output_path="scores")
            print(metrics["miracl_ko_ndcg@10"], metrics[evaluator.primary_metric])
    """

    def __init__(
        self,
        languages: Sequence[str] | str = ("ko", "fa", "hi"),
        split: str = "dev",
        name: str | None = None,
        **settings: Any,
    ) -> None:
        self.languages = _with_split(languages, split)
        self.split = split
        if name is None:
            name = "miracl" if split == "dev" else f"miracl_{split}"
        collections = {language: Collection.load(f"miracl/{language}", split=split) for language in self.languages}
        super().__init__(collections, name, **settings)


def _with_split(languages: Sequence[str] | str, split: str) -> tuple[str, ...]:
    """The languages asked for, if all of them have the split."""
    if languages == "all":
        found = tuple(language for language in MIRACL_LANGUAGES if split in _splits(language))
        if found:
            if without := sorted(set(MIRACL_LANGUAGES) - set(found)):
                logger.info("MIRACL has no split %s in %s; the others are evaluated", split, ", ".join(without))
            return found
        languages = MIRACL_LANGUAGES
    asked = (languages,) if isinstance(languages, str) else tuple(languages)
    if len(set(asked)) < len(asked):
        raise ValueError(f"a language is named twice: {', '.join(asked)}")
    for language in asked:
        _require_language(language)
    if missing := [language for language in asked if split not in _splits(language)]:
        raise CollectionError(_missing_split(missing, split))
    return asked


def _splits(language: str) -> list[str]:
    return Collection.splits(f"miracl/{language}")


def _require_language(language: str) -> None:
    if language not in MIRACL_LANGUAGES:
        nearest = difflib.get_close_matches(language, MIRACL_LANGUAGES, n=1)
        hint = f"did you mean {nearest[0]}? " if nearest else ""
        raise CollectionError(
            f"MIRACL has no language {language!r}; {hint}its languages are {', '.join(MIRACL_LANGUAGES)}"
        )


def _missing_split(missing: list[str], split: str) -> str:
    """Which splits the languages have instead, and which languages have the split."""
    by_splits: dict[str, list[str]] = {}
    for language in missing:
        by_splits.setdefault(" and ".join(_splits(language)), []).append(language)
    instead = "; ".join(f"{', '.join(languages)}: only {splits}" for splits, languages in by_splits.items())
    with_split = [language for language in MIRACL_LANGUAGES if split in _splits(language)]
    others = f". Languages with {split}: {', '.join(with_split)}" if with_split else ""
    return f"MIRACL has no judgments of a split {split!r} for {', '.join(missing)} ({instead}){others}"
