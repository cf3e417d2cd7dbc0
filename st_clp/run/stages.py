"""The whole method as one run: evaluate, mine, convert, train, evaluate again, save.

from st_clp.recipe import run
from st_clp.settings import RunSettings, SettingsError

report = run(RunSettings(model="BAAI/bge-m3", collection=["miracl/ko"], output="bge-m3-ko"))
"""

from __future__ import annotations

import logging
import shutil
import time
from pathlib import Path
from typing import Any

from rich.console import Console
from sentence_transformers import SentenceTransformer

from evaluators import CollectionEvaluator
from evaluators.base import EvaluationCall, save_parts
from evaluators.collection_evaluator import distinct_names
from evaluators.evaluation import MANIFEST as EVALUATION
from st_clp.files import versions, write_json
from st_clp.mining import mine
from st_clp.mining.rows import read_rows, write_rows
from st_clp.moe import expert_usage, is_moe, load
from st_clp.options import DEFAULT_METRICS, Encoding, EvaluationOptions, MiningOptions, QueryOptions
from st_clp.queries import make_chain
from st_clp.queries.own_text import is_made
from st_clp.run.folder import EVALUATE_AFTER, EVALUATE_BEFORE, MINE, STAGES, TRAIN, RunDirectory
from st_clp.run.forecast import Forecast, forecast, is_trifle, print_forecast
from st_clp.run.modelling import load_base_model, load_cross_encoder, model_name
from st_clp.run.report import machine, print_scores, write_card
from st_clp.run.splits import load_collections, settle_batches
from st_clp.run.training import check_training_arguments
from st_clp.run.training_stage import TrainingStage
from st_clp.settings import RunSettings, SettingsError
from st_clp.terminal import new_console

logger = logging.getLogger(__name__)

USAGE_QUERIES = 100  # of each collection, to see what the experts do


def run(
    settings: RunSettings, *, resume: bool = False, overwrite: bool = False, console: Console | None = None
) -> dict[str, Any]:
    """Fine-tune a model for retrieval and evaluate it before and after.

    Args:
        settings: The run's settings.
        resume: Resume the run in the output folder.
        overwrite: Replace the run in the output folder.
        console: Where to print; None prints to the standard output.

    Returns:
        The report, which is also in ``report.json``.

    Raises:
        SettingsError: A setting, the model or the output folder cannot be used.
        CollectionError: A collection cannot be read or used.
    """
    settings.require("model", "collection", "output")
    return _Run(settings, console or new_console()).go(resume=resume, overwrite=overwrite)


def forecast_run(
    settings: RunSettings, *, resume: bool = False, overwrite: bool = False, console: Console | None = None
) -> Forecast:
    """Forecast the cost of :func:`run` with the same arguments. Input is checked as there, and nothing is written.

    Raises:
        CollectionError, SettingsError: As :func:`run`.
    """
    settings.require("model", "collection", "output")
    return _Run(settings, console or new_console()).forecast(resume=resume, overwrite=overwrite)


