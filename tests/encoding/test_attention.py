"""The encoder's attention, changed while a model is trained."""

from __future__ import annotations

import pickle
from pathlib import Path

import numpy as np
from sentence_transformers import SentenceTransformer

from st_clp.encoding.attention import masks_unread
from tests.fresh import run_fresh

TEXTS = ["which river", "the king of war is old and the river of the north is one lake"]
ELSEWHERE = """
import pickle, sys
import numpy as np
import st_clp.encoding
with open(sys.argv[1], "rb") as file:
    model = pickle.load(file)
np.save(sys.argv[2], model.encode(sys.argv[3:]))
"""


def test_a_model_that_is_sent_to_another_process_meanwhile_works_there(
    tiny_model: SentenceTransformer, tmp_path: Path
) -> None:
    """As a process that mines beside the training gets it."""
    expected = tiny_model.encode(TEXTS)
    with masks_unread(tiny_model), open(tmp_path / "model", "wb") as file:
        pickle.dump(tiny_model, file)
    run_fresh(ELSEWHERE, tmp_path / "model", tmp_path / "found.npy", *TEXTS)
    np.testing.assert_allclose(np.load(tmp_path / "found.npy"), expected, atol=1e-6)
