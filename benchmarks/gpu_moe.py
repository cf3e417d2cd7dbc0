"""The mixture's feed-forward against the dense one on a GPU, in bfloat16 and at bge-m3's size.

    python benchmarks/gpu_moe.py    # 1024-4096; 2,048 and 32,768 tokens; 2 and 8 experts, 1 a token
    python benchmarks/gpu_moe.py --device cpu --width 64 --tokens 512    # does it run at all?

Each mixture is timed with a product an expert ("each"), with all experts' products in one kernel ("one") and as the
layer chooses between the two ("chosen"), in turn, medians. The share is that of the matrix-product peak which the dense
layer and the default mixture, as it chooses, reach.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from gpu_encoding import product_peak, synchronize
from test_moe import feed_forwards, forward, forward_and_backward, trainable
from torch import nn

from st_clp.moe import products

KINDS = ("intermediate", "output", "feed_forward")
CHOOSE = products.choose


def by_way(case: Callable[[], None], way: str) -> Callable[[], None]:
    """Run a case with its products the one way, the other, or as the layer chooses."""
    choosers = {
        "each": lambda each, *rest: each,
        "one": lambda each, *rest: products.in_one_kernel,
        "chosen": CHOOSE,
    }

    def run() -> None:
        products.choose = choosers[way]
        try:
            case()
        finally:
            products.choose = CHOOSE

    return run


def in_turn(cases: dict[str, Callable[[], None]], device: str, rounds: int = 15) -> dict[str, float]:
    """Run the cases in turn and return each one's median time in milliseconds."""
    times: dict[str, list[float]] = {name: [] for name in cases}
    for round_ in range(rounds + 3):
        for name, case in cases.items():
            synchronize(device)
            start = time.perf_counter()
            case()
            synchronize(device)
            if round_ >= 3:
                times[name].append(1000 * (time.perf_counter() - start))
    return {name: statistics.median(values) for name, values in times.items()}


def cases_of(
    layers: dict[str, nn.Module], make: Callable[[nn.Module], Callable[[], None]]
) -> dict[str, Callable[[], None]]:
    cases = {kind: make(layer) for kind, layer in layers.items() if kind not in KINDS}
    for kind in KINDS:
        cases |= {f"{kind}, {way}": by_way(make(layers[kind]), way) for way in ("each", "one", "chosen")}
    return cases


def report(device: str, width: int, tokens: int, experts: int, peak: float) -> None:
    """Print a table for so many tokens and experts."""
    layers = feed_forwards(width, 4 * width, torch.bfloat16, experts)
    layers = {kind: layer.to(device) for kind, layer in layers.items()}
    hidden = torch.randn(8, tokens // 8, width, device=device).bfloat16()
    passes = {"forward": in_turn(cases_of(layers, lambda layer: forward(layer, hidden)), device)}
    for kind, layer in layers.items():
        trainable(kind, layer)
    passes["both"] = in_turn(cases_of(layers, lambda layer: forward_and_backward(layer, hidden)), device)
    print(f"\n{tokens:,} tokens, {experts} experts")
    print(
        "| | forward, ms | against dense | forward and backward, ms | against dense |\n| --- | --- | --- | --- | --- |"
    )
    for name, milliseconds in passes["forward"].items():
        cells = [f"{milliseconds:.3f}", f"{milliseconds / passes['forward']['dense']:.2f} ×"]
        cells += [f"{passes['both'][name]:.3f}", f"{passes['both'][name] / passes['both']['dense']:.2f} ×"]
        print(f"| {name} | " + " | ".join(cells) + " |", flush=True)
    operations = 2 * 2 * tokens * width * 4 * width
    for name in ("dense", "intermediate, chosen"):
        print(f"{name}, forward: {operations / (passes['forward'][name] / 1000) / peak:.1%} of the product peak")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--width", type=int, default=1024)
    parser.add_argument("--tokens", type=int, nargs="+", default=[2_048, 32_768])
    parser.add_argument("--experts", type=int, nargs="+", default=[2, 8])
    given = parser.parse_args()
    if not given.device.startswith("cuda"):
        products.DEVICES = (given.device,)  # so that the choice is tried too
    peak = product_peak(given.device)
    name = torch.cuda.get_device_name() if given.device.startswith("cuda") else given.device
    print(f"{name}, torch {torch.__version__}, bfloat16 product peak {peak / 1e12:.2f} TFLOP/s")
    for tokens in given.tokens:
        for experts in given.experts:
            report(given.device, given.width, tokens, experts, peak)


if __name__ == "__main__":
    main()
