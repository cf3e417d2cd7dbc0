"""Evaluations on disk: runs, every query's scores, and a manifest."""

from __future__ import annotations

import csv
import datetime
import hashlib
import json
import math
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from evaluators.metrics import Judgments, QueryScores
from evaluators.runs import Run, file_part, read_run, write_run
from st_clp.files import read_json, require_field, versions, whole_file, write_json

MANIFEST = "evaluation.json"
FORMAT = 1
REMEDY = "evaluate again"
UNKNOWN_PRECISION = "unknown"


class EvaluationError(ValueError):
    """A saved evaluation cannot be read, or two of them cannot be compared; the message says what to do."""


@dataclass(frozen=True)
class CollectionResult:
    """The result on one collection.

    Attributes:
        key: The collection's name in metrics and file names.
        source: What it was loaded from.
        split: Its split, or None.
        language: ISO 639 code, or None.
        pooled: How the pool was made; None for figures over the whole corpus.
        judgments: A fingerprint of the judgments.
        documents: How many documents were searched; None if only a run was given.
        scores: The mean of each metric.
        counts: Queries, those without a relevant document, and what was left out.
        computed_in: The precision of the model's computation, such as ``"bfloat16"``; None if only a run was given, and
            in evaluations of version 0.1.0.
    """

    key: str
    source: str
    split: str | None
    language: str | None
    pooled: str | None
    judgments: str
    documents: int | None
    scores: dict[str, float]
    counts: dict[str, int]
    computed_in: str | None = None

    @property
    def label(self) -> str:
        """The key, marked if the figures are over a pool."""
        return pooled_label(self.key) if self.pooled else self.key

    @property
    def file_part(self) -> str:
        """The base of its file names."""
        return file_part(self.key) + (".pooled" if self.pooled else "")


def pooled_label(key: str) -> str:
    """The name of a collection or mean whose figures are over a pool."""
    return f"{key} (pooled)"


@dataclass(frozen=True)
class Evaluation:
    """A saved evaluation of one model.

    Attributes:
        path: Its folder.
        model: The model's name.
        fingerprint: A hash of the model's weights and settings; None if only runs were given.
        results: Collection key to its result.
        metrics: The metrics, the primary one first.
        created: When it was made, ISO 8601, UTC.
        versions: The versions of packages that figures depend on.
        settings: Other settings that figures depend on.
    """

    path: Path
    model: str
    fingerprint: str | None
    results: dict[str, CollectionResult]
    metrics: list[str]
    created: str
    versions: dict[str, str]
    settings: dict[str, Any]

    @cached_property
    def query_scores(self) -> dict[str, QueryScores]:
        """Collection key to {query id: {metric: value}}.

        Raises:
            EvaluationError: A file is missing or broken.
        """
        return {
            key: _read_scores(self.path / "scores" / f"{result.file_part}.csv", self.metrics)
            for key, result in self.results.items()
        }

    @property
    def pooled(self) -> bool:
        """Whether the figures are over pools instead of whole corpora."""
        return any(result.pooled for result in self.results.values())

    @property
    def precision(self) -> str | None:
        """The precision that the model computed in, such as ``"bfloat16"``.

        ``"unknown"`` if it was not recorded; None if only runs were scored.
        """
        if self.fingerprint is None:
            return None
        asked = self.settings.get("dtype")
        # An evaluation without a record does not tell what "auto" and "model" were resolved to.
        noted = [
            result.computed_in or ("bfloat16" if asked == "bfloat16" else UNKNOWN_PRECISION)
            for result in self.results.values()
        ]
        return " and ".join(dict.fromkeys(noted))

    def run(self, key: str) -> Run:
        """Read the run of a collection.

        Raises:
            ValueError: A line of the run file is broken.
            FileNotFoundError: The run file is missing.
        """
        return read_run(self.path / "runs" / f"{self.results[key].file_part}.trec")


def with_distinct_names(evaluations: Sequence[Evaluation]) -> list[Evaluation]:
    """The same evaluations, with their folders added to models of the same name."""
    times = Counter(evaluation.model for evaluation in evaluations)
    return [
        replace(evaluation, model=f"{evaluation.model} ({evaluation.path})")
        if times[evaluation.model] > 1
        else evaluation
        for evaluation in evaluations
    ]


def judgments_fingerprint(judgments: Judgments) -> str:
    """A hash of judgments that does not depend on their order."""
    digest = hashlib.blake2b(digest_size=16)
    for query_id in sorted(judgments):
        for doc_id, grade in sorted(judgments[query_id].items()):
            digest.update(json.dumps([query_id, doc_id, grade]).encode())
    return digest.hexdigest()


