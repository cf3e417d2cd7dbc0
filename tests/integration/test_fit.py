"""``model.fit`` with CLPLoss on rows written by hand, as in the README."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from sentence_transformers import InputExample, SentenceTransformer
from torch.utils.data import DataLoader

from st_clp import CLPLoss
from tests.fresh import run_fresh

ROWS = [
    ("which river is big", "the big river of the north", "the old lake of the south", "which lake is old"),
    ("which lake is old", "the old lake of the south", "the big river of the north", "which river is big"),
    ("who is the king", "the king of the golden city", "the queen of the silver city", "who is the queen"),
    ("who is the queen", "the queen of the silver city", "the king of the golden city", "who is the king"),
]


def test_fit_trains_and_the_saved_model_is_the_same_in_a_fresh_process(
    tiny_model: SentenceTransformer, tmp_path: Path
) -> None:
    examples = [InputExample(texts=list(row)) for row in ROWS]
    queries, positives, negatives = ([row[column] for row in ROWS] for column in range(3))

    def margin() -> float:
        anchor, positive, negative = (
            tiny_model.encode(texts, normalize_embeddings=True) for texts in (queries, positives, negatives)
        )
        return float(((anchor * positive).sum(1) - (anchor * negative).sum(1)).mean())

    before = margin()
    tiny_model.fit(
        train_objectives=[(DataLoader(examples, batch_size=4, shuffle=True), CLPLoss(tiny_model))],
        epochs=30,
        warmup_steps=0,
        optimizer_params={"lr": 1e-3},
        show_progress_bar=False,
        checkpoint_path=str(tmp_path / "checkpoints"),
    )
    assert margin() > before + 0.1
    tiny_model.save(str(tmp_path / "model"))
    code = (
        "import sys, json; from sentence_transformers import SentenceTransformer\n"
        "model = SentenceTransformer(sys.argv[1], device='cpu')\n"
        "print(json.dumps(model.encode(json.loads(sys.argv[2])).tolist()))"
    )
    result = run_fresh(code, tmp_path / "model", json.dumps(queries))
    found = np.array(json.loads(result.stdout.splitlines()[-1]), dtype=np.float32)
    np.testing.assert_array_equal(found, tiny_model.encode(queries))
