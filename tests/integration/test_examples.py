"""Each script of ``examples/`` as somebody would run it, on a tiny model and a collection that it can learn."""

from __future__ import annotations

import json
import os
import re
import runpy
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nbformat
import numpy as np
import pytest
import torch
from nbclient import NotebookClient
from sentence_transformers import SentenceTransformer

import st_clp
from st_clp import Collection
from st_clp.mining import read_rows

EXAMPLES = Path(__file__).parents[2] / "examples"
SCRIPTS = sorted(path.stem for path in EXAMPLES.glob("*.py"))


def main_of(name: str) -> Callable[..., Any]:
    main: Callable[..., Any] = runpy.run_path(str(EXAMPLES / f"{name}.py"))["main"]
    return main


def embeddings(model: SentenceTransformer) -> np.ndarray:
    return model.encode(["which river is old", "the king of the north"])


def test_the_folder_says_what_each_script_is_and_a_test_runs_each() -> None:
    listed = (EXAMPLES / "README.md").read_text(encoding="utf-8")
    tests = Path(__file__).read_text(encoding="utf-8") + (
        Path(__file__).parents[1] / "queries" / "test_example.py"
    ).read_text(encoding="utf-8")
    assert len(SCRIPTS) == 8
    for name in SCRIPTS:
        assert f"({name}.py)" in listed
        assert f'"{name}' in tests


def test_fit(tiny_model_path: Path, tmp_path: Path) -> None:
    before = embeddings(SentenceTransformer(str(tiny_model_path), device="cpu"))
    trained = main_of("fit")(str(tiny_model_path), str(tmp_path / "fitted"))
    assert not np.array_equal(embeddings(trained), before)
    saved = SentenceTransformer(str(tmp_path / "fitted"), device="cpu")
    np.testing.assert_array_equal(embeddings(saved), embeddings(trained))


def test_trainer_with_refresh(
    tiny_model_path: Path, collection_path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    scores = main_of("trainer_with_refresh")(
        str(tiny_model_path),
        str(collection_path),
        str(tmp_path / "trained"),
        refresh_every=4,
        batch_size=16,
        learning_rate=1e-3,
    )
    assert "step 4: used" in capsys.readouterr().out
    (score,) = (value for name, value in scores.items() if name.endswith("ndcg@10"))
    loaded = SentenceTransformer(str(tmp_path / "trained"), device="cpu")
    from evaluators import CollectionEvaluator

    assert score in CollectionEvaluator(Collection.load(str(collection_path), split="dev"))(loaded).values()


def test_mine_and_several_processes(tiny_model_path: Path, collection_path: Path, tmp_path: Path) -> None:
    mined = main_of("mine")(str(tiny_model_path), str(collection_path), str(tmp_path / "mined"))
    rows = tmp_path / "mined" / "rows.jsonl"
    assert read_rows(rows) == mined.rows
    assert len(mined.rows) == 120
    output = tmp_path / "trained"
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    result = subprocess.run(
        [*launcher, str(EXAMPLES / "several_processes.py"), str(tiny_model_path), str(rows), str(output)],
        cwd=tmp_path,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    if "Backend gloo does not support alltoall" in result.stderr:
        pytest.skip(f"torch {torch.__version__} cannot gather with gradients between processors, only between GPUs")
    assert result.returncode == 0, result.stderr
    before = embeddings(SentenceTransformer(str(tiny_model_path), device="cpu"))
    assert not np.array_equal(embeddings(SentenceTransformer(str(output), device="cpu")), before)


def test_company_documents(tiny_model_path: Path, collection_path: Path, tmp_path: Path) -> None:
    collection = Collection.load(str(collection_path), split="train")
    documents = [{"id": d.doc_id, "title": d.title, "text": d.text} for d in collection.corpus]
    asked = [(collection.queries[query], next(iter(found))) for query, found in collection.judgments.items()]
    (tmp_path / "documents.jsonl").write_text("\n".join(map(json.dumps, documents)))
    questions = [json.dumps({"question": question, "answer": answer}) for question, answer in asked]
    (tmp_path / "questions.jsonl").write_text("\n".join(questions))
    report = main_of("company_documents")(
        str(tiny_model_path),
        str(tmp_path / "documents.jsonl"),
        str(tmp_path / "questions.jsonl"),
        str(tmp_path / "ours"),
        batch_size=16,
        epochs=1,
    )
    assert len(report["scores"]["after"]) == 1
    assert (tmp_path / "ours" / "modules.json").is_file()


def test_mixture(tiny_model_path: Path, collection_path: Path, tmp_path: Path) -> None:
    trained = main_of("mixture")(str(tiny_model_path), str(collection_path), str(tmp_path / "moe"), batch_size=16)
    with torch.no_grad():
        np.testing.assert_allclose(embeddings(st_clp.load(str(tmp_path / "moe"))), embeddings(trained), atol=1e-6)
    dense = SentenceTransformer(str(tmp_path / "moe-dense"), device="cpu")
    assert embeddings(dense).shape == (2, 32)


def test_evaluate_and_compare(
    tiny_model_path: Path, collection_path: Path, other_collection_path: Path, tmp_path: Path
) -> None:
    other = tmp_path / "other"
    model = SentenceTransformer(str(tiny_model_path), device="cpu")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(0.9)
    model.save(str(other))
    found = main_of("evaluate_and_compare")(
        str(tiny_model_path),
        str(other),
        {"one": str(collection_path), "other": str(other_collection_path)},
        str(tmp_path / "compared"),
    )
    assert len(found.differences) == 3  # two collections and their mean
    assert found.before == "base"
    assert any(difference.difference for difference in found.differences)
    assert "fine-tuned" in (tmp_path / "compared" / "report.html").read_text(encoding="utf-8")


def test_the_notebook_runs_from_top_to_bottom_with_its_pictures(
    tiny_model_path: Path, collection_path: Path, tmp_path: Path
) -> None:
    notebook = nbformat.read(EXAMPLES / "first_model.ipynb", as_version=4)
    # The pictures that it is read with on the web are in it.
    assert len(pictures(notebook)) == 3
    first = next(cell for cell in notebook.cells if cell.cell_type == "code")
    names = re.findall(r"^([A-Z]+) = ", first.source, re.MULTILINE)
    assert names == ["MODEL", "COLLECTION", "QUERIES", "FOLDER"]
    first.source = (
        f"from pathlib import Path\nMODEL, COLLECTION = {str(tiny_model_path)!r}, {str(collection_path)!r}\n"
        f"QUERIES, FOLDER = 60, Path({str(tmp_path / 'out')!r})"
    )
    for cell in notebook.cells:
        cell.outputs = [] if cell.cell_type == "code" else None
    NotebookClient(notebook, timeout=300, kernel_name="python3").execute()
    assert len(pictures(notebook)) == 3
    assert (tmp_path / "out" / "model" / "modules.json").is_file()


def pictures(notebook: Any) -> list[Any]:
    outputs = [output for cell in notebook.cells for output in cell.get("outputs") or []]
    return [output for output in outputs if "image/png" in output.get("data", {})]
