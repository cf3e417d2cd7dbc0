"""Mine with a peer in the peer's own environment, and print what that took; test_mining.py runs this.

    python benchmarks/peers.py openvino texts.json MODEL
    python benchmarks/peers.py flagembedding texts.json MODEL

The first needs ``pip install 'sentence-transformers[openvino]' 'transformers<5' datasets faiss-cpu``, the
second ``pip install FlagEmbedding 'transformers<5' faiss-cpu``.

FlagEmbedding's ``hn_mine`` is a script outside its package. What it does is done here with the package's class and
FAISS: encode queries and documents, search, and draw negatives from the ranks.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

BATCH_SIZES = (8, 16, 32, 64)
TRIAL = 256


def fastest(encode: Callable[..., Any], texts: list[str]) -> int:
    def seconds(batch_size: int) -> float:
        started = time.perf_counter()
        encode(texts[:TRIAL], batch_size=batch_size)
        return time.perf_counter() - started

    seconds(BATCH_SIZES[0])
    return min(BATCH_SIZES, key=seconds)


def openvino(model_path: str, texts: dict[str, list[str]]) -> tuple[str, float]:
    from datasets import Dataset
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.util import mine_hard_negatives

    model = SentenceTransformer(model_path, backend="openvino", device="cpu")
    batch_size = fastest(model.encode, texts["documents"])
    pairs = Dataset.from_dict({"anchor": texts["queries"], "positive": texts["positives"]})
    started = time.perf_counter()
    mine_hard_negatives(
        pairs,
        model,
        corpus=texts["documents"],
        num_negatives=4,
        range_max=100,
        batch_size=batch_size,
        use_faiss=True,
        verbose=False,
    )
    name = f"sentence-transformers, openvino, batches of {batch_size}, FAISS"
    return name, time.perf_counter() - started


def flagembedding(model_path: str, texts: dict[str, list[str]]) -> tuple[str, float]:
    import random

    import faiss
    import numpy as np
    from FlagEmbedding import FlagModel

    model = FlagModel(model_path, pooling_method="mean", use_fp16=False, devices="cpu")
    batch_size = fastest(lambda some, batch_size: model.encode(some, batch_size=batch_size), texts["documents"])
    started = time.perf_counter()
    documents, queries = (
        np.asarray(model.encode(texts[kind], batch_size=batch_size, max_length=256), dtype=np.float32)
        for kind in ("documents", "queries")
    )
    index = faiss.IndexFlatIP(documents.shape[1])
    index.add(documents)
    _, rows = index.search(queries, 100)
    for found, positive in zip(rows.tolist(), texts["positives"], strict=True):
        random.sample([row for row in found if texts["documents"][row] != positive], 4)
    return f"FlagEmbedding, batches of {batch_size}, FAISS", time.perf_counter() - started


if __name__ == "__main__":
    peer = {"openvino": openvino, "flagembedding": flagembedding}[sys.argv[1]]
    name, seconds = peer(sys.argv[3], json.loads(Path(sys.argv[2]).read_text()))
    print(json.dumps({"name": name, "seconds": seconds}))
