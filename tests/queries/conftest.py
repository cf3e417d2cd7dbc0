"""Tiny models that write, and a real HTTP server with one behind it that can be told to fail."""

from __future__ import annotations

import json
import re
import socket
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from functools import lru_cache
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
)

from st_clp.data import Document

WORDS = (
    "a an the of in on is was who what where when which river lake mountain city country money bank language people "
    "capital north south east west red blue green old new big small one two three four five six seven cat dog horse"
).split()
KEY = "sk-a-very-secret-key-0123456789"


def make_documents(number: int) -> list[Document]:
    return [
        Document(f"d{i}", f"document {i} : the {WORDS[i % 40]} of the {WORDS[(i * 7 + 3) % 40]}") for i in range(number)
    ]


Fault = Callable[[str, int], str | None]


class Endpoint:
    """A server on loopback that speaks the OpenAI chat completions API, with a real tiny causal model behind it.

    Attributes:
        fault: (number of the document, how many requests came for it before) to how to fail; None answers, and what
            is JSON is the answer.
        billed: Number of the document to the completions that were billed for it.
        requests: Everything that came: (headers, body).
        tokens: Tokens that were billed.
    """

    def __init__(self, model_path: Path) -> None:
        self.fault: Fault = lambda document, before: None
        self.latency = 0.0
        self.retry_after = "0"
        self.slow = 1.5
        self.counts_usage = True
        self.knows_idempotency = True
        self.refuses: set[str] = set()
        self.billed: Counter[str] = Counter()
        self.tokens = 0
        self.requests: list[tuple[dict[str, str], dict[str, Any]]] = []
        self.at_once = self.most_at_once = 0
        self._asked: Counter[str] = Counter()
        self._answered: dict[str, dict[str, Any]] = {}
        self._lock = threading.Lock()
        self._tokenizer = AutoTokenizer.from_pretrained(model_path)
        self._model = AutoModelForCausalLM.from_pretrained(model_path)
        self._server = _Server(("127.0.0.1", 0), self._handler())
        self._server.daemon_threads = True
        self.base_url = f"http://127.0.0.1:{self._server.server_address[1]}/v1"
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True)
        self._thread.start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()

    @lru_cache(maxsize=4096)  # noqa: B019
    def write(self, words: str) -> tuple[str, int]:
        """What the model writes after these words, and how many tokens that is."""
        inputs = self._tokenizer(words, return_tensors="pt")
        with torch.inference_mode():
            out = self._model.generate(
                **{name: inputs[name] for name in ("input_ids", "attention_mask")},
                max_new_tokens=3,
                do_sample=False,
                pad_token_id=0,
                suppress_tokens=[0, 1, 2],
            )[0, inputs["input_ids"].shape[1] :]
        return "which " + self._tokenizer.decode(out), len(out) + 1

    def _handler(self) -> type[BaseHTTPRequestHandler]:
        endpoint = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *arguments: Any) -> None:
                pass

            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                with endpoint._lock:
                    endpoint.requests.append(({n.title(): v for n, v in self.headers.items()}, body))
                    endpoint.at_once += 1
                    endpoint.most_at_once = max(endpoint.most_at_once, endpoint.at_once)
                try:
                    endpoint._serve(self, body)
                except (BrokenPipeError, ConnectionResetError):
                    self.close_connection = True
                finally:
                    with endpoint._lock:
                        endpoint.at_once -= 1

            def answer(self, status: int, content: dict[str, Any] | bytes, **headers: str) -> None:
                data = content if isinstance(content, bytes) else json.dumps(content).encode()
                self.send_response(status)
                for name, value in headers.items():
                    self.send_header(name.replace("_", "-"), value)
                self.send_header("Content-Type", "text/html" if data.startswith(b"<") else "application/json")
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

            def cut(self) -> None:
                self.close_connection = True
                self.connection.shutdown(socket.SHUT_RDWR)

        return Handler

    def _serve(self, handler: Any, body: dict[str, Any]) -> None:
        message = body["messages"][-1]["content"]
        document = re.search(r"document (\d+)", message).group(1)  # type: ignore[union-attr]
        with self._lock:
            fault = self.fault(document, self._asked[document])
            self._asked[document] += 1
        time.sleep(self.latency)
        for name in self.refuses & body.keys():
            advice = " Use 'max_completion_tokens' instead." if name == "max_tokens" else ""
            handler.answer(
                400, {"error": {"message": f"Unsupported parameter: '{name}'.{advice}", "code": "unsupported"}}
            )
            return
        if fault is not None and fault.isdigit():
            # Servers are known to say the key again.
            said = {"error": {"message": f"no: {handler.headers.get('Authorization')}", "code": None}}
            handler.answer(int(fault), said, Retry_After=self.retry_after)
        elif fault == "quota":
            handler.answer(429, {"error": {"message": "no", "code": "insufficient_quota"}})
        elif fault == "cut":
            handler.cut()
        elif fault == "html":
            handler.answer(200, b"<html>welcome</html>")
        elif fault is not None and fault[0] in '{["':
            handler.answer(200, fault.encode())
        elif fault == "slow":
            time.sleep(self.slow)
            handler.cut()
        else:
            self._complete(handler, body, message, document, fault)

    def _complete(self, handler: Any, body: dict[str, Any], message: str, document: str, fault: str | None) -> None:
        identity = handler.headers.get("Idempotency-Key")
        with self._lock:
            answer = self._answered.get(identity) if self.knows_idempotency else None
            if answer is None:
                written, tokens = self.write(" ".join(message.partition("Passage:")[2].split()[-4:-1]))
                content: str | None = {
                    None: json.dumps({"query": f"{written} {document}"}),
                    "fenced": f"```json\n{json.dumps({'query': written})}\n```",
                    "empty": "",
                    "blank": json.dumps({"query": " ?! "}),
                    "null": None,
                    "long": json.dumps({"query": written * 100}),
                    "text": f"Sure! {written}",
                    "list": json.dumps([written]),
                    "number": json.dumps({"query": 7}),
                    "language": json.dumps({"query": "강은 어디에 있습니까"}),
                    "cut after": json.dumps({"query": f"{written} {document}"}),
                }[fault]
                usage = {"prompt_tokens": len(self._tokenizer(message)["input_ids"]), "completion_tokens": tokens}
                answer = {
                    "id": "x",
                    "object": "chat.completion",
                    "created": 0,
                    "model": body["model"],
                    "choices": [
                        {"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": content}}
                    ],
                }
                if self.counts_usage:
                    answer["usage"] = {**usage, "total_tokens": sum(usage.values())}
                self._answered[identity] = answer
                self.billed[document] += 1
                self.tokens += sum(usage.values())
        if fault == "cut after":
            handler.cut()
        else:
            handler.answer(200, answer)


class _Server(ThreadingHTTPServer):
    request_queue_size = 256


@pytest.fixture
def endpoint(tiny_causal_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Endpoint]:
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    monkeypatch.delenv("OPENAI_BASE_URL", raising=False)
    monkeypatch.setattr("st_clp.queries.chat.FIRST_WAIT", 0.01)
    server = Endpoint(tiny_causal_path)
    yield server
    server.close()
