"""What the sources of queries of negatives do for retrieval: dev nDCG@10 over seeds.

    python benchmarks/negative_queries.py --model MODEL --collection miracl/hi --seeds 0 1 2 --output queries.json

For each seed: one epoch of MultipleNegativesRankingLoss on pairs (so that there is something to mine with), ANCE
negatives mined by that model, then one epoch of CLPLoss with the queries of each source, all from the same weights and
with the same negatives: candidates with a known query are not preferred, so that there are negatives that the judgments
know nothing of. ``--local`` and ``--endpoint`` add sources that generate. Results are added to the output as they come,
and a seed and source that is there already is not run again.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
from pathlib import Path
from typing import Any

from datasets import Dataset
from penalties import fit
from sentence_transformers import SentenceTransformer, losses

from evaluators import CollectionEvaluator
from st_clp import CLPLoss, Collection
from st_clp.mining import MinedNegatives, MiningOptions, mine
from st_clp.mining.negative_queries import QueryOptions
from st_clp.mining.rows import to_dataset
from st_clp.rundir import write_json

NONE = "none"
SOURCES = [NONE, "judgments", "title", "judgments,title"]
BASE, AFTER_PAIRS = "before training", "one epoch of pairs"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--collection", default="miracl/hi")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--max-seq-length", type=int, default=96)
    parser.add_argument("--max-queries", type=int, default=None, help="train on no more queries than this")
    parser.add_argument("--num-negatives", type=int, default=2)
    parser.add_argument("--scale", type=float, default=20.0)
    parser.add_argument("--penalty", default="contrastive")
    parser.add_argument("--penalty-weight", type=float, default=0.3)
    parser.add_argument("--local", help="a model that writes queries: a folder, or a name on the Hub")
    parser.add_argument("--endpoint", help="the model of an endpoint that OPENAI_BASE_URL names")
    parser.add_argument("--store", type=Path, default=None, help="keeps what is generated")
    parser.add_argument("--output", type=Path, required=True)
    options = parser.parse_args()
    results: dict[str, dict[str, Any]] = json.loads(options.output.read_text()) if options.output.exists() else {}
    train, dev = (Collection.load(options.collection, split=split) for split in ("train", "dev"))
    if options.max_queries is not None:
        train = train.sample(options.max_queries, 0)
    sources = list(SOURCES)
    for kind, model in (("local", options.local), ("openai", options.endpoint)):
        if model:
            sources += [f"{kind}:{model}", f"judgments,{kind}:{model}"]
    for seed in options.seeds:
        run_seed(options, seed, sources, train, dev, results)
    print(table(results, options.seeds, sources))


def run_seed(
    options: argparse.Namespace,
    seed: int,
    sources: list[str],
    train: Collection,
    dev: Collection,
    results: dict[str, dict[str, Any]],
) -> None:
    """All sources of one seed; each result is written when it is there."""
    if all(f"{seed}: {name}" in results for name in sources):
        return

    def record(name: str, **values: Any) -> None:
        results[f"{seed}: {name}"] = values
        write_json(options.output, results)
        print(seed, name, values, flush=True)

    model = SentenceTransformer(options.model)
    model.max_seq_length = options.max_seq_length
    evaluator = CollectionEvaluator(dev, name="dev", show_progress_bar=False, write_csv=False)
    record(BASE, ndcg=evaluator(model)["dev_ndcg@10"])
    fit(
        model, pairs_of(train), losses.MultipleNegativesRankingLoss(model), seed=seed, learning_rate=2e-4, batch_size=32
    )
    record(AFTER_PAIRS, ndcg=evaluator(model)["dev_ndcg@10"])
    start = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with tempfile.TemporaryDirectory() as store_dir:
        mined = {name: mine_with(options, seed, model, train, name, Path(store_dir) / "store") for name in sources}
    same = {name: [[n.doc_id for n in row.negatives] for row in found.rows] for name, found in mined.items()}
    assert all(negatives == same[NONE] for negatives in same.values()), "the negatives must not depend on their queries"
    for name, found in mined.items():
        if f"{seed}: {name}" in results:
            continue
        model.load_state_dict(start)
        weight = 0.0 if name == NONE else options.penalty_weight
        loss = CLPLoss(model, scale=options.scale, penalty=options.penalty, penalty_weight=weight)
        rows = to_dataset(found.rows, num_negatives=options.num_negatives)
        fit(model, rows, loss, seed=seed, learning_rate=1e-4, batch_size=16)
        negatives = sum(len(row.negatives) for row in found.rows)
        shares = {source: number / negatives for source, number in found.account.query_sources.items()}
        record(name, ndcg=evaluator(model)["dev_ndcg@10"], shares={} if name == NONE else shares)


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


def mine_with(
    options: argparse.Namespace, seed: int, model: SentenceTransformer, train: Collection, sources: str, store_dir: Path
) -> MinedNegatives:
    """The negatives with the queries of these sources."""
    return mine(
        model,
        train,
        MiningOptions(
            num_negatives=options.num_negatives,
            range_min=2,
            range_max=30,
            sampling_strategy="random",
            prefer_known_queries=False,
            seed=seed,
        ),
        negative_queries="judgments" if sources == NONE else sources,
        query_options=QueryOptions(seed=seed),
        query_store=options.store,
        store_dir=store_dir,
        show_progress_bar=False,
    )


def table(results: dict[str, dict[str, Any]], seeds: list[int], sources: list[str]) -> str:
    """Means and ranges over the seeds, and each seed's difference from no queries, as a Markdown table."""
    lines = [
        f"| queries of negatives | dev nDCG@10, mean of {len(seeds)} seeds (lowest to highest) "
        "| against none, seed by seed | negatives with a query, by source |",
        "| --- | --- | --- | --- |",
    ]
    for name in [BASE, AFTER_PAIRS, *sources]:
        found = [results[f"{seed}: {name}"] for seed in seeds]
        scores = [values["ndcg"] for values in found]
        against, shares = "", ""
        if name in sources and name != NONE:
            none = [results[f"{seed}: {NONE}"]["ndcg"] for seed in seeds]
            against = ", ".join(f"{score - base:+.3f}" for score, base in zip(scores, none, strict=True))
            kinds = dict.fromkeys(kind for values in found for kind in values["shares"])
            means = {kind: statistics.mean(values["shares"].get(kind, 0.0) for values in found) for kind in kinds}
            shares = ", ".join(f"{kind} {share:.0%}" for kind, share in means.items())
        lines.append(
            f"| {name} | {statistics.mean(scores):.3f} ({min(scores):.3f} to {max(scores):.3f}) "
            f"| {against} | {shares} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
