"""BEIR and NanoBEIR: English retrieval in many domains."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from evaluators.benchmark import BenchmarkEvaluator
from evaluators.runs import file_part
from st_clp.data import Collection, CollectionError

CQADUPSTACK_PARTS = tuple(
    "android english gaming gis mathematica physics programmers stats tex unix webmasters wordpress".split()
)

# The public datasets of BEIR -> the ir_datasets ids of what the benchmark reports. For MS MARCO that is the dev split,
# and for Touché 2020 the second version of its judgments.
BEIR_DATASETS: Mapping[str, str] = {
    "msmarco": "beir/msmarco/dev",
    "trec-covid": "beir/trec-covid",
    "nfcorpus": "beir/nfcorpus/test",
    "nq": "beir/nq",
    "hotpotqa": "beir/hotpotqa/test",
    "fiqa": "beir/fiqa/test",
    "arguana": "beir/arguana",
    "webis-touche2020": "beir/webis-touche2020/v2",
    "cqadupstack": "beir/cqadupstack",
    "quora": "beir/quora/test",
    "dbpedia-entity": "beir/dbpedia-entity/test",
    "scidocs": "beir/scidocs",
    "fever": "beir/fever/test",
    "climate-fever": "beir/climate-fever",
    "scifact": "beir/scifact/test",
}
SPLITS = ("train", "dev", "test")
NANO_BEIR_DATASETS = tuple(
    f"nano-beir/{name}"
    for name in "arguana climate-fever dbpedia-entity fever fiqa hotpotqa msmarco nfcorpus nq quora scidocs scifact "
    "webis-touche2020".split()
)


class BEIREvaluator(BenchmarkEvaluator):
    """How well a model retrieves on BEIR's datasets, on each and on average (Thakur et al., 2021).

    The metrics are ``beir_scifact_ndcg@10`` and the like, and ``beir_mean_ndcg@10`` over the datasets, which is the
    primary one. CQADupStack is the mean of its 12 parts and counts as one dataset.

    Args:
        datasets: Any of

            - a dataset's name, such as ``"scifact"``, for the split that BEIR reports: test, and dev for MS MARCO;
            - ``"nano-beir/scifact"``, its small sample from NanoBEIR, called ``nano_scifact`` in the metrics;
            - an ir_datasets id under ``beir/``, such as ``"beir/fever/dev"``, called ``fever_dev``;
            - a BEIR folder (``corpus.jsonl``, ``queries.jsonl``, ``qrels/SPLIT.tsv``), called what the folder is
              called; or a folder of such folders, which is averaged over them as CQADupStack is;

            or one text instead of a list: ``"all"`` for the 15 public datasets of BEIR, ``"nano-beir"`` for the 13 of
            NanoBEIR.
        split: Which split's judgments to use, for the datasets that do not name one. None: those that BEIR reports, and
            of a folder ``test`` or its only one.
        name: Goes before every metric. None: ``beir``, and ``beir_train`` where ``split`` is train.
        **settings: All other arguments of :class:`BenchmarkEvaluator`.

    Raises:
        CollectionError: A dataset is not known, does not have the split, or cannot be read.
        ValueError: Two datasets would have one name, or a setting is wrong.
    """

    def __init__(
        self, datasets: Sequence[str] | str, split: str | None = None, name: str | None = None, **settings: Any
    ) -> None:
        if name is None:
            name = "beir" if split is None else f"beir_{split}"
        self.datasets = _expand(datasets)
        self.split = split
        collections: dict[str, Collection | dict[str, Collection]] = {}
        for dataset in self.datasets:
            key = _key(dataset)
            if key in collections:
                raise ValueError(
                    f"two datasets would both be called {key}: {', '.join(self.datasets)}; rename a folder, or give "
                    "BenchmarkEvaluator the collections under names of your own"
                )
            collections[key] = _load(dataset, split)
        super().__init__(collections, name, **settings)


def _expand(datasets: Sequence[str] | str) -> tuple[str, ...]:
    if isinstance(datasets, str):
        groups = {"all": tuple(BEIR_DATASETS), "nano-beir": NANO_BEIR_DATASETS}
        return groups.get(datasets, (datasets,))
    return tuple(str(dataset) for dataset in datasets)


def _key(dataset: str) -> str:
    """What a dataset is called in the metrics."""
    if dataset in BEIR_DATASETS:
        return dataset
    for prefix, short in (("beir/", ""), ("nano-beir/", "nano_")):
        if dataset.startswith(prefix) and not Path(dataset).is_dir():
            return file_part(short + dataset.removeprefix(prefix))
    return file_part(Path(dataset).resolve().name)


def _load(dataset: str, split: str | None) -> Collection | dict[str, Collection]:
    if Path(dataset).is_dir():
        return _load_folder(Path(dataset), split)
    if dataset not in BEIR_DATASETS and not dataset.startswith(("beir/", "nano-beir/")):
        nearest = difflib.get_close_matches(dataset, [*BEIR_DATASETS, *NANO_BEIR_DATASETS], n=3, cutoff=0.5)
        hint = f"did you mean {' or '.join(nearest)}? " if nearest else ""
        raise CollectionError(
            f"unknown BEIR dataset {dataset!r}, and no folder of that name; {hint}known are "
            f"{', '.join(BEIR_DATASETS)}, and nano-beir/… for the small ones"
        )
    source = BEIR_DATASETS.get(dataset, dataset)
    if source == BEIR_DATASETS["cqadupstack"]:
        return {part: _load_irds(f"{source}/{part}", split) for part in CQADUPSTACK_PARTS}
    if dataset not in BEIR_DATASETS and dataset.endswith(tuple(f"/{name}" for name in SPLITS)):
        return Collection.load(dataset)
    return _load_irds(source, split)


def _load_irds(source: str, split: str | None) -> Collection:
    base, _, named = source.rpartition("/")
    base = base if named in SPLITS else source
    if split is None:
        return Collection.load(source)
    splits = [name for name in Collection.splits(base) if name in SPLITS]
    if split in splits:
        return Collection.load(base, split=split)
    # The judgments of a dataset without named splits are those of its test split.
    if split == "test" and not splits:
        return Collection.load(source)
    raise CollectionError(f"{base} has no split {split!r}; it has {', '.join(splits) or 'test'}")


def _load_folder(folder: Path, split: str | None) -> Collection | dict[str, Collection]:
    parts = sorted(path for path in folder.iterdir() if _is_collection(path))
    if _is_collection(folder) or not parts:
        return _load_collection(folder, split)
    return {file_part(part.name): _load_collection(part, split) for part in parts}


def _load_collection(folder: Path, split: str | None) -> Collection:
    # BEIR reports the test split. Where there is none, the reader takes the only one or says which there are.
    if split is None and "test" in Collection.splits(str(folder)):
        split = "test"
    return Collection.load(str(folder), split=split)


def _is_collection(folder: Path) -> bool:
    return any((folder / f"corpus.jsonl{ending}").is_file() for ending in ("", ".gz"))
