"""What refreshing the negatives while training does for retrieval: nDCG@10 over seeds.

    python benchmarks/refresh.py --model MODEL --collection miracl/hi --seeds 0 1 2 --output refresh.json

After one epoch of pairs (see over_seeds.py) the model mines negatives, and CLPLoss trains with each way to refresh
them, all from the same weights and rows.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

from over_seeds import Comparison, fit, make_parser, mining_options
from sentence_transformers import SentenceTransformer

from st_clp import AnceCallback, CLPLoss
from st_clp.mining import mine
from st_clp.mining.rows import to_dataset

ONCE = "mined once"


def variants(every: int) -> dict[str, dict[str, Any] | None]:
    """Name to the arguments of AnceCallback; None mines once."""
    return {
        ONCE: None,
        "refreshed each epoch": {"every": "epoch"},
        f"refreshed every {every} steps": {"every": every},
        f"refreshed every {every} steps, beside the training": {"every": every, "asynchronous": True},
    }


def main() -> None:
    parser = make_parser(__doc__, num_negatives=1, max_seq_length=96)
    parser.add_argument("--epochs", type=float, default=2)
    parser.add_argument("--every", type=int, default=18, help="steps between refreshes")
    options = parser.parse_args()
    ways = variants(options.every)
    comparison = Comparison(options, list(ways))

    def begin(model: SentenceTransformer, seed: int) -> Callable[[str], dict[str, Any]]:
        mining = mining_options(options, seed)
        rows = mine(model, comparison.train, mining, show_progress_bar=False).rows
        dataset = to_dataset(rows, num_negatives=options.num_negatives)
        details = to_dataset(rows, num_negatives=options.num_negatives, details=True)

        def train(name: str) -> dict[str, Any]:
            began, way = time.perf_counter(), ways[name]
            ance = None if way is None else AnceCallback(comparison.train, details, options=mining, **way)
            fit(
                model,
                dataset if ance is None else ance.train_dataset,
                CLPLoss(model, scale=options.scale),
                seed=seed,
                learning_rate=1e-4,
                batch_size=16,
                epochs=options.epochs,
                callbacks=[] if ance is None else [ance],
            )
            return {
                "seconds": round(time.perf_counter() - began, 1),
                "refreshes": [] if ance is None else ance.refreshes,
            }

        return train

    comparison.run(begin)

    def used(name: str) -> list[list[dict[str, Any]]]:
        if name == ONCE or name not in ways:
            return []
        return [[r for r in found["refreshes"] if r["used_from"] is not None] for found in comparison.of(name)]

    def changed(name: str) -> str:
        shares = [refresh["changed"] for refreshes in used(name) for refresh in refreshes[1:]]
        return f"{statistics.mean(shares):.0%}" if shares else ""

    def above(name: str) -> str:
        ends = [[refreshes[place]["above_positive"] for refreshes in used(name)] for place in (0, -1)]
        return " to ".join(f"{statistics.mean(end):.0%}" for end in ends if end)

    def seconds(name: str) -> str:
        return f"{statistics.mean(found['seconds'] for found in comparison.of(name)):.0f}" if name in ways else ""

    columns = {
        "refreshes used": lambda name: ", ".join(str(len(refreshes) - 1) for refreshes in used(name)),
        "negatives changed by a refresh": changed,
        "above their positive, first to last": above,
        "seconds": seconds,
    }
    print(comparison.table("negatives", ONCE, columns))


if __name__ == "__main__":
    main()