class _Run:
    def __init__(self, settings: RunSettings, console: Console) -> None:
        self.settings = settings
        self.console = console
        self.directory = RunDirectory(settings.output)
        self.base: SentenceTransformer | None = None

    def _check(self, *, resume: bool, overwrite: bool) -> None:
        """Check all input before the folder is made or anything is computed."""
        check_training_arguments(self.settings)
        self.directory.check(self.settings, resume=resume, overwrite=overwrite)
        self.mining_options = MiningOptions.of(self.settings)
        self.query_options = QueryOptions.for_negatives(self.settings)
        self.encoding = Encoding.of(self.settings)
        self.collections = load_collections(self.settings, unasked=self._mined_unasked() if resume else None)
        queries = (query_id for collection in self.collections.train for query_id in collection.queries)
        self.training = settle_batches(self.settings, queries)
        if resume:
            self._require_outputs()
        if not resume or self.directory.finished(TRAIN) is None:  # refreshing mines while training
            make_chain(self.settings.negative_queries, self.query_options).close()
            self._base_model()

    def forecast(self, *, resume: bool, overwrite: bool) -> Forecast:
        """Forecast what is left to do."""
        self._check(resume=resume, overwrite=overwrite)
        return forecast(self.training, self.collections, self._base_model(), self.directory)

    def go(self, *, resume: bool, overwrite: bool) -> dict[str, Any]:
        """Run all stages that are not finished."""
        self._check(resume=resume, overwrite=overwrite)
        for name, (was, now) in self.directory.prepare(self.settings, resume=resume, overwrite=overwrite).items():
            self._say(f"{name} is {now!r} from here on; it was {was!r}")
        self._say_what_it_takes()
        work = dict(zip(STAGES, (self._evaluate_before, self._mine, self._train, self._evaluate_after), strict=True))
        results = {name: self._stage(name, work[name]) for name in STAGES}
        report = self._report(results)
        write_json(self.directory.path / "report.json", report)
        languages = [collection.language for collection in self.collections.evaluate if collection.language]
        write_card(self.directory.path, self.training, report, list(dict.fromkeys(languages)))
        print_scores(self.console, report["scores"]["before"], report["scores"]["after"])
        return report

    def _say_what_it_takes(self) -> None:
        if self.base is None or is_trifle(self.base, self.training, self.collections):
            return  # trained already, or done as soon as said
        print_forecast(self.console, forecast(self.training, self.collections, self.base, self.directory))

    def _stage(self, name: str, work: Any) -> dict[str, Any]:
        title = name.replace("-", " ").capitalize()
        if self.directory.finished(name) is not None:
            self.console.print(f"[dim]{title}: finished before[/dim]")
        else:
            self.console.print(f"[bold]{title}[/bold]")

        def timed() -> dict[str, Any]:
            started = time.perf_counter()
            result = work()
            return {**result, "seconds": round(time.perf_counter() - started, 2)}

        result = self.directory.stage(name, timed, lambda: self._outputs(name))
        # Only after the stage counts as finished: a run that is killed before would resume from these files.
        served = {MINE: self.directory.work / "embeddings" / "before", TRAIN: self.directory.checkpoints}
        if name in served:
            shutil.rmtree(served[name], ignore_errors=True)
        return result

    def _outputs(self, name: str) -> list[Path]:
        """The files of a stage that later stages or the user need."""
        if name == MINE:
            return [self.directory.rows_file(collection.name) for collection in self.collections.train]
        if name == TRAIN:
            return self.directory.model_files()
        folder = self.directory.evaluation("before" if name == EVALUATE_BEFORE else "after")
        return [path for path in folder.rglob("*") if path.is_file()]

    def _require_outputs(self) -> None:
        """Mark finished stages as not done if their files are missing or were changed.

        Raises:
            SettingsError: The model was changed, perhaps on purpose, so it is not replaced.
        """
        records = self.directory.records
        # Version 0.1.0 did not record outputs: at least these files must exist.
        needed = {
            TRAIN: [self.directory.path / "modules.json"],
            MINE: [self.directory.rows_file(collection.name) for collection in self.collections.train],
            EVALUATE_BEFORE: [self.directory.evaluation("before") / EVALUATION],
            EVALUATE_AFTER: [self.directory.evaluation("after") / EVALUATION],
        }
        for name, files in needed.items():
            # Mined rows are not needed once the model is trained.
            if self.directory.finished(name) is None or (name == MINE and self.directory.finished(TRAIN) is not None):
                continue
            missing, changed = records.missing_and_changed(name, files)
            if name == TRAIN and changed and not missing:
                raise SettingsError(
                    f"the model in {self.directory.path} is not as it was trained: {', '.join(changed)}. Put the files "
                    f"back; or remove {records.file(name)} to train again, which replaces the model"
                )
            if missing or changed:
                self._say(f"{name} is done again: gone or changed since is {', '.join(missing + changed)}")
                records.forget(name)
                if name == TRAIN:
                    records.forget(EVALUATE_AFTER)

    def _mined_unasked(self) -> bool | None:
        """Whether the mined rows have queries made of sentences; None if nothing is mined, or must be mined again.

        Training settings, which may change after mining, decide whether any are made by default.
        """
        files = self.directory.mined_files()
        if not files or self.directory.finished(MINE) is None:
            return None
        if any(self.directory.records.missing_and_changed(MINE, files)):
            return None
        return any(is_made(row.query_id) for file in files for row in read_rows(file))

    def _say(self, text: str) -> None:
        """Print a line of a stage, without interpreting markup: names in it come from outside."""
        self.console.print(f"  {text}", markup=False, emoji=False, soft_wrap=True)

    def _base_model(self) -> SentenceTransformer:
        if self.base is None:
            self.base = load_base_model(self.settings.model, max_seq_length=self.settings.max_seq_length)
        return self.base

    def _evaluate_before(self) -> dict[str, Any]:
        return {"scores": self._evaluate(self._base_model(), "before")}

    def _evaluate_after(self) -> dict[str, Any]:
        # Evaluate the saved model, loaded from the folder.
        model = load(str(self.directory.path))
        return {"scores": self._evaluate(model, "after"), "expert_usage": self._expert_usage(model)}

    def _expert_usage(self, model: SentenceTransformer) -> dict[str, Any] | None:
        """The use of the experts by collection; None for a dense model."""
        if not is_moe(model):
            return None
        pairs = [
            (query, collection.name)
            for collection in self.collections.evaluate
            for query in list(collection.queries.values())[:USAGE_QUERIES]
        ]
        usage = expert_usage(model, [query for query, _ in pairs], by=[name for _, name in pairs])
        for layer, expert in usage.dead:
            self._say(f"expert {expert} of layer {layer} is hardly used")
        return usage.to_dict()

    def _evaluate(self, model: SentenceTransformer, when: str) -> dict[str, dict[str, float]]:
        parts: dict[str, CollectionEvaluator] = {}
        scores = {}
        names = distinct_names(self.collections.evaluate)
        corpora = [collection.corpus for collection in self.collections.evaluate]
        with EvaluationCall(model, corpora, show_progress_bar=True) as call:
            for name, collection in zip(names, self.collections.evaluate, strict=True):
                evaluator = CollectionEvaluator(
                    collection,
                    name,
                    metrics=DEFAULT_METRICS,
                    store_dir=self.directory.store(when, collection.corpus_name),
                    options=EvaluationOptions.of(self.settings, write_csv=False),
                )
                scores[collection.name] = evaluator.evaluate_in(call)
                parts[name] = evaluator
        for name, found in scores.items():
            self._say(f"{name}: nDCG@10 {found['ndcg@10']:.4f}")
        # After training, the model is the one in the output folder.
        title = (
            model_name(self.settings.model) if when == "before" else f"{self.directory.path.resolve().name} (trained)"
        )
        save_parts(
            self.directory.evaluation(when), parts, model_name=title, model=model, dtype=self.settings.encode_dtype
        )
        return scores

    def _mine(self) -> dict[str, Any]:
        settings = self.settings
        cross_encoder = load_cross_encoder(settings.cross_encoder)
        accounts = {}
        store = self.directory.query_store_of(settings)
        with make_chain(settings.negative_queries, self.query_options, store=store, cluster=settings) as chain:
            for collection in self.collections.train:
                mined = mine(
                    self._base_model(),
                    collection,
                    self.mining_options,
                    cross_encoder=cross_encoder,
                    negative_queries=chain,
                    query_options=self.query_options,
                    encoding=self.encoding,
                    store_dir=self.directory.store("before", collection.corpus_name),
                )
                write_rows(self.directory.rows_file(collection.name), mined.rows)
                self._say(str(mined.account))
                accounts[collection.name] = mined.account.to_dict()
        return {"accounts": accounts}

    def _train(self) -> dict[str, Any]:
        stage = TrainingStage(self.settings, self.directory, self.collections.train, self._say)
        if self.settings.train_workers is not None:
            from st_clp.run.ray_training import train_on_cluster

            return train_on_cluster(stage)
        model = self._base_model()
        self.base = None  # it is changed now
        return stage.run(model)

    def _report(self, results: dict[str, dict[str, Any]]) -> dict[str, Any]:
        return {
            "settings": self.settings.to_dict(),
            "versions": versions(),
            "machine": machine(),
            "collections": self.collections.describe(),
            "scores": {when: results[f"evaluate-{when}"]["scores"] for when in ("before", "after")},
            "mining": results["mine"]["accounts"],
            "training": {name: value for name, value in results["train"].items() if name != "seconds"},
            "expert_usage": results["evaluate-after"]["expert_usage"],
            "seconds": {name: result["seconds"] for name, result in results.items()},
        }
