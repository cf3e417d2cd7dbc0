"""Encode the benchmark's texts with a peer, in the peer's own environment, and print what that took.

Write the texts with st_clp's environment, and run each peer in its own:

    python benchmarks/peers.py write texts.json
    python benchmarks/peers.py openvino texts.json MODEL       # pip install 'sentence-transformers[openvino]'
    python benchmarks/peers.py flagembedding texts.json MODEL  # pip install FlagEmbedding 'transformers<5'

FlagEmbedding's ``hn_mine`` is a script that encodes with the class that is timed here, and searches with FAISS.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any


def write(path: Path) -> None:
    from test_mining import DOCUMENTS, QUERIES, make_collection

    collection = make_collection(DOCUMENTS, QUERIES)
    texts = {"documents": [d.text for d in collection.documents()], "queries": list(collection.queries.values())}
    path.write_text(json.dumps(texts))


def openvino(model: str) -> Callable[[list[str]], Any]:
    from sentence_transformers import SentenceTransformer

    return SentenceTransformer(model, backend="openvino").encode


def flagembedding(model: str) -> Callable[[list[str]], Any]:
    from FlagEmbedding import FlagModel

    encoder = FlagModel(model, pooling_method="mean", use_fp16=False, devices="cpu")
    return lambda texts: encoder.encode(texts, max_length=256)


if __name__ == "__main__":
    peer, path = sys.argv[1], Path(sys.argv[2])
    if peer == "write":
        write(path)
    else:
        texts = json.loads(path.read_text())
        encode = {"openvino": openvino, "flagembedding": flagembedding}[peer](sys.argv[3])
        encode(texts["queries"][:64])
        started = time.perf_counter()
        shapes = [encode(texts[kind]).shape for kind in ("documents", "queries")]
        print(f"{peer}: {time.perf_counter() - started:.1f} s for {shapes}")
