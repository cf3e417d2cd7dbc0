"""Evaluate two models on the same collections, and say which differences are more than chance."""

from collections.abc import Mapping
from pathlib import Path

from sentence_transformers import SentenceTransformer

import st_clp
from evaluators import BenchmarkEvaluator
from evaluators.comparison import Comparison, compare
from evaluators.evaluation import read_evaluation
from evaluators.page import write_page
from st_clp import Collection

MIRACL = {"ko": "miracl/ko", "fa": "miracl/fa"}  # what to call each, and where it is


def open_model(name: str) -> SentenceTransformer:
    """A model's folder, a mixture's too, or a name on the Hub."""
    return st_clp.load(name) if Path(name).is_dir() else SentenceTransformer(name)


def main(
    base: str = "intfloat/multilingual-e5-small",
    fine_tuned: str = "e5-ko",
    collections: Mapping[str, str] = MIRACL,
    output: str = "compared",
) -> Comparison:
    folder = Path(output)
    datasets = {name: Collection.load(where, split="dev") for name, where in collections.items()}
    # One folder for the embeddings of both: each model's are kept apart, and none are made twice.
    evaluator = BenchmarkEvaluator(datasets, "dev", store_dir=folder / "embeddings")
    for part, name in (("base", base), ("fine-tuned", fine_tuned)):
        model = open_model(name)
        print(part, evaluator(model)[evaluator.primary_metric])
        evaluator.save(folder / part, model_name=part, model=model)

    before, after = (read_evaluation(folder / part) for part in ("base", "fine-tuned"))
    found = compare(before, after)
    for difference in found.differences:
        print(f"{difference.key}: {difference.difference:+.4f} {found.metric}, p = {difference.p:.3f}")
    write_page(folder / "report.html", [before, after])
    return found


if __name__ == "__main__":
    main()
