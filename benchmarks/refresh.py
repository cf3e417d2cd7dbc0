"""What refreshing the negatives while training does for retrieval: nDCG@10 over seeds.

    python benchmarks/refresh.py --model MODEL --collection miracl/hi --seeds 0 1 2 --output refresh.json

For each seed: one epoch of MultipleNegativesRankingLoss on pairs (so that there is something to mine with), negatives
mined by that model, then CLPLoss with each way to refresh them, all from the same weights and rows. Results are added
to the output as they come, and a seed and variant that is there already is not run again.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from sentence_transformers import (
    SentenceTransformer,
    SentenceTransformerTrainer,
    SentenceTransformerTrainingArguments,
    losses,
)
from transformers import set_seed

from evaluators import CollectionEvaluator
from st_clp import AnceCallback, CLPLoss, Collection
from st_clp.encoding import hardware_has_bf16
from st_clp.mining import MiningOptions, TrainingRow, mine
from st_clp.mining.rows import to_dataset
from st_clp.rundir import write_json

BASE, AFTER_PAIRS = "base", "after one epoch of pairs"


def variants(every: int) -> dict[str, dict[str, Any] | None]:
    """Name to the arguments of AnceCallback; None mines once."""
    return {
        "mined once": None,
        "refreshed each epoch": {"every": "epoch"},
        f"refreshed every {every} steps": {"every": every},
        f"refreshed every {every} steps, beside the training": {"every": every, "asynchronous": True},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--collection", default="miracl/hi")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--max-seq-length", type=int, default=96)
    parser.add_argument("--max-train-queries", type=int)
    parser.add_argument("--num-negatives", type=int, default=1)
    parser.add_argument("--epochs", type=float, default=2)
    parser.add_argument("--every", type=int, default=18, help="steps between refreshes")
    parser.add_argument("--scale", type=float, default=20.0)
    parser.add_argument("--output", type=Path, required=True)
    options = parser.parse_args()
    results: dict[str, dict[str, Any]] = json.loads(options.output.read_text()) if options.output.exists() else {}
    train, dev = (Collection.load(options.collection, split=split) for split in ("train", "dev"))
    if options.max_train_queries is not None:
        train = train.sample(options.max_train_queries, 0)
    for seed in options.seeds:
        run_seed(options, seed, train, dev, results)
    print(table(results, options.seeds, list(variants(options.every))))


def run_seed(
    options: argparse.Namespace, seed: int, train: Collection, dev: Collection, results: dict[str, dict[str, Any]]
) -> None:
    """All variants of one seed; each result is written when it is there."""
    ways = variants(options.every)
    if all(f"{seed}: {name}" in results for name in ways):
        return

    def record(name: str, **values: Any) -> None:
        results[f"{seed}: {name}"] = values
        write_json(options.output, results)
        print(seed, name, {key: value for key, value in values.items() if key != "refreshes"}, flush=True)

    model = SentenceTransformer(options.model)
    model.max_seq_length = options.max_seq_length
    evaluator = CollectionEvaluator(dev, name="dev", show_progress_bar=False, write_csv=False)
    record(BASE, ndcg=evaluator(model)["dev_ndcg@10"])
    fit(model, pairs_of(train), losses.MultipleNegativesRankingLoss(model), seed=seed, learning_rate=2e-4, epochs=1)
    mining = MiningOptions(
        num_negatives=options.num_negatives, range_min=2, range_max=30, sampling_strategy="random", seed=seed
    )
    rows = mine(model, train, mining, show_progress_bar=False).rows
    record(AFTER_PAIRS, ndcg=evaluator(model)["dev_ndcg@10"])
    start = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for name, way in ways.items():
        if f"{seed}: {name}" in results:
            continue
        model.load_state_dict(start)
        began = time.perf_counter()
        refreshes = train_with(model, train, rows, mining, way, options, seed)
        seconds = time.perf_counter() - began
        record(name, ndcg=evaluator(model)["dev_ndcg@10"], seconds=round(seconds, 1), refreshes=refreshes)


def train_with(
    model: SentenceTransformer,
    train: Collection,
    rows: list[TrainingRow],
    mining: MiningOptions,
    way: dict[str, Any] | None,
    options: argparse.Namespace,
    seed: int,
) -> list[dict[str, Any]]:
    """Train with CLPLoss; returns the account of the refreshes."""
    loss = CLPLoss(model, scale=options.scale)
    fitting: dict[str, Any] = {"seed": seed, "learning_rate": 1e-4, "epochs": options.epochs, "batch_size": 16}
    if way is None:
        fit(model, to_dataset(rows, num_negatives=mining.num_negatives), loss, **fitting)
        return []
    details = to_dataset(rows, num_negatives=mining.num_negatives, details=True)
    ance = AnceCallback(train, details, options=mining, **way)
    fit(model, ance.train_dataset, loss, ance=ance, **fitting)
    return ance.refreshes


def pairs_of(train: Collection) -> Dataset:
    """The training queries with each of their relevant documents."""
    positives = train.positives()
    documents = train.get_documents(doc_id for found in positives.values() for doc_id in found)
    return Dataset.from_list(
        [
            {"anchor": train.queries[query_id], "positive": documents[doc_id].text}
            for query_id, found in positives.items()
            for doc_id in found
        ]
    )


def fit(
    model: SentenceTransformer,
    dataset: Any,
    loss: torch.nn.Module,
    *,
    seed: int,
    learning_rate: float,
    epochs: float,
    batch_size: int = 32,
    ance: AnceCallback | None = None,
) -> None:
    """Train, with a seed of its own."""
    set_seed(seed)
    with tempfile.TemporaryDirectory() as folder:
        arguments = SentenceTransformerTrainingArguments(
            output_dir=folder,
            num_train_epochs=epochs,
            per_device_train_batch_size=batch_size,
            learning_rate=learning_rate,
            warmup_steps=0.1,
            bf16=hardware_has_bf16(model.device),
            use_cpu=model.device.type == "cpu",
            seed=seed,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
        )
        SentenceTransformerTrainer(
            model=model,
            args=arguments,
            train_dataset=dataset,
            loss=loss,
            callbacks=[ance] if ance is not None else None,
        ).train()
    model.eval()


def table(results: dict[str, dict[str, Any]], seeds: list[int], names: list[str]) -> str:
    """Means and ranges over the seeds, as a Markdown table."""
    lines = [
        f"| trained with | dev nDCG@10, mean of {len(seeds)} seeds (lowest to highest) | against mined once, seed by "
        "seed | refreshes used | negatives changed by a refresh | above their positive, first to last | seconds |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for name in [BASE, AFTER_PAIRS, *names]:
        found = [results[f"{seed}: {name}"] for seed in seeds]
        scores = [values["ndcg"] for values in found]
        cells = [name, f"{statistics.mean(scores):.3f} ({min(scores):.3f} to {max(scores):.3f})", *[""] * 5]
        if name in names:
            cells[6] = f"{statistics.mean(values['seconds'] for values in found):.0f}"
        if name in names[1:]:
            once = [results[f"{seed}: {names[0]}"]["ndcg"] for seed in seeds]
            cells[2] = ", ".join(f"{score - other:+.3f}" for score, other in zip(scores, once, strict=True))
            used = [[r for r in values["refreshes"] if r["used_from"] is not None] for values in found]
            cells[3] = ", ".join(str(len(refreshes) - 1) for refreshes in used)
            changes = [refresh["changed"] for refreshes in used for refresh in refreshes[1:]]
            cells[4] = f"{statistics.mean(changes):.0%}" if changes else ""
            ends = [statistics.mean(refreshes[i]["above_positive"] for refreshes in used) for i in (0, -1)]
            cells[5] = f"{ends[0]:.0%} to {ends[1]:.0%}"
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
