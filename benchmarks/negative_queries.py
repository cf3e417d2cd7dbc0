"""What the sources of queries of negatives do for retrieval: dev nDCG@10 over seeds.

    python benchmarks/negative_queries.py --model MODEL --collection miracl/hi --seeds 0 1 2 --output queries.json

After one epoch of pairs (see over_seeds.py) the model mines ANCE negatives, and CLPLoss trains one epoch with the
queries of each source, all from the same weights and with the same negatives: candidates with a known query are not
preferred, so that there are negatives that the judgments know nothing of. ``--local`` and ``--endpoint`` add sources
that generate.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from over_seeds import Comparison, fit, make_parser, mining_options
from sentence_transformers import SentenceTransformer

from st_clp import CLPLoss
from st_clp.mining import MinedNegatives, mine
from st_clp.mining.rows import to_dataset
from st_clp.queries import QueryOptions

NONE = "none"
SOURCES = [NONE, "judgments", "title", "judgments,title"]


def read_options() -> argparse.Namespace:
    """The options, and what sources they come to."""
    parser = make_parser(__doc__, num_negatives=2, max_seq_length=96)
    parser.add_argument("--penalty", default="contrastive")
    parser.add_argument("--penalty-weight", type=float, default=0.3)
    parser.add_argument("--local", help="a model that writes queries: a folder, or a name on the Hub")
    parser.add_argument("--endpoint", help="the model of an endpoint that OPENAI_BASE_URL names")
    parser.add_argument("--store", type=Path, default=None, help="keeps what is generated")
    options = parser.parse_args()
    options.sources = list(SOURCES)
    for kind, model in (("local", options.local), ("openai", options.endpoint)):
        if model:
            options.sources += [f"{kind}:{model}", f"judgments,{kind}:{model}"]
    return options


def main() -> None:
    options = read_options()
    comparison = Comparison(options, options.sources)

    def begin(model: SentenceTransformer, seed: int) -> Callable[[str], dict[str, Any]]:
        mined = mine_with_each(model, seed)

        def train(name: str) -> dict[str, Any]:
            weight = 0.0 if name == NONE else options.penalty_weight
            loss = CLPLoss(model, scale=options.scale, penalty=options.penalty, penalty_weight=weight)
            rows = to_dataset(mined[name].rows, num_negatives=options.num_negatives)
            fit(model, rows, loss, seed=seed, learning_rate=1e-4, batch_size=16)
            negatives = sum(len(row.negatives) for row in mined[name].rows)
            shares = {source: number / negatives for source, number in mined[name].account.query_sources.items()}
            return {"shares": {} if name == NONE else shares}

        return train

    def mine_with_each(model: SentenceTransformer, seed: int) -> dict[str, MinedNegatives]:
        """The same negatives with the queries of each source."""
        with tempfile.TemporaryDirectory() as folder:
            mined = {
                name: mine(
                    model,
                    comparison.train,
                    mining_options(options, seed, prefer_known_queries=False),
                    negative_queries="judgments" if name == NONE else name,
                    query_options=QueryOptions(seed=seed),
                    query_store=options.store,
                    store_dir=Path(folder) / "store",
                    show_progress_bar=False,
                )
                for name in options.sources
            }
        chosen = {name: [[n.doc_id for n in row.negatives] for row in found.rows] for name, found in mined.items()}
        assert all(ids == chosen[NONE] for ids in chosen.values()), "the negatives must not depend on their queries"
        return mined

    comparison.run(begin)

    def shares(name: str) -> str:
        if name not in options.sources:
            return ""
        found = [values["shares"] for values in comparison.of(name)]
        kinds = dict.fromkeys(kind for values in found for kind in values)
        return ", ".join(f"{kind} {statistics.mean(values.get(kind, 0.0) for values in found):.0%}" for kind in kinds)

    print(comparison.table("queries of negatives", NONE, {"negatives with a query, by source": shares}))


if __name__ == "__main__":
    main()
