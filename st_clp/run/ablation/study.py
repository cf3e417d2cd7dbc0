"""Run an ablation: every variant with every seed. Shared work is done once, and results are kept."""

from __future__ import annotations

import copy
import dataclasses
import hashlib
import json
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console
from sentence_transformers import SentenceTransformer

from evaluators import CollectionEvaluator
from evaluators.base import EvaluationCall, save_parts
from evaluators.collection_evaluator import distinct_names
from evaluators.evaluation import MANIFEST, Evaluation, read_evaluation
from evaluators.page import write_page
from st_clp.data import Collection
from st_clp.files import read_json, whole_file, write_json
from st_clp.mining import TrainingRow, mine
from st_clp.mining.rows import read_rows, write_rows
from st_clp.options import DEFAULT_METRICS, HERE, Encoding, EvaluationOptions, MiningOptions, QueryOptions
from st_clp.queries import make_chain
from st_clp.run.ablation.loop import SharedWeights, Trained, joined, train
from st_clp.run.ablation.table import AblationTable, Cell, make_table
from st_clp.run.ablation.variants import BASE, Variant, default_variants, with_rate
from st_clp.run.averaging import METRIC, WeightAverage, choose_share, evaluators_of, hold_out
from st_clp.run.folder import slug
from st_clp.run.modelling import load_base_model, load_cross_encoder, stored_precision
from st_clp.run.splits import in_turn, load_collections, makes_unasked, settle_batches, with_sentence_queries
from st_clp.settings import RunSettings, SettingsError
from st_clp.terminal import duration, new_console

RATES = (1e-5, 3e-5, 1e-4, 3e-4)  # from what suits all weights of a large model to what suits batches of documents
RECORD = "ablation.json"
CELL = "cell.json"


def ablate(
    settings: RunSettings,
    variants: Sequence[Variant] | None = None,
    *,
    seeds: int = 3,
    learning_rates: Sequence[float] = RATES,
    unseen: Sequence[str] = (),
    overwrite: bool = False,
    console: Console | None = None,
) -> AblationTable:
    """Train every variant with every seed, evaluate them, and test the differences.

    All variants have the same training queries, the same held-out queries by which their learning rates are chosen
    (with the first seed, among the same rates), and the same evaluation. Results are kept in ``settings.output``; the
    same call resumes, and seeds and variants may be added.

    Args:
        settings: The settings that all variants share; ``seed`` is the first seed.
        variants: The variants; None takes :func:`default_variants`.
        seeds: How many seeds each is trained with.
        learning_rates: The rates to choose among.
        unseen: Collections that are only evaluated on, to see what training does to other languages.
        overwrite: Start over if the folder holds an ablation.
        console: Where to print; None prints to the standard output.

    Returns:
        The table, which is also in ``table.md``, ``table.json`` and ``table.tex``.

    Raises:
        CollectionError: A collection cannot be read or used.
        SettingsError: A setting cannot be used, or the folder holds results of other settings.
    """
    settings.require("model", "collection", "output")
    if settings.ray is not None:
        raise SettingsError("ray: an ablation works in this process; leave ray and workers out")
    if seeds < 1:
        raise SettingsError(f"seeds must be at least 1, got {seeds}")
    if not learning_rates or any(not 0 < rate < 1 for rate in learning_rates):
        raise SettingsError(f"learning rates must be above 0 and below 1, got {list(learning_rates)}")
    chosen = default_variants(settings) if variants is None else list(variants)
    study = Ablation(settings, chosen, seeds, list(learning_rates), list(unseen), console or new_console())
    return study.go(overwrite=overwrite)


