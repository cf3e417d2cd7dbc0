"""The store: what is kept, who generates, and what becomes of it all when a process is killed."""

from __future__ import annotations

import os
import re
import shutil
import signal
import sqlite3
import subprocess
import sys
import threading
import time
from contextlib import closing
from pathlib import Path

import pytest
from typer.testing import CliRunner

from st_clp import Collection
from st_clp.cli import app
from st_clp.queries import QueryOptions, QueryStore, Usage, make_chain
from st_clp.queries.query_store import Key, StoredAnswer
from tests.toy import write_beir

from .conftest import KEY, Endpoint
from .test_endpoint import chain_for, make_documents

ANSWER = StoredAnswer(("which river?", "어느 강?"), None, Usage(10, 5, 0.25))


def test_an_answer_is_found_by_generator_prompt_and_text_alone(tmp_path: Path) -> None:
    key = Key.of("model", "prompt", "text")
    others = [Key.of("other", "prompt", "text"), Key.of("model", "other", "text"), Key.of("model", "prompt", "other")]
    with QueryStore(tmp_path / "new folder" / "q.sqlite") as store:
        store.put(key, ANSWER)
    with QueryStore(tmp_path / "new folder" / "q.sqlite") as store:
        assert store.get([key, *others]) == {key: ANSWER}
        many = [Key.of("model", "prompt", str(i)) for i in range(1200)]
        for other in many:
            store.put(other, ANSWER)
        assert set(store.get(many)) == set(many)


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


def test_a_file_that_is_no_store_is_refused_and_left_as_it_is(tmp_path: Path) -> None:
    def refused(path: Path, error: type[Exception], message: str) -> None:
        before = path.read_bytes() if path.is_file() else None
        with pytest.raises(error, match=message):
            QueryStore(path).open()
        assert (path.read_bytes() if path.is_file() else None) == before
        assert not [found for found in tmp_path.iterdir() if found.name.startswith(f"{path.name}-")]

    (tmp_path / "text").write_text("not a database, and long enough to be looked at as one" * 100)
    refused(tmp_path / "text", ValueError, "text is no store of queries, or a damaged one")
    refused(tmp_path, OSError, "cannot be used: unable to open")
    for name, statement in (("other", "CREATE TABLE photographs (name)"), ("alike", "CREATE TABLE answers (name)")):
        with closing(sqlite3.connect(tmp_path / name)) as database:
            database.execute(statement)
        refused(tmp_path / name, ValueError, f"{name} is no store of queries: its tables are another program's")
    with QueryStore(tmp_path / "later") as store:
        for number in range(200):
            store.put(Key.of("g", "p", str(number)), ANSWER)
    shutil.copy(tmp_path / "later", tmp_path / "damaged")
    with closing(sqlite3.connect(tmp_path / "later")) as database:
        # As versions before 0.2.0 left it.
        database.execute("CREATE TABLE claims (document)")
        database.execute("PRAGMA user_version = 1")
    with QueryStore(tmp_path / "later") as store:
        assert len(store) == 200
    with closing(sqlite3.connect(tmp_path / "later")) as database:
        assert database.execute("PRAGMA user_version").fetchone() == (2,)
        database.execute("PRAGMA user_version = 99")
    refused(tmp_path / "later", ValueError, "later version")
    content = bytearray((tmp_path / "damaged").read_bytes())
    content[-5000:-1000] = b"\xff" * 4000
    (tmp_path / "damaged").write_bytes(content)
    refused(tmp_path / "damaged", ValueError, "damaged one")


def test_a_store_that_breaks_while_it_is_used_is_said_and_closes(endpoint: Endpoint, tmp_path: Path) -> None:
    with chain_for(endpoint, tmp_path / "q.sqlite") as chain:
        with closing(sqlite3.connect(tmp_path / "q.sqlite")) as other:
            other.execute("DROP TABLE answers")
        with pytest.raises(OSError, match=r"q\.sqlite cannot be used: no such table"):
            chain.generate(make_documents(3))


