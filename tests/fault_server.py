"""An OpenAI-compatible server that fails in every way servers do, and a backend that asks it."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from decoding import OpenAIBackend
from decoding.backends import openai as backend_module
from decoding.backends import prefix as prefix_module

KEY = "sk-test-7f3a9d5e1b2c4860"
OUTLINE = "1. Morning sun\n2. Deep pots\n3. Daily water"
Script = Callable[[int, Mapping[str, Any]], str]
"""The number of a request (from 0) and its body → what to do: "ok" or the name of a fault."""


def answer_to(body: Mapping[str, Any]) -> str:
    """What the model "says": plain questions are echoed, so that an answer in the wrong place shows."""
    if "prompt" not in body and body["messages"][-1]["role"] == "assistant":
        return "day, Thursday" if body.get("continue_final_message") else "Monday, Tuesday"
    asked = body["prompt"] if "prompt" in body else body["messages"][-1]["content"]
    if "give only its outline" in asked:
        return OUTLINE
    if "The point to write:" in asked:
        return f"All about {asked.rsplit('. ', 1)[1]}."
    return f"You asked: {asked}"


class FaultServer(ThreadingHTTPServer):
    """Streams answers word by word, or fails as the script says."""

    daemon_threads = True
    request_queue_size = 256

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.script: Script = lambda number, body: "ok"
        self.bodies: list[dict[str, Any]] = []
        self.faults: list[str] = []
        self.times: list[float] = []
        self.headers: list[str] = []
        self.retry_after = "0.3"
        self.thinking_seconds = 0.0
        self.continues: bool | int = True  # or the status with which it refuses what it does not know
        self.read: list[str] = []  # the beginnings of prompts that its cache holds
        self.under_way = self.most_under_way = 0
        self.lock = threading.Lock()
        self.stopping = threading.Event()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/v1"

    def handle_error(self, request: object, client_address: object) -> None:
        """Clients that hang up are what this is about."""


class Handler(BaseHTTPRequestHandler):
    server: FaultServer
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: object) -> None:
        pass

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        server = self.server
        with server.lock:
            fault = server.script(len(server.bodies), body)
            server.bodies.append(body)
            server.faults.append(fault)
            server.times.append(time.monotonic())
            server.headers.append(self.headers.get("Authorization", ""))
            server.under_way += 1
            server.most_under_way = max(server.most_under_way, server.under_way)
        prompt = json.dumps(body.get("messages", body.get("prompt")))
        with server.lock:
            self.cached = 60 if any(prompt[:80] == read[:80] for read in server.read) else 0
        server.stopping.wait(server.thinking_seconds)
        with server.lock:
            server.read.append(prompt)
        try:
            self.answer(fault, body)
        finally:
            with server.lock:
                server.under_way -= 1

    def answer(self, fault: str, body: dict[str, Any]) -> None:
        if fault in ("429", "500", "503", "401"):
            # Some servers repeat the key they did not like.
            self.whole(int(fault), {"error": {"message": f"no: {self.headers.get('Authorization')}", "code": None}})
        elif fault == "html":
            self.whole(200, "<html>Maintenance</html>", "text/html")
        elif fault == "json":
            self.whole(200, {"choices": []})
        elif body.get("stream"):
            self.stream(fault, body)
        elif self.server.continues not in (True, False):
            self.whole(self.server.continues, {"error": {"message": "unexpected field continue_final_message"}})
        else:
            if not self.server.continues:
                del body["continue_final_message"]
            choice = {"index": 0, "message": {"role": "assistant", "content": answer_to(body)}}
            self.whole(200, {"choices": [choice], "usage": {"prompt_tokens": 30, "completion_tokens": 4}})

    def whole(self, status: int, body: object, kind: str = "application/json") -> None:
        data = (body if isinstance(body, str) else json.dumps(body)).encode()
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(data)))
        if status == 429:
            self.send_header("Retry-After", self.server.retry_after)
        self.end_headers()
        self.wfile.write(data)

    def stream(self, fault: str, body: dict[str, Any]) -> None:
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream; charset=utf-8")
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        chat = self.path.endswith("/chat/completions")
        words = answer_to(body).split(" ")
        limit = body.get("max_tokens", 10**9)
        pieces = [words[0], *(f" {word}" for word in words[1:])][:limit]
        if fault == "changed" and len(self.server.bodies) > 1:
            pieces[0] = "Otherwise,"
        for place, piece in enumerate(pieces):
            if place == 2:
                if fault == "slow":
                    self.server.stopping.wait(60.0)  # longer than any time limit, on a busy machine too
                elif fault in ("cut", "changed"):
                    self.close_connection = True
                    return
                elif fault == "early":  # ends as if all were well, but the answer is not whole
                    self.chunk("data: [DONE]\n\n")
                    self.chunk("")
                    return
                elif fault == "endless":
                    for _ in range(10_000):
                        self.event({"choices": [{"index": 0, "delta": {"content": "x" * 1000}}]})
                elif fault == "malformed":
                    self.chunk('data: {"choices": [{"del\n\n')
                elif fault == "not-choices":
                    self.event({"object": "chat.completion.chunk"})
                elif fault == "error-event":
                    self.event({"error": {"message": "out of memory", "code": 500}})
            if fault != "empty":
                self.event({"choices": [{"index": 0, **({"delta": {"content": piece}} if chat else {"text": piece})}]})
        if fault == "empty":
            self.event({"choices": []})
        else:
            reason = "length" if len(pieces) == limit else "content_filter" if fault == "filtered" else "stop"
            self.event({"choices": [{"index": 0, "delta": {}, "text": "", "finish_reason": reason}]})
        usage = {
            "prompt_tokens": 100,
            "completion_tokens": 2 * len(pieces),
            "prompt_tokens_details": {"cached_tokens": self.cached},
        }
        if fault != "uncounted":
            self.event({"choices": [], "usage": usage})
        self.chunk("data: [DONE]\n\n")
        self.chunk("")

    def event(self, data: object) -> None:
        self.chunk(f"data: {json.dumps(data)}\n\n")

    def chunk(self, text: str) -> None:
        data = text.encode()
        self.wfile.write(f"{len(data):x}\r\n".encode() + data + b"\r\n")
        self.wfile.flush()


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[FaultServer]:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    monkeypatch.setattr(backend_module, "FIRST_DELAY", 0.02)
    monkeypatch.setattr(prefix_module, "_known", {})  # another test's server may have had the same port
    with FaultServer() as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        yield server
        server.stopping.set()
        server.shutdown()
        thread.join()


def backend(server: FaultServer, **options: Any) -> OpenAIBackend:
    return OpenAIBackend(server.url, "tiny", KEY, **{"timeout": 0.5, "retries": 3, "prefill": False, **options})


def fails_first(fault: str) -> Script:
    return lambda number, body: fault if number == 0 else "ok"