class Ablation:
    """One ablation; see :func:`ablate`."""

    def __init__(
        self,
        settings: RunSettings,
        variants: Sequence[Variant],
        seeds: int,
        rates: Sequence[float],
        unseen: Sequence[str],
        console: Console,
    ) -> None:
        self.settings, self.variants, self.rates, self.console = settings, variants, rates, console
        self.seeds = [settings.seed + number for number in range(seeds)]
        self.folder = Path(settings.output)
        self._unseen = list(unseen)
        self._options = EvaluationOptions.of(settings, write_csv=False, **HERE)

    def go(self, *, overwrite: bool) -> AblationTable:
        """Do what is missing, and make the table."""
        # Every variant adds its own queries made of sentences.
        collections = load_collections(dataclasses.replace(self.settings, sentence_queries=0))
        self.train = {slug(collection.name): collection for collection in collections.train}
        unseen = [self._load_unseen(source) for source in self._unseen]
        self.evaluate = collections.evaluate + unseen
        names = distinct_names(self.evaluate)
        self.names, self.unseen = names, names[len(collections.evaluate) :]
        self.base = load_base_model(self.settings.model, max_seq_length=self.settings.max_seq_length)
        self._begin(overwrite)  # only now: results are not removed for input that cannot be used
        self.weights = SharedWeights(self.folder / "weights", self.variants)
        evaluations = {BASE: [self._base_evaluation()]}
        cells: dict[str, list[Cell]] = {}
        for variant in self.variants:
            rate, kept = self._rate(variant)
            for seed in self.seeds:
                cell = self._cell(variant, rate, seed, kept if seed == self.seeds[0] else None)
                cells.setdefault(variant.name, []).append(cell)
                evaluations.setdefault(variant.name, []).append(read_evaluation(self._place(variant.name, seed)))
        table = make_table(evaluations, cells, unseen=self.unseen, seed=self.settings.seed)
        self._write(table, evaluations)
        self.weights.clear()
        return table

    def _begin(self, overwrite: bool) -> None:
        """Make the folder, or refuse one with other contents."""
        record = self.folder / RECORD
        shared = {name: value for name, value in self.settings.to_dict().items() if name != "learning_rate"}
        now = json.loads(json.dumps({"settings": shared, "learning_rates": list(self.rates), "unseen": self._unseen}))
        if overwrite and record.is_file():
            shutil.rmtree(self.folder)
        if record.is_file():
            was = read_json(record)
            alike = dataclasses.replace(self.settings, learning_rate=None)
            changed = _changed(was.get("settings", {}), alike, where=str(record))
            for name in ("learning_rates", "unseen"):
                if was.get(name) != now[name]:
                    changed.append(f"{name} was {was.get(name)!r}, now {now[name]!r}")
            if changed:
                raise SettingsError(
                    f"{self.folder} holds an ablation with other settings ({'; '.join(changed)}); go on with the same, "
                    "begin anew with --overwrite, or name another --output"
                )
        elif self.folder.exists() and any(self.folder.iterdir()):
            raise SettingsError(f"{self.folder} is not empty and holds no ablation; name another --output")
        self.folder.mkdir(parents=True, exist_ok=True)
        write_json(record, now)

    def _load_unseen(self, source: str) -> Collection:
        from st_clp.run.splits import find_eval_split

        split = find_eval_split(source, self.settings.eval_split)
        return Collection.load(source, split=split, text_fields=self.settings.text_field or None)

    def _base_evaluation(self) -> Evaluation:
        folder = self.folder / BASE
        if not (folder / MANIFEST).is_file():
            started = time.perf_counter()
            self._evaluate(self.base, BASE, folder, stored=True)
            self._say(f"{BASE}: {self._scores(folder)} ({duration(time.perf_counter() - started)})")
        return read_evaluation(folder)

    def _evaluate(self, model: SentenceTransformer, title: str, folder: Path, *, stored: bool = False) -> None:
        parts = {}
        corpora = [collection.corpus for collection in self.evaluate]
        with EvaluationCall(model, corpora, show_progress_bar=True) as call:
            for name, collection in zip(self.names, self.evaluate, strict=True):
                store = self._store(collection) if stored else None
                part = CollectionEvaluator(collection, name, DEFAULT_METRICS, store_dir=store, options=self._options)
                part.evaluate_in(call)
                parts[name] = part
        save_parts(folder, parts, model_name=title, model=model, dtype=self.settings.encode_dtype)

    def _store(self, collection: Collection) -> Path:
        return self.folder / "embeddings" / slug(collection.corpus_name)

    def _place(self, name: str, seed: int) -> Path:
        return self.folder / "variants" / name / f"seed-{seed}"

    def _rate(self, variant: Variant) -> tuple[float, SentenceTransformer | None]:
        """(the rate that scores best on the held-out queries; the model that it trained, if that was done now)."""
        if len(self.rates) == 1:
            return self.rates[0], None
        best: tuple[float, float, SentenceTransformer | None] = (-1.0, 0.0, None)
        for rate in self.rates:
            record = self.folder / "variants" / variant.name / f"rate-{rate:g}.json"
            settings = with_rate(variant, rate, self.seeds[0])
            found, model = self._read(record, settings), None
            if found is None:
                model, found = self._train(variant, settings)
                write_json(record, found)
                self._say(f"{variant.name}, learning rate {rate:g}: {found['held_out']:.4f} on queries held out")
            if found["held_out"] > best[0]:
                best = found["held_out"], rate, model
        return best[1], best[2]

    def _cell(self, variant: Variant, rate: float, seed: int, trained: SentenceTransformer | None) -> Cell:
        """A variant trained with a seed and evaluated, or read if that was done before."""
        folder = self._place(variant.name, seed)
        settings = with_rate(variant, rate, seed)
        found = self._read(folder / CELL, settings)
        if found is None:
            record = self.folder / "variants" / variant.name / f"rate-{rate:g}.json"
            found = self._read(record, settings) if trained is not None else None
            if trained is None or found is None:
                trained, found = self._train(variant, settings)
            self._evaluate(trained, variant.name, folder)
            # Written last: a cell with a record is complete.
            write_json(folder / CELL, found)
            self._say(f"{variant.name}, seed {seed}: {self._scores(folder)} ({duration(found['seconds'])} of training)")
        return Cell(rate, found["share"], found["held_out"], found["steps"], found["seconds"], found["peak_memory"])

    def _read(self, record: Path, settings: RunSettings) -> dict[str, Any] | None:
        """Read a record; None if there is none.

        Raises:
            SettingsError: It is of other settings.
        """
        if not record.is_file():
            return None
        found = read_json(record)
        if changed := _changed(found.get("settings", {}), settings, where=str(record)):
            raise SettingsError(
                f"{record.parent} holds results of other settings ({'; '.join(changed)}): give the variant another "
                "name, or remove the folder"
            )
        return found

    def _train(self, variant: Variant, settings: RunSettings) -> tuple[SentenceTransformer, dict[str, Any]]:
        """(a trained copy of the base; its record)."""
        mined = {name: self._mined(name, collection, settings) for name, collection in self.train.items()}
        # With the study's seed: all variants and seeds have the same held-out queries.
        parts = {name: hold_out(rows, self.settings.seed) for name, rows in mined.items()}
        rows, held_out = ({name: part[which] for name, part in parts.items()} for which in (0, 1))
        if len(self.rates) > 1 and not any(held_out.values()):
            raise SettingsError("too few training queries to hold any out: give one rate in --learning-rates")
        model = copy.deepcopy(self.base)
        trained = self.weights.load(model, settings)
        if trained is None:
            trained = self._train_anew(variant, model, settings, rows)
            self.weights.keep(model, settings, trained)
        share, score = self._average(model, settings, rows, held_out)
        stored_precision(self.base).restore(model)  # what a run would have saved
        return model, self._note(settings, trained, share, score)

    def _train_anew(
        self,
        variant: Variant,
        model: SentenceTransformer,
        settings: RunSettings,
        rows: Mapping[str, Sequence[TrainingRow]],
    ) -> Trained:
        again: Callable[[], Mapping[str, Sequence[TrainingRow]]] | None = None
        if settings.steps_between_refreshes == "epoch":

            def again() -> Mapping[str, Sequence[TrainingRow]]:
                kept = {name: {row.query_id for row in found} for name, found in rows.items()}
                new = {name: self._mine(model, collection, settings, None) for name, collection in self.train.items()}
                return {name: [row for row in new[name] if row.query_id in kept[name]] for name in new}

        called = f"{variant.name}, seed {settings.seed}, rate {settings.learning_rate:g}"
        settled = settle_batches(settings, (row.query_id for found in rows.values() for row in found))
        parts = [train(model, part, settled, mine_again=again, progress=called) for part in in_turn(rows, settled)]
        return joined(parts)

    def _average(
        self,
        model: SentenceTransformer,
        settings: RunSettings,
        rows: Mapping[str, Sequence[TrainingRow]],
        held_out: Mapping[str, Sequence[TrainingRow]],
    ) -> tuple[float, float | None]:
        """(chosen share of the trained weights; nDCG@10 on the held-out queries)."""
        share = settings.share_of_trained
        if share == "auto":
            chosen = choose_share(model, WeightAverage(model, self.base), held_out, rows, self._options)
            return chosen.share, chosen.scores.get(chosen.share)
        if share != 1:
            WeightAverage(model, self.base).set(share)
        found = [one.evaluate(model)[METRIC] for one in evaluators_of(held_out, rows, self._options)]
        return share, sum(found) / len(found) if found else None

    @staticmethod
    def _note(settings: RunSettings, trained: Trained, share: float, score: float | None) -> dict[str, Any]:
        return {
            "settings": settings.to_dict(),
            "share": share,
            "held_out": score,
            "steps": trained.steps,
            "seconds": round(trained.seconds, 2),
            "peak_memory": trained.peak_memory,
            "losses": trained.losses,
        }

    def _mined(self, name: str, collection: Collection, settings: RunSettings) -> list[TrainingRow]:
        """The rows mined by the base with these settings, shared by all variants that mine alike."""
        unasked = makes_unasked(settings)
        what = {
            "mining": asdict(MiningOptions.of(settings)),
            "queries": asdict(QueryOptions.for_negatives(settings)),
            "sources": settings.negative_queries,
            "cross_encoder": settings.cross_encoder,
            **({"sentence_queries": settings.sentence_queries} if settings.sentence_queries or unasked else {}),
        }
        digest = hashlib.blake2b(json.dumps(what, sort_keys=True).encode(), digest_size=6).hexdigest()
        file = self.folder / "mined" / digest / f"{name}.jsonl"
        if not file.is_file():
            write_rows(file, self._mine(self.base, collection, settings, self._store(collection)))
        return read_rows(file)

    def _mine(
        self, model: SentenceTransformer, collection: Collection, settings: RunSettings, store: Path | None
    ) -> list[TrainingRow]:
        queries = QueryOptions.for_negatives(settings)
        kept = settings.query_store or self.folder / "queries.sqlite"
        with make_chain(settings.negative_queries, queries, store=kept, show_progress_bar=False) as chain:
            return mine(
                model,
                with_sentence_queries(collection, settings),
                MiningOptions.of(settings),
                cross_encoder=load_cross_encoder(settings.cross_encoder),
                negative_queries=chain,
                query_options=queries,
                encoding=Encoding.of(settings, show_progress_bar=False),
                store_dir=store,
            ).rows

    def _write(self, table: AblationTable, evaluations: Mapping[str, Sequence[Evaluation]]) -> None:
        for name, text in (("table.md", table.markdown()), ("table.json", table.json()), ("table.tex", table.latex())):
            with whole_file(self.folder / name) as file:
                file.write(text)
        write_page(self.folder / "report.html", [found[0] for found in evaluations.values()], title="Ablation")

    def _scores(self, folder: Path) -> str:
        results = read_evaluation(folder).results
        return ", ".join(f"{name} {found.scores[METRIC]:.4f}" for name, found in results.items())

    def _say(self, text: str) -> None:
        self.console.print(text, markup=False, emoji=False, soft_wrap=True)


def _changed(was: Mapping[str, Any], now: RunSettings, *, where: str) -> list[str]:
    """Settings that affect results and differ from a record, with both values.

    Settings that the record's version did not have count as their defaults.
    """
    differences = RunSettings.from_dict(RunSettings.as_recorded(was), where=where).differences(now)
    return [
        f"{name} was {before!r}, now {after!r}"
        for name, (before, after) in differences.items()
        if RunSettings.__dataclass_fields__[name].metadata["changes_results"]
    ]
