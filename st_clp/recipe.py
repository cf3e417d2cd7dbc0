"""The whole method as one run: evaluate, mine, convert, train, evaluate again, save.

from st_clp.recipe import run
from st_clp.settings import RunSettings

report = run(RunSettings(model="BAAI/bge-m3", collection=["miracl/ko"], output="bge-m3-ko"))
"""

from __future__ import annotations

import logging
import shutil
import time
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from rich.console import Console
from sentence_transformers import SentenceTransformer
from transformers import set_seed

from evaluators import CollectionEvaluator
from st_clp.data import Collection, CollectionError
from st_clp.mining import MiningOptions, mine
from st_clp.mining.rows import read_rows, to_dataset, write_rows
from st_clp.moe import expert_usage, is_moe, load, train_only, upcycle
from st_clp.report import METRICS, machine, print_scores, versions, write_card
from st_clp.rundir import RunDirectory, slug, write_json
from st_clp.settings import RunSettings, SettingsError
from st_clp.training import check_training_arguments, load_base_model, make_trainer

logger = logging.getLogger(__name__)

EVAL_SPLITS = ("dev", "validation", "valid", "val", "test")
USAGE_QUERIES = 100  # of each collection, to see what the experts do
STAGES = ("evaluate-before", "mine", "train", "evaluate-after")


@dataclass
class Collections:
    """What a run trains and evaluates on."""

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
                    "judgments": sum(map(len, collection.judgments.values())),
                    "left_out": collection.left_out,
                }
                for collection in collections
            }
            for kind, collections in (("train", self.train), ("evaluate", self.evaluate))
        }


def run(
    settings: RunSettings, *, resume: bool = False, overwrite: bool = False, console: Console | None = None
) -> dict[str, Any]:
    """Fine-tune a model for retrieval and evaluate it before and after.

    Args:
        settings: Everything the run depends on.
        resume: Go on with the run that is in the output folder from what it finished.
        overwrite: Replace the run that is in the output folder.
        console: Where to print; None prints to the standard output.

    Returns:
        The report that is in ``report.json`` too.

    Raises:
        SettingsError: A setting, the model or the output folder cannot be used.
        CollectionError: A collection cannot be read or used.
    """
    settings.require("model", "collection", "output")
    return _Run(settings, console or Console()).go(resume=resume, overwrite=overwrite)


