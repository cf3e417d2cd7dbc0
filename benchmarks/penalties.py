"""What each penalty does for retrieval, and to the negatives: nDCG@10 and drift over seeds.

    python benchmarks/penalties.py --model MODEL --collection miracl/hi --seeds 0 1 2 --output penalties.json

After one epoch of pairs (see over_seeds.py) the model mines ANCE negatives, and CLPLoss trains one epoch with each
penalty and weight, all from the same weights and rows.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from typing import Any

import torch
from over_seeds import BASE, Comparison, fit, make_parser, mining_options
from sentence_transformers import SentenceTransformer

from st_clp import CLPLoss
from st_clp.mining import TrainingRow, mine
from st_clp.mining.rows import to_dataset

VARIANTS: dict[str, tuple[str, float]] = {
    "penalty weight 0": ("cosine", 0.0),
    "cosine 0.1": ("cosine", 0.1),
    "cosine 0.3": ("cosine", 0.3),
    "contrastive 0.1": ("contrastive", 0.1),
    "contrastive 0.3": ("contrastive", 0.3),
}


def main() -> None:
    options = make_parser(__doc__, num_negatives=2, max_seq_length=128).parse_args()
    comparison = Comparison(options, list(VARIANTS))

    def begin(model: SentenceTransformer, seed: int) -> Callable[[str], dict[str, Any]]:
        rows = mine(model, comparison.train, mining_options(options, seed), show_progress_bar=False).rows
        dataset = to_dataset(rows, num_negatives=options.num_negatives)
        before = similarity_to_own_query(model, rows)

        def train(name: str) -> dict[str, Any]:
            kind, weight = VARIANTS[name]
            loss = CLPLoss(model, scale=options.scale, penalty=kind, penalty_weight=weight)
            fit(model, dataset, loss, seed=seed, learning_rate=1e-4, batch_size=16)
            return {"drift": similarity_to_own_query(model, rows), "drift_before": before}

        return train

    comparison.run(begin)

    def drift(name: str) -> str:
        values = comparison.of(name if name in VARIANTS else next(iter(VARIANTS)))
        key = "drift" if name in VARIANTS else "drift_before"
        return "" if name == BASE else f"{statistics.mean(found[key] for found in values):.3f}"

    columns = {"similarity of negatives to their queries": drift}
    print(comparison.table("trained with", next(iter(VARIANTS)), columns))


def similarity_to_own_query(model: SentenceTransformer, rows: list[TrainingRow]) -> float:
    """The mean cosine similarity of the negatives to the queries that they answer."""
    pairs = sorted({(n.text, query) for row in rows for n in row.negatives for query in n.queries})
    documents = model.encode_document([text for text, _ in pairs], convert_to_tensor=True, show_progress_bar=False)
    queries = model.encode_query([query for _, query in pairs], convert_to_tensor=True, show_progress_bar=False)
    return float(torch.nn.functional.cosine_similarity(documents, queries).mean())


if __name__ == "__main__":
    main()