def write_evaluation(
    folder: str | os.PathLike[str],
    *,
    model: str,
    fingerprint: str | None,
    results: Mapping[str, CollectionResult],
    runs: Mapping[str, Run],
    query_scores: Mapping[str, QueryScores],
    settings: Mapping[str, Any],
) -> Evaluation:
    """Write an evaluation to a folder. The manifest comes last: a folder with one is complete.

    Raises:
        ValueError: An id holds white space, which a run file cannot carry, or some of the figures are over pools and
            others over whole corpora.
        OSError: The folder cannot be written.
    """
    if len({result.pooled is None for result in results.values()}) > 1:
        raise ValueError("figures over pools and over whole corpora do not go into one evaluation; save them apart")
    path = Path(folder)
    # Files of an earlier evaluation must not remain beside the new ones.
    (path / MANIFEST).unlink(missing_ok=True)
    for key, result in results.items():
        write_run(runs[key], path / "runs" / f"{result.file_part}.trec")
        _write_scores(query_scores[key], path / "scores" / f"{result.file_part}.csv")
    metrics = list(next(iter(results.values())).scores)
    manifest = {
        "format": FORMAT,
        "model": model,
        "fingerprint": fingerprint,
        "created": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "metrics": metrics,
        "settings": dict(settings),
        "versions": versions("pytrec-eval-terrier"),
        "collections": {key: {k: v for k, v in vars(found).items() if k != "key"} for key, found in results.items()},
    }
    write_json(path / MANIFEST, manifest)
    return read_evaluation(path)


def read_evaluation(folder: str | os.PathLike[str]) -> Evaluation:
    """Read what :func:`write_evaluation` wrote.

    Raises:
        EvaluationError: There is none in the folder, or it is broken.
    """
    path = Path(folder)
    file = path / MANIFEST
    try:
        manifest = read_json(file, error=EvaluationError, remedy=REMEDY)
    except (FileNotFoundError, NotADirectoryError):
        raise EvaluationError(
            f"{path} holds no evaluation; make one with: st-clp evaluate MODEL --output {path}"
        ) from None
    if manifest.get("format") != FORMAT:
        raise EvaluationError(f"{file} has format {manifest.get('format')!r:.60}, and this version reads {FORMAT}")
    values = {name: _field(manifest, name, str(file), *kinds) for name, kinds in MANIFEST_FIELDS.items()}
    for name in ("metrics", "collections"):
        if not values[name]:
            raise EvaluationError(f"{file}: {name!r} is empty; {REMEDY}")
    if not all(isinstance(metric, str) for metric in values["metrics"]):
        raise EvaluationError(f"{file}: 'metrics' must be names, not {values['metrics']!r:.60}; {REMEDY}")
    found = values.pop("collections")
    results = {key: _result(found, key, values["metrics"], str(file)) for key in found}
    return Evaluation(path=path, results=results, **values)


NO_TEXT = (str, type(None))
MANIFEST_FIELDS: dict[str, tuple[type, ...]] = {
    "model": (str,),
    "fingerprint": NO_TEXT,
    "metrics": (list,),
    "created": (str,),
    "versions": (dict,),
    "settings": (dict,),
    "collections": (dict,),
}
RESULT_FIELDS: dict[str, tuple[type, ...]] = {
    "source": (str,),
    "split": NO_TEXT,
    "language": NO_TEXT,
    "pooled": NO_TEXT,
    "judgments": (str,),
    "documents": (int, type(None)),
    "scores": (dict,),
    "counts": (dict,),
}


def _field(values: dict[str, Any], name: str, where: str, *kinds: type) -> Any:
    return require_field(values, name, kinds, where, error=EvaluationError, remedy=REMEDY)


def _result(found: dict[str, Any], key: str, metrics: Sequence[str], where: str) -> CollectionResult:
    values, where = _field(found, key, where, dict), f"{where}, {key}"
    fields = {name: _field(values, name, where, *kinds) for name, kinds in RESULT_FIELDS.items()}
    for metric in metrics:
        _field(fields["scores"], metric, where, float)
    for what in fields["counts"]:
        _field(fields["counts"], what, where, int)
    computed_in = _field({"computed_in": None, **values}, "computed_in", where, *NO_TEXT)
    return CollectionResult(key, **fields, computed_in=computed_in)


def _write_scores(scores: QueryScores, path: Path) -> None:
    with whole_file(path) as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["query", *next(iter(scores.values()))])
        for query_id, values in scores.items():
            writer.writerow([query_id, *(repr(value) for value in values.values())])


def _read_scores(path: Path, metrics: Sequence[str]) -> QueryScores:
    try:
        with open(path, encoding="utf-8", newline="") as file:
            reader = csv.reader(file)
            names = next(reader)[1:]
            if missing := set(metrics).difference(names):
                raise ValueError(f"no column {', '.join(sorted(missing))}")
            return {row[0]: dict(zip(names, map(_score, row[1:]), strict=True)) for row in reader}
    except FileNotFoundError:
        raise EvaluationError(f"{path} is missing; {REMEDY}") from None
    except (StopIteration, ValueError, IndexError, csv.Error) as error:
        raise EvaluationError(f"{path} is broken ({error}); {REMEDY}") from error


def _score(text: str) -> float:
    score = float(text)
    if not math.isfinite(score):
        raise ValueError(f"a score of {text}")
    return score
