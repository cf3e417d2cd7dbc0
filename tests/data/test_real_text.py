"""Collections of ir_datasets on real text, in a fresh process since IR_DATASETS_HOME is read at import."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

CODE = """
import json
from st_clp import Collection
out = {}
for language in ("ko", "fa", "hi"):
    train, dev = (Collection.load(f"miracl/{language}", split=split) for split in ("train", "dev"))
    documents = {document.doc_id: document.text for document in dev.documents()}
    judged = {doc_id for grades in dev.judgments.values() for doc_id in grades}
    fetched = dev.get_documents(judged)
    out[language] = {
        "names": [train.name, dev.name, train.corpus_name, dev.corpus_name, dev.language, dev.split],
        "sizes": [len(documents), len(train.queries), len(dev.queries)],
        "fetched": {doc_id: document.text for doc_id, document in fetched.items()} == {d: documents[d] for d in judged},
        "title only": next(iter(Collection.load(f"miracl/{language}/dev", text_fields=["title"]).documents())).text,
        "default": next(iter(dev.documents())).text,
        "without missing": dev.without_missing_documents(documents) is dev,
    }
print(json.dumps(out))
"""


@pytest.mark.skipif("ST_CLP_REAL_DATA" not in os.environ, reason="ST_CLP_REAL_DATA names no real text")
def test_miracl_through_ir_datasets(tmp_path: Path) -> None:
    script = Path(os.environ["ST_CLP_REAL_DATA"]) / "build_miracl_home.py"
    subprocess.run([sys.executable, str(script), str(tmp_path)], check=True)
    environment = {**os.environ, "IR_DATASETS_HOME": str(tmp_path)}
    result = subprocess.run([sys.executable, "-c", CODE], env=environment, check=True, capture_output=True, text=True)
    found = json.loads(result.stdout)
    assert found["ko"]["names"] == ["miracl/ko/train", "miracl/ko/dev", "miracl/ko", "miracl/ko", "ko", "dev"]
    assert [found[language]["sizes"] for language in ("ko", "fa", "hi")] == [
        [964, 4347, 1427],
        [1103, 4229, 1766],
        [240, 850, 340],
    ]
    for values in found.values():
        assert values["fetched"]
        assert values["without missing"]
        assert values["default"].startswith(values["title only"])
        assert len(values["default"]) > len(values["title only"])
