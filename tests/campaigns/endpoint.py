"""An OpenAI-compatible endpoint in a process of its own, whose answers depend on nothing but the question."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import signal
import threading
import time
import urllib.request
from collections.abc import Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, NamedTuple

WORDS = "river lake mountain city country bank school king queen bird fish tree".split()


class Answer(NamedTuple):
    """An answer that is none of the good ones: for the document that asks for it, or for all where it is an error."""

    status: int
    body: bytes
    headers: dict[str, str]


def completion(content: str, **usage: Any) -> dict[str, Any]:
    """An answer of the chat completions API."""
    counted = {"prompt_tokens": 20, "completion_tokens": 5, "total_tokens": 25, **usage}
    choice = {"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": content}}
    return {
        "id": "x",
        "object": "chat.completion",
        "created": 0,
        "model": "tiny",
        "choices": [choice],
        "usage": counted,
    }


def _query_for(message: str) -> str:
    number = int.from_bytes(hashlib.blake2b(message.encode("utf-8", "replace"), digest_size=4).digest(), "big")
    return f"which {WORDS[number % 12]} is {number % 1000} of the {WORDS[number // 12 % 12]}"


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    lock = threading.Lock()
    requests = 0
    latency = 0.0
    answers: Sequence[Answer] = ()

    def log_message(self, *arguments: Any) -> None:
        pass

    def do_GET(self) -> None:
        self._send(Answer(200, str(_Handler.requests).encode(), {}))

    def do_POST(self) -> None:
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            with _Handler.lock:
                _Handler.requests += 1
            time.sleep(self.latency)
            self._send(self._answer(body["messages"][-1]["content"]))

    def _answer(self, message: str) -> Answer:
        which = self.path.split("/")[1]
        if which != "v1":
            bad = self.answers[int(which)]
            if bad.status != 200 or "document 1" in message:
                return bad
        content = json.dumps({"query": _query_for(message)})
        return Answer(200, json.dumps(completion(content)).encode(), {})

    def _send(self, answer: Answer) -> None:
        self.send_response(answer.status)
        for name, value in {"Content-Type": "application/json", **answer.headers}.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(answer.body)))
        self.end_headers()
        self.wfile.write(answer.body)


class _Server(ThreadingHTTPServer):
    request_queue_size = 256
    daemon_threads = True

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Say nothing: a client that was killed breaks its connections."""


class Endpoint:
    """The server's process.

    Args:
        latency: Seconds before each answer.
        answers: What it answers at ``bad_url``: errors to every question, others to that about document 1 alone.
    """

    def __init__(self, latency: float = 0.0, answers: Sequence[Answer] = ()) -> None:
        server = _Server(("127.0.0.1", 0), _Handler)
        self._address = f"http://127.0.0.1:{server.server_address[1]}"
        parent = os.getpid()
        self._pid = os.fork()
        if self._pid:
            server.server_close()
            return
        try:
            os.setpgid(0, 0)
            _Handler.latency, _Handler.answers = latency, answers
            threading.Thread(target=_end_with, args=(parent,), daemon=True).start()
            server.serve_forever()
        finally:
            os._exit(0)

    @property
    def url(self) -> str:
        """What to give as ``--query-base-url``."""
        return f"{self._address}/v1"

    def bad_url(self, number: int) -> str:
        """The same, for the answer of this number."""
        return f"{self._address}/{number}/v1"

    @property
    def requests(self) -> int:
        """How many have come."""
        with urllib.request.urlopen(self._address, timeout=10) as answer:
            return int(answer.read())

    def __enter__(self) -> Endpoint:
        return self

    def __exit__(self, *exception: object) -> None:
        os.kill(self._pid, signal.SIGKILL)
        os.waitpid(self._pid, 0)


def _end_with(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(0.5)
    os._exit(0)
