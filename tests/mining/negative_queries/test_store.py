"""The store: what is kept, who works on what, and what becomes of it all when a process is killed."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from st_clp.mining.negative_queries import QueryStore, Usage
from st_clp.mining.negative_queries import store as store_module
from st_clp.mining.negative_queries.store import Key, StoredAnswer

from .conftest import Endpoint
from .test_endpoint import chain_for, make_documents

ANSWER = StoredAnswer(("which river?", "어느 강?"), None, Usage(10, 5, 0.25))


def test_an_answer_is_found_by_generator_prompt_and_text_alone(tmp_path: Path) -> None:
    key = Key.of("model", "prompt", "text")
    others = [Key.of("other", "prompt", "text"), Key.of("model", "other", "text"), Key.of("model", "prompt", "other")]
    with QueryStore(tmp_path / "new folder" / "q.sqlite") as store:
        assert store.claim(key)
        store.put(key, ANSWER)
    with QueryStore(tmp_path / "new folder" / "q.sqlite") as store:
        assert store.get([key, *others]) == {key: ANSWER}
        assert not store.claim(key)  # it is answered
        many = [Key.of("model", "prompt", str(i)) for i in range(1200)]
        for other in many:
            store.put(other, ANSWER)
        assert set(store.get(many)) == set(many)


def test_a_document_is_worked_on_by_one_and_taken_over_from_the_dead(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    key, other = Key.of("m", "p", "a"), Key.of("m", "p", "b")
    monkeypatch.setattr(store_module, "LEASE_SECONDS", 0.5)
    with QueryStore(tmp_path / "q.sqlite") as one, QueryStore(tmp_path / "q.sqlite") as two:
        assert one.claim(key)
        assert not two.claim(key)
        assert two.claim(other)
        time.sleep(0.8)
        assert not two.claim(key)  # it has been alive all the time
        one.release([key])
        assert two.claim(key)
        two.release([key])
        assert one.claim(key)
        one._closed.set()  # as if it had been killed: nothing beats any more, nothing is released
        time.sleep(0.8)
        assert two.claim(key)


def test_two_in_one_process_at_once_pay_once_for_each_document(endpoint: Endpoint, tmp_path: Path) -> None:
    endpoint.latency = 0.01
    endpoint.knows_idempotency = False
    documents = make_documents(120)
    found: list[int] = []

    def work() -> None:
        with chain_for(endpoint, tmp_path / "q.sqlite", query_concurrency=4) as chain:
            found.append(len(chain.generate(documents)[0]))

    workers = [threading.Thread(target=work) for _ in range(2)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert found == [120, 120]
    assert set(endpoint.billed.values()) == {1}
    assert len(endpoint.billed) == 120


def test_a_file_that_is_no_store_is_refused(tmp_path: Path) -> None:
    (tmp_path / "text").write_text("not a database, and long enough to be looked at as one" * 100)
    with pytest.raises(ValueError, match="is no store of queries"):
        QueryStore(tmp_path / "text")
    with pytest.raises(OSError, match="cannot be opened"):
        QueryStore(tmp_path)
    with QueryStore(tmp_path / "q.sqlite") as store:
        store._database.execute("PRAGMA user_version = 99")
    with pytest.raises(ValueError, match="later version"):
        QueryStore(tmp_path / "q.sqlite")


def write_beir(folder: Path, documents: int) -> Path:
    (folder / "qrels").mkdir(parents=True)
    lines = [json.dumps({"_id": d.doc_id, "text": d.text}) for d in make_documents(documents)]
    (folder / "corpus.jsonl").write_text("\n".join(lines) + "\n")
    (folder / "queries.jsonl").write_text('{"_id": "q", "text": "which river?"}\n')
    (folder / "qrels" / "train.tsv").write_text("query-id\tcorpus-id\tscore\nq\td0\t1\n")
    return folder


def test_a_killed_process_loses_what_was_in_flight_and_two_finish_its_work_together(
    endpoint: Endpoint, tmp_path: Path
) -> None:
    endpoint.latency = 0.03
    endpoint.knows_idempotency = False  # nothing but the store keeps anybody from paying twice
    collection = write_beir(tmp_path / "collection", 400)
    command = [sys.executable, "-m", "st_clp.cli", "queries", "--collection", str(collection)]
    command += ["--negative-queries", "judgments,openai:tiny", "--query-base-url", endpoint.base_url]
    command += ["--query-store", str(tmp_path / "q.sqlite"), "--query-concurrency", "4"]
    first = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 60
    while endpoint.billed.total() < 100 and time.monotonic() < deadline:
        time.sleep(0.01)
    os.kill(first.pid, signal.SIGKILL)
    first.wait()
    time.sleep(0.3)  # what the server was working on is billed to nobody's use
    paid = endpoint.billed.total()
    assert 100 <= paid < 380
    with QueryStore(tmp_path / "q.sqlite") as store:
        assert paid - 5 <= len(store) <= paid
    others = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    outputs = [other.communicate(timeout=120)[0] for other in others]
    assert [other.returncode for other in others] == [0, 0]
    assert all("400 of 400 documents have a query" in output for output in outputs)
    assert all("1 from judgments" in " ".join(output.split()) for output in outputs)
    assert set(endpoint.billed) == {str(i) for i in range(1, 400)}
    assert endpoint.billed.total() <= 399 + 4
    assert len({headers["User-Agent"] for headers, _ in endpoint.requests}) == 1