def test_a_store_of_an_earlier_version_is_used_on(tmp_path: Path) -> None:
    key = Key.of("g", "p", "text")
    with QueryStore(tmp_path / "q.sqlite") as store:
        store.put(key, ANSWER)
    with closing(sqlite3.connect(tmp_path / "q.sqlite")) as database:
        database.execute("CREATE TABLE claims (generator TEXT, prompt TEXT, document TEXT, owner TEXT)")
        database.execute("CREATE TABLE owners (owner TEXT, machine TEXT, pid INTEGER, alive_until REAL)")
    with QueryStore(tmp_path / "q.sqlite") as store:
        assert store.get([key]) == {key: ANSWER}


def test_no_file_is_made_for_sources_that_cannot_be_used(tmp_path: Path) -> None:
    (tmp_path / "prompts.yaml").write_text("- a list")
    for options in ({"query_prompts": str(tmp_path / "nowhere")}, {"query_prompts": str(tmp_path / "prompts.yaml")}):
        with pytest.raises(ValueError, match="prompts"):
            make_chain("openai:tiny", QueryOptions(**options), store=tmp_path / "made" / "q.sqlite")
    assert not (tmp_path / "made").exists()


def write_documents(folder: Path, number: int) -> Path:
    """Documents as a BEIR folder, of which the first answers a query."""
    documents = {d.doc_id: d.text for d in make_documents(number)}
    return write_beir(Collection.from_dict(documents, {"q": "which river?"}, {"q": {"d0": 1}}), folder)


def test_no_file_and_no_line_holds_the_key(endpoint: Endpoint, tiny_model_path: Path, tmp_path: Path) -> None:
    """Neither of what is generated nor of a run that fails half-way, whose endpoint repeats what it was sent."""
    collection = write_documents(tmp_path / "collection", 20)
    asked = ["--negative-queries", "openai:tiny", "--query-base-url", endpoint.base_url]
    mined = ["mine", "--model", str(tiny_model_path), "--num-negatives", "1", "--range-max", "5"]
    for number, fault in enumerate((None, lambda document, before: "500" if before < 1 else "401")):
        endpoint.fault = fault
        command = [*mined, "--collection", str(collection), *asked, "--output", str(tmp_path / f"out{number}")]
        result = CliRunner().invoke(app, command)
        assert (result.exit_code == 0) is (fault is None), result.output
        assert KEY not in result.output
    files = [file for file in tmp_path.rglob("*") if file.is_file()]
    assert {"queries.sqlite"} <= {file.name for file in files}
    assert not [file for file in files if KEY.encode() in file.read_bytes()]


def test_a_killed_process_loses_what_was_in_flight_and_another_finishes_its_work(
    endpoint: Endpoint, tmp_path: Path
) -> None:
    endpoint.latency = 0.03
    endpoint.knows_idempotency = False  # nothing but the store keeps anybody from paying twice
    collection = write_documents(tmp_path / "collection", 400)
    store = tmp_path / "q.sqlite"
    command = [sys.executable, "-m", "st_clp", "queries", "--collection", str(collection)]
    command += ["--negative-queries", "judgments,openai:tiny", "--query-base-url", endpoint.base_url]
    command += ["--query-store", str(store), "--query-concurrency", "4"]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)

    def until(billed: int) -> int:
        deadline = time.monotonic() + 90
        while endpoint.billed.total() < billed and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.005)
        assert process.poll() is None
        return endpoint.billed.total()

    def work() -> None:
        with chain_for(endpoint, store, seed=42, query_concurrency=4) as chain:
            found.append(len(chain.generate(make_documents(400)[1:])[0]))

    assert until(40) < 300
    found: list[int] = []
    worker = threading.Thread(target=work)  # this process shares the work, and finishes it
    worker.start()
    assert until(150) < 380
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    worker.join()
    assert found == [399]  # the judgments know a query for the other one
    assert set(endpoint.billed) == {str(i) for i in range(1, 400)}
    assert endpoint.billed.total() <= 399 + 4  # in flight when it was killed
    result = CliRunner().invoke(app, command[3:])
    assert result.exit_code == 0, result.output
    text = " ".join(result.output.split())
    assert "400 of 400 documents have a query 1 from judgments 399 from openai" in text
    assert endpoint.billed.total() <= 399 + 4
    assert "spent so far" in text


