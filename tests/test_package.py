"""What importing costs and needs."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest


def in_fresh_process(code: str) -> dict:
    result = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    return json.loads(result.stdout.splitlines()[-1])


def test_import_is_light_and_every_public_name_loads() -> None:
    found = in_fresh_process(
        "import sentence_transformers, sys, time, json\n"
        "before = set(sys.modules); started = time.process_time(); import st_clp\n"
        "spent = time.process_time() - started; new = set(sys.modules) - before\n"
        "names = {name: type(getattr(st_clp, name)).__name__ for name in st_clp.__all__}\n"
        "print(json.dumps({'seconds': spent, 'new': sorted(new), 'names': names}))"
    )
    assert found["seconds"] < 1
    assert not {"faiss", "beir", "ir_datasets", "typer", "babel", "datasets"} & set(found["new"])
    assert found["names"]["CLPLoss"] == "type"


def test_loss_and_mixture_work_where_faiss_beir_and_ir_datasets_are_missing(tiny_model_path: str) -> None:
    found = in_fresh_process(
        "import sys, json\n"
        "for name in ('faiss', 'beir', 'ir_datasets', 'typer', 'babel', 'pytrec_eval'): sys.modules[name] = None\n"
        "from st_clp import CLPLoss, upcycle, train_only\n"
        "from sentence_transformers import SentenceTransformer\n"
        f"model = SentenceTransformer({str(tiny_model_path)!r}, device='cpu')\n"
        "upcycle(model); train_only(model, 'moe')\n"
        "columns = [model.preprocess([text, text]) for text in ('a river', 'the river', 'a lake', 'which lake')]\n"
        "loss = CLPLoss(model)(columns, None); loss.backward()\n"
        "print(json.dumps({'loss': float(loss)}))"
    )
    assert found["loss"] > 0


def test_an_unknown_name_is_an_attribute_error() -> None:
    import st_clp

    with pytest.raises(AttributeError, match="no attribute 'CLPLos'"):
        _ = st_clp.CLPLos
