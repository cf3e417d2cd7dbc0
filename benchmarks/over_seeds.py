"""Comparing ways to train over seeds: what the scripts that do so share.

For each seed, one epoch of MultipleNegativesRankingLoss on pairs (so that there is something to mine with); then each
variant trains from those same weights. Results are written as they come, and a seed and variant that is there already
is not run again.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from sentence_transformers import (
    SentenceTransformer,
    SentenceTransformerTrainer,
    SentenceTransformerTrainingArguments,
)
from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss
from transformers import TrainerCallback, set_seed

from evaluators import CollectionEvaluator
from st_clp import Collection
from st_clp.encoding import hardware_has_bf16
from st_clp.files import write_json
from st_clp.mining import MiningOptions

BASE, AFTER_PAIRS = "before training", "one epoch of pairs"


def make_parser(description: str | None, *, num_negatives: int, max_seq_length: int) -> argparse.ArgumentParser:
    """The options that every comparison has."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--collection", default="miracl/hi")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--max-queries", type=int, help="train on no more queries than this, the same for every seed")
    parser.add_argument("--max-seq-length", type=int, default=max_seq_length)
    parser.add_argument("--num-negatives", type=int, default=num_negatives)
    parser.add_argument("--scale", type=float, default=20.0)
    parser.add_argument("--output", type=Path, required=True)
    return parser


class Comparison:
    """The results of all seeds and variants, and what they are measured with.

    Args:
        options: As :func:`make_parser` reads them.
        variants: The variants' names.
    """

    def __init__(self, options: argparse.Namespace, variants: Sequence[str]) -> None:
        self.options, self.variants = options, list(variants)
        file = options.output
        self.results: dict[str, dict[str, Any]] = json.loads(file.read_text()) if file.exists() else {}
        train, dev = (Collection.load(options.collection, split=split) for split in ("train", "dev"))
        self.train = train if options.max_queries is None else train.sample(options.max_queries, 0)
        self._evaluator = CollectionEvaluator(dev, name="dev", write_csv=False, write_json=False)

    def run(self, begin: Callable[[SentenceTransformer, int], Callable[[str], dict[str, Any]]]) -> None:
        """Run what is not there yet.

        Args:
            begin: Given the model after the pairs and the seed, mines; gives what trains one variant and returns
                what is to be kept of it besides nDCG@10.
        """
        for seed in self.options.seeds:
            missing = [name for name in self.variants if f"{seed}: {name}" not in self.results]
            if not missing:
                continue
            model = SentenceTransformer(self.options.model)
            model.max_seq_length = self.options.max_seq_length
            self._record(seed, BASE, model)
            loss = MultipleNegativesRankingLoss(model)
            fit(model, pairs_of(self.train), loss, seed=seed, learning_rate=2e-4, batch_size=32)
            train_variant = begin(model, seed)
            self._record(seed, AFTER_PAIRS, model)
            start = {name: tensor.clone() for name, tensor in model.state_dict().items()}
            for name in missing:
                model.load_state_dict(start)
                self._record(seed, name, model, **train_variant(name))

    def scores(self, name: str) -> list[float]:
        """nDCG@10 of each seed."""
        return [values["ndcg"] for values in self.of(name)]

    def of(self, name: str) -> list[dict[str, Any]]:
        """All that was kept of a variant, for each seed."""
        return [self.results[f"{seed}: {name}"] for seed in self.options.seeds]

    def table(self, what: str, against: str, columns: dict[str, Callable[[str], str]]) -> str:
        """Means and ranges over the seeds and each seed's difference from one variant, as a Markdown table.

        Args:
            what: The heading of the variants.
            against: The variant to compare with.
            columns: Heading to a function of the name that gives a cell.
        """
        seeds = len(self.options.seeds)
        heads = [what, f"dev nDCG@10, mean of {seeds} seeds (lowest to highest)", f"against {against}, seed by seed"]
        lines = ["| " + " | ".join([*heads, *columns]) + " |", "| --- " * (len(heads) + len(columns)) + "|"]
        for name in [BASE, AFTER_PAIRS, *self.variants]:
            scores, others = self.scores(name), self.scores(against)
            cells = [name, f"{statistics.mean(scores):.3f} ({min(scores):.3f} to {max(scores):.3f})", ""]
            if name in self.variants and name != against:
                cells[2] = ", ".join(f"{one - other:+.3f}" for one, other in zip(scores, others, strict=True))
            lines.append("| " + " | ".join([*cells, *(cell(name) for cell in columns.values())]) + " |")
        return "\n".join(lines)

    def _record(self, seed: int, name: str, model: SentenceTransformer, **values: Any) -> None:
        self.results[f"{seed}: {name}"] = {"ndcg": self._evaluator(model)["dev_ndcg@10"], **values}
        write_json(self.options.output, self.results)
        print(seed, name, f"{self.results[f'{seed}: {name}']['ndcg']:.4f}", flush=True)


def mining_options(options: argparse.Namespace, seed: int, **others: Any) -> MiningOptions:
    """Negatives drawn from the ranks 2 to 30."""
    return MiningOptions(
        num_negatives=options.num_negatives,
        range_min=2,
        range_max=30,
        sampling_strategy="random",
        seed=seed,
        **others,
    )


def pairs_of(train: Collection) -> Dataset:
    """Every query with every document that answers it."""
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
    batch_size: int,
    epochs: float = 1,
    callbacks: Sequence[TrainerCallback] = (),
) -> None:
    """Train, with the seed set anew."""
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
        trainer = SentenceTransformerTrainer(
            model=model, args=arguments, train_dataset=dataset, loss=loss, callbacks=list(callbacks)
        )
        trainer.train()
    model.eval()