def test_a_dry_run_counts_and_sends_and_writes_nothing(
    endpoint: Endpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")  # what is spent must be seen on a narrow terminal too
    collection = write_documents(tmp_path / "collection", 30)
    store = tmp_path / "q.sqlite"
    command = ["queries", "--collection", str(collection), "--negative-queries", "judgments,openai:tiny,title"]
    command += ["--query-base-url", endpoint.base_url, "--query-store", str(store)]
    command += ["--query-price-prompt", "2", "--query-price-completion", "8"]

    def run(*more: str) -> str:
        result = CliRunner().invoke(app, [*command, *more])
        assert result.exit_code == 0, result.output
        return " ".join(result.output.split())

    text = run("--dry-run")
    assert "judgments: asked for 30 documents, 1 of them known" in text
    assert "asked for 29 documents, 0 of them known, 29 texts to generate for" in text
    assert not endpoint.requests
    assert not store.exists()
    about, most = re.search(r"to write, about ([\d.]+) \(at the very most [\d,]+ tokens, ([\d.]+)\)", text).groups()  # type: ignore[union-attr]
    endpoint.fault = lambda document, before: "text" if document == "7" else None
    text = run()
    assert "30 of 30 documents have a query" in text
    assert "1 from lead" in text
    assert re.search(r"Queries by openai: 100%.*spent [\d.]+ of about [\d.]+", text)
    assert "1 without one, openai: not JSON" in text
    spent = float(re.search(r"tokens, ([\d.]+) in money kept", text).group(1))  # type: ignore[union-attr]
    assert float(about) / 4 < spent < float(most)
    sent = len(endpoint.requests)
    text = run("--dry-run")
    assert "28 of them known, 1 tried before without a good query, 0 texts to generate for" in text
    assert "title: asked for 1 documents, 1 of them known" in text
    assert len(endpoint.requests) == sent


def test_only_the_negatives_of_mined_rows(endpoint: Endpoint, tiny_model_path: Path, tmp_path: Path) -> None:
    collection = write_documents(tmp_path / "collection", 30)
    common = ["--collection", str(collection), "--negative-queries", "openai:tiny"]
    common += ["--query-base-url", endpoint.base_url, "--query-store", str(tmp_path / "q.sqlite")]

    def run(*arguments: str) -> str:
        result = CliRunner().invoke(app, [*arguments])
        assert result.exit_code == 0, result.output
        return " ".join(result.output.split())

    mining = ["mine", "--model", str(tiny_model_path), "--output", str(tmp_path / "out")]
    run(*mining, *common[:2], "--num-negatives", "5")
    (rows,) = (tmp_path / "out").glob("*.jsonl")
    assert "5 of 5 documents have a query" in run("queries", *common, "--rows", str(rows))
    assert len(endpoint.requests) == 5
    # Mining with the same sources finds them in the store.
    text = run(*mining, *common, "--num-negatives", "5")
    assert len(endpoint.requests) == 5
    assert "5 of them from openai" in text
    assert "st-clp queries --dry-run says" in run(*mining, *common, "--dry-run")
    (tmp_path / "rows.jsonl").write_text('{"query": "x"}\n')
    result = CliRunner().invoke(app, ["queries", *common, "--rows", str(tmp_path / "rows.jsonl")])
    assert result.exit_code == 1
    assert "no file that st-clp mine wrote" in " ".join(result.output.split())