class _Run:
    def __init__(self, settings: RunSettings, console: Console) -> None:
        self.settings = settings
        self.console = console
        self.directory = RunDirectory(settings.output)
        self.base: SentenceTransformer | None = None

    def go(self, *, resume: bool, overwrite: bool) -> dict[str, Any]:
        # Everything that may be wrong with the input is found before the folder is made or anything is computed.
        check_training_arguments(self.settings)
        self.mining_options = mining_options(self.settings)
        self.collections = load_collections(self.settings)
        if self.directory.finished("train") is None:
            self._base_model()
        self.directory.prepare(self.settings, resume=resume, overwrite=overwrite)
        results = {
            name: self._stage(name, work)
            for name, work in zip(
                STAGES, (self._evaluate_before, self._mine, self._train, self._evaluate_after), strict=True
            )
        }
        report = self._report(results)
        write_json(self.directory.path / "report.json", report)
        languages = [collection.language for collection in self.collections.evaluate if collection.language]
        write_card(self.directory.path, self.settings, report, list(dict.fromkeys(languages)))
        print_scores(self.console, report["scores"]["before"], report["scores"]["after"])
        return report

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

        return self.directory.stage(name, timed)

    def _base_model(self) -> SentenceTransformer:
        if self.base is None:
            self.base = load_base_model(self.settings.model, max_seq_length=self.settings.max_seq_length)
        return self.base

    def _evaluate_before(self) -> dict[str, Any]:
        return {"scores": self._evaluate(self._base_model(), "before")}

    def _evaluate_after(self) -> dict[str, Any]:
        # What is evaluated is what was saved, as whoever opens the folder gets it.
        model = load(str(self.directory.path))
        return {"scores": self._evaluate(model, "after"), "expert_usage": self._expert_usage(model)}

    def _expert_usage(self, model: SentenceTransformer) -> dict[str, Any] | None:
        """How evenly the experts are used, by collection; None of a dense model."""
        if not is_moe(model):
            return None
        pairs = [
            (query, collection.name)
            for collection in self.collections.evaluate
            for query in list(collection.queries.values())[:USAGE_QUERIES]
        ]
        usage = expert_usage(model, [query for query, _ in pairs], by=[name for _, name in pairs])
        for layer, expert in usage.dead:
            self.console.print(f"  expert {expert} of layer {layer} is hardly used")
        return usage.to_dict()

    def _evaluate(self, model: SentenceTransformer, when: str) -> dict[str, dict[str, float]]:
        scores = {}
        for collection in self.collections.evaluate:
            evaluator = CollectionEvaluator(
                collection,
                name="collection",
                dtype=self.settings.encode_dtype,  # type: ignore[arg-type]
                batch_size=self.settings.encode_batch_size,
                show_progress_bar=True,
                store_dir=self.directory.store(when, collection.corpus_name),
                write_csv=False,
            )
            metrics = evaluator(model)
            evaluator.write_run(self.directory.work / "runs" / when / f"{slug(collection.name)}.trec")
            scores[collection.name] = {name: float(metrics[f"collection_{name}"]) for name in METRICS}
            self.console.print(f"  {collection.name}: nDCG@10 {scores[collection.name]['ndcg@10']:.4f}")
        return scores

    def _mine(self) -> dict[str, Any]:
        settings = self.settings
        accounts = {}
        for collection in self.collections.train:
            mined = mine(
                self._base_model(),
                collection,
                self.mining_options,
                dtype=settings.encode_dtype,  # type: ignore[arg-type]
                batch_size=settings.encode_batch_size,
                store_dir=self.directory.store("before", collection.corpus_name),
            )
            write_rows(self._rows_file(collection), mined.rows)
            self.console.print(f"  {mined.account}")
            accounts[collection.name] = mined.account.to_dict()
        # The base model's embeddings have served; they can be many times as large as the model.
        shutil.rmtree(self.directory.work / "embeddings" / "before", ignore_errors=True)
        return {"accounts": accounts}

    def _rows_file(self, collection: Collection) -> Path:
        return self.directory.work / "mined" / f"{slug(collection.name)}.jsonl"

    def _train(self) -> dict[str, Any]:
        settings = self.settings
        model = self._base_model()
        self.base = None  # it is changed now
        set_seed(settings.seed)  # the routers start at random
        if settings.experts and not is_moe(model):
            upcycle(
                model,
                num_experts=settings.experts,
                num_experts_per_tok=settings.experts_per_token,
                projection=settings.projection,
            )
        trainable = train_only(model, settings.what_trains)
        self.console.print(f"  {trainable}")
        datasets = {
            slug(collection.name): to_dataset(
                read_rows(self._rows_file(collection)),
                num_negatives=settings.num_negatives,
                queries_per_negative=settings.queries_per_negative,
            )
            for collection in self.collections.train
        }
        trainer = make_trainer(model, datasets, settings, self.directory.work / "checkpoints")
        checkpoint = self.directory.last_checkpoint()
        if checkpoint is not None:
            self.console.print(f"  going on from {checkpoint.name}")
        trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
        model.save(str(self.directory.path))
        history = [entry for entry in trainer.state.log_history if "loss" in entry]
        shutil.rmtree(self.directory.work / "checkpoints", ignore_errors=True)
        return {
            "trainable_parameters": trainable.trainable,
            "all_parameters": trainable.total,
            "rows": {name: len(dataset) for name, dataset in datasets.items()},
            "steps": trainer.state.global_step,
            "bf16": trainer.args.bf16,
            "history": history,
        }

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


def mining_options(settings: RunSettings) -> MiningOptions:
    """The settings that are about mining.

    Raises:
        ValueError: A value that cannot be meant.
    """
    values = {item.name: getattr(settings, item.name) for item in fields(MiningOptions) if hasattr(settings, item.name)}
    return MiningOptions(**values)


def load_collections(settings: RunSettings) -> Collections:
    """Find and read the splits to train and to evaluate on.

    Raises:
        CollectionError: A collection cannot be read, has nothing to train on, or nothing to evaluate on.
        SettingsError: A collection is named twice.
    """
    if len(set(settings.collection)) < len(settings.collection):
        raise SettingsError(f"a collection is named twice: {', '.join(settings.collection)}")
    fields = settings.text_field or None
    train, evaluate = [], []
    for source in settings.collection:
        collection = Collection.load(source, split=_train_split(source, settings), text_fields=fields)
        collection.require_positives()
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
        train.append(collection)
    for source in settings.eval_collection:
        split = settings.eval_split or next((name for name in EVAL_SPLITS if name in Collection.splits(source)), None)
        evaluate.append(Collection.load(source, split=split, text_fields=fields))
    if not evaluate:
        raise CollectionError("there is nothing to evaluate on: name --eval-collection, or give --holdout a share")
    for collection in evaluate:
        _require_ids_for_run_files(collection)
    return Collections(train, evaluate)


def _require_ids_for_run_files(collection: Collection) -> None:
    """Refuse ids that a TREC run file cannot carry before anything is encoded, not after."""
    for query_id, documents in collection.judgments.items():
        for kind, identifier in [("query", query_id), *(("document", doc_id) for doc_id in documents)]:
            if identifier.split() != [identifier]:
                raise CollectionError(
                    f"{collection.name}: the {kind} id {identifier!r} is empty or holds white space, which the run "
                    "files of an evaluation cannot carry; give the collection ids without white space"
                )


def _train_split(source: str, settings: RunSettings) -> str | None:
    """The split to train on; None where the source names it itself."""
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
    """(source, split) to evaluate on; None where there is none."""
    splits = Collection.splits(source)
    if not splits and "/" in source:
        # The source names a split, as miracl/ko/train does: look beside it.
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
