"""What each penalty does for retrieval, and to the negatives: nDCG@10 and drift over seeds.

    python benchmarks/penalties.py --model MODEL --collection miracl/hi --seeds 0 1 2 --output penalties.json

For each seed: one epoch of MultipleNegativesRankingLoss on pairs (so that there is something to mine with), ANCE
negatives mined by that model, then one epoch of CLPLoss with each penalty and weight, all from the same weights and
rows. Results are added to the output as they come, and a seed and variant that is there already is not run again.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
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
from st_clp import CLPLoss, Collection
from st_clp.encoding import hardware_has_bf16
from st_clp.mining import MiningOptions, TrainingRow, mine
from st_clp.mining.rows import to_dataset
from st_clp.rundir import write_json

VARIANTS: list[tuple[str, float]] = [
    ("cosine", 0.0), ("cosine", 0.1), ("cosine", 0.3), ("contrastive", 0.1), ("contrastive", 0.3),
]  # fmt: skip
BASE, AFTER_PAIRS = "base", "after one epoch of pairs"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--collection", default="miracl/hi")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--max-queries", type=int, help="Train on no more queries than this, the same for every seed.")
    parser.add_argument("--max-seq-length", type=int, default=128)
    parser.add_argument("--num-negatives", type=int, default=2)
    parser.add_argument("--scale", type=float, default=20.0)
    parser.add_argument("--output", type=Path, required=True)
    options = parser.parse_args()
    results: dict[str, dict[str, Any]] = json.loads(options.output.read_text()) if options.output.exists() else {}
    train, dev = (Collection.load(options.collection, split=split) for split in ("train", "dev"))
    if options.max_queries is not None:
        train = train.sample(options.max_queries, 0)
    for seed in options.seeds:
        run_seed(options, seed, train, dev, results)
    print(table(results, options.seeds))


def run_seed(
    options: argparse.Namespace, seed: int, train: Collection, dev: Collection, results: dict[str, dict[str, Any]]
) -> None:
    """All variants of one seed; each result is written when it is there."""
    names = [f"{kind} {weight}" for kind, weight in VARIANTS]
    if all(f"{seed}: {name}" in results for name in names):
        return

    def record(name: str, **values: float) -> None:
        results[f"{seed}: {name}"] = values
        write_json(options.output, results)
        print(seed, name, values, flush=True)

    model = SentenceTransformer(options.model)
    model.max_seq_length = options.max_seq_length
    evaluator = CollectionEvaluator(dev, name="dev", show_progress_bar=False, write_csv=False)
    record(BASE, ndcg=evaluator(model)["dev_ndcg@10"])
    positives = train.positives()
    documents = train.get_documents(doc_id for found in positives.values() for doc_id in found)
    pairs = Dataset.from_list(
        [
            {"anchor": train.queries[query_id], "positive": documents[doc_id].text}
            for query_id, found in positives.items()
            for doc_id in found
        ]
    )
    fit(model, pairs, losses.MultipleNegativesRankingLoss(model), seed=seed, learning_rate=2e-4, batch_size=32)
    rows = mine(
        model,
        train,
        MiningOptions(
            num_negatives=options.num_negatives, range_min=2, range_max=30, sampling_strategy="random", seed=seed
        ),
        show_progress_bar=False,
    ).rows
    dataset = to_dataset(rows, num_negatives=options.num_negatives)
    record(AFTER_PAIRS, ndcg=evaluator(model)["dev_ndcg@10"], drift=similarity_to_own_query(model, rows))
    start = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for (kind, weight), name in zip(VARIANTS, names, strict=True):
        if f"{seed}: {name}" in results:
            continue
        model.load_state_dict(start)
        loss = CLPLoss(model, scale=options.scale, penalty=kind, penalty_weight=weight)
        fit(model, dataset, loss, seed=seed, learning_rate=1e-4, batch_size=16)
        record(name, ndcg=evaluator(model)["dev_ndcg@10"], drift=similarity_to_own_query(model, rows))


def fit(
    model: SentenceTransformer,
    dataset: Dataset,
    loss: torch.nn.Module,
    *,
    seed: int,
    learning_rate: float,
    batch_size: int,
) -> None:
    """One epoch."""
    set_seed(seed)
    with tempfile.TemporaryDirectory() as folder:
        arguments = SentenceTransformerTrainingArguments(
            output_dir=folder,
            num_train_epochs=1,
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
        SentenceTransformerTrainer(model=model, args=arguments, train_dataset=dataset, loss=loss).train()
    model.eval()


def similarity_to_own_query(model: SentenceTransformer, rows: list[TrainingRow]) -> float:
    """The mean cosine similarity of the negatives to the queries that they answer."""
    pairs = sorted({(n.text, query) for row in rows for n in row.negatives for query in n.queries})
    documents = model.encode_document([text for text, _ in pairs], convert_to_tensor=True, show_progress_bar=False)
    queries = model.encode_query([query for _, query in pairs], convert_to_tensor=True, show_progress_bar=False)
    return float(torch.nn.functional.cosine_similarity(documents, queries).mean())


def table(results: dict[str, dict[str, Any]], seeds: list[int]) -> str:
    """Means and ranges over the seeds, as a Markdown table."""
    lines = [
        f"| trained with | dev nDCG@10, mean of {len(seeds)} seeds (lowest to highest) "
        "| similarity of negatives to their queries |",
        "| --- | --- | --- |",
    ]
    for name in [BASE, AFTER_PAIRS, *(f"{kind} {weight}" for kind, weight in VARIANTS)]:
        found = [results[f"{seed}: {name}"] for seed in seeds]
        scores = [values["ndcg"] for values in found]
        drift = [values["drift"] for values in found if "drift" in values]
        lines.append(
            f"| {name} | {statistics.mean(scores):.3f} ({min(scores):.3f} to {max(scores):.3f}) "
            f"| {f'{statistics.mean(drift):.3f}' if drift else ''} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
