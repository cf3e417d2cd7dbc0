"""Every message that the troubleshooting page lists is one that somebody can meet."""

from __future__ import annotations

import errno
import json
import logging
import os
import re
import shutil
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest
import torch
from sentence_transformers import SentenceTransformer
from transformers import AutoModel
from typer.testing import CliRunner

from st_clp import Collection, cli, upcycle
from st_clp.encoding import encode_documents
from st_clp.encoding.shards import ShardFiles
from st_clp.mining import mine

PAGE = Path(__file__).parents[2] / "docs" / "troubleshooting.md"
# Advice about figures is no message.
NO_MESSAGE = "The scores went down"


class Scene:
    """What is at hand to go wrong, and what was said."""

    def __init__(self, model: Path, collection: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.model, self.collection, self.folder, self.monkeypatch = model, collection, folder, monkeypatch

    def command(self, *arguments: object) -> str:
        """What a command that fails prints."""
        result = CliRunner().invoke(cli.app, [*map(str, arguments)])
        assert result.exit_code == 1, result.output
        return result.output

    def run(self, *arguments: object, model: object = None, collection: object = None) -> str:
        command = ["run", "--model", model or self.model, "--collection", collection or self.collection]
        return self.command(*command, "--output", self.folder / "out", *arguments)

    def copied(self) -> Path:
        return shutil.copytree(self.collection, self.folder / "collection")


def no_model(scene: Scene) -> str:
    return scene.run(model=scene.folder / "nowhere")


def no_tokenizer(scene: Scene) -> str:
    model = shutil.copytree(scene.model, scene.folder / "model")
    for path in model.rglob("*"):
        if path.name.startswith(("tokenizer", "vocab", "special_tokens")):
            path.unlink()
    return scene.run(model=model)


def a_mixture(scene: Scene) -> str:
    upcycle(SentenceTransformer(str(scene.model), device="cpu")).save(str(scene.folder / "moe"))
    with pytest.raises(ValueError, match="mixture") as refused:
        AutoModel.from_pretrained(str(scene.folder / "moe"))
    return str(refused.value)


def a_run_is_there(scene: Scene) -> str:
    _begun(scene)
    return scene.run("--epochs", 1)


def other_settings(scene: Scene) -> str:
    _begun(scene)
    return scene.run("--epochs", 1, "--resume", "--max-seq-length", 20)


def _begun(scene: Scene) -> None:
    """A run that was stopped by its disk once it had evaluated."""

    def full(*arguments: object, **options: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with scene.monkeypatch.context() as patch:
        patch.setattr("st_clp.run.stages.mine", full)
        scene.run("--epochs", 1)


def nothing_relevant(scene: Scene) -> str:
    collection = scene.copied()
    for path in (collection / "qrels").iterdir():
        path.write_text(path.read_text().replace("\t1\n", "\t0\n"))
    return scene.run(collection=collection)


def no_join(scene: Scene) -> str:
    collection = scene.copied()
    for path in (collection / "qrels").iterdir():
        path.write_text(path.read_text().replace("\td", "\tother-"))
    return scene.run(collection=collection)


def absent_documents(scene: Scene) -> str:
    collection = scene.copied()
    with open(collection / "qrels" / "train.tsv", "a", encoding="utf-8") as file:
        file.write("q1-0\tabsent\t1\n")
    model = SentenceTransformer(str(scene.model), device="cpu")
    return str(mine(model, Collection.load(str(collection), split="train"), show_progress_bar=False).account)


def too_few_documents(scene: Scene) -> str:
    return scene.run("--num-negatives", 99, "--range-max", 200)


def out_of_memory(scene: Scene) -> str:
    model = SentenceTransformer(str(scene.model), device="cpu")
    forward = model.forward

    def small(features: dict[str, torch.Tensor], **options: object) -> object:
        if features["input_ids"].numel() > 64:
            raise torch.OutOfMemoryError("out of memory")
        return forward(features, **options)

    scene.monkeypatch.setattr(model, "forward", small)
    said: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: said.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("st_clp").addHandler(handler)
    try:
        list(encode_documents(model, ["the river is old"] * 40, dtype="model"))
    finally:
        logging.getLogger("st_clp").removeHandler(handler)
    return "\n".join(said)


def disk_full(scene: Scene) -> str:
    def full(*arguments: object, **options: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    scene.monkeypatch.setattr(ShardFiles, "add", full)
    return scene.run()


def key_refused(scene: Scene) -> str:
    class Refusing(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            self.rfile.read(int(self.headers["Content-Length"]))
            body = json.dumps({"error": {"message": "no", "code": "invalid_api_key"}}).encode()
            self.send_response(401)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *arguments: object) -> None:
            pass

    server = HTTPServer(("127.0.0.1", 0), Refusing)
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    scene.monkeypatch.setenv("OPENAI_API_KEY", "wrong")
    try:
        address = f"http://127.0.0.1:{server.server_address[1]}/v1"
        command = ["queries", "--collection", scene.collection, "--negative-queries", "openai:tiny"]
        return scene.command(
            *command, "--query-base-url", address, "--query-store", scene.folder / "q.sqlite", "--query-retries", 0
        )
    finally:
        server.shutdown()
        server.server_close()


# The beginning of each message on the page, to what brings it about.
MET: dict[str, Callable[[Scene], str]] = {
    "the model '…' cannot be loaded: there is no folder": no_model,
    "there is no tokenizer in": no_tokenizer,
    "this folder holds a mixture of experts": a_mixture,
    "… holds a run already": a_run_is_there,
    "… was started with other settings": other_settings,
    "no query has a relevant document": nothing_relevant,
    "no judgment joins a query": no_join,
    "N  left out: judgments of a document": absent_documents,
    "the corpus has N documents, too few": too_few_documents,
    "out of memory: going on": out_of_memory,
    "No space left on": disk_full,
    "… refuses the key": key_refused,
}


def listed() -> list[str]:
    return [
        line for line in re.findall(r"^\*\*(.+)\*\*$", PAGE.read_text(encoding="utf-8"), re.M) if line != NO_MESSAGE
    ]


def test_each_listed_message_has_somebody_who_meets_it() -> None:
    for line in listed():
        assert [start for start in MET if line.startswith(f"`{start}")], f"nothing brings about {line}"
    assert len(listed()) == len(MET)


@pytest.mark.parametrize("start", MET)
def test_the_message_is_as_listed(
    start: str, tiny_model_path: Path, collection_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (line,) = [line for line in listed() if line.startswith(f"`{start}")]
    said = " ".join(MET[start](Scene(tiny_model_path, collection_path, tmp_path, monkeypatch)).split())
    message = " ".join(re.findall(r"`([^`]*)`", line)[0].split())
    pattern = re.escape(message).replace("…", ".*").replace(r"\ N\ ", r"\ [\d,]+\ ")
    pattern = re.sub(r"^N\\ ", r"[\\d,]+ ", pattern)
    assert re.search(pattern, said), f"{message!r} is not in {said!r}"
