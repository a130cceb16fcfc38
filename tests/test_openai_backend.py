"""The backend for OpenAI-compatible servers, against a server of our own that fails in every way servers do."""

from __future__ import annotations

import asyncio
import json
import logging
import threading
import time
import tracemalloc
from collections.abc import Callable, Iterator, Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

import decoding
from decoding import CapabilityError, InvalidRequest, OpenAIBackend, SamplingParams
from decoding.backends import openai as backend_module
from decoding.backends import prefix as prefix_module
from decoding.cli import main
from decoding.report import read_run, summarize
from decoding.strategies import Autoregressive, SkeletonOfThought
from decoding.types import Message

KEY = "sk-test-7f3a9d5e1b2c4860"
TRANSIENT = ("429", "500", "slow", "cut", "early")
LASTING = {
    "endless": "far beyond max_new_tokens",
    "malformed": "malformed event",
    "empty": "no choices",
    "html": "text/html",
    "json": "application/json",
    "not-choices": "malformed event",
    "filtered": "content_filter",
    "401": "answered 401",
}
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


def test_an_answer_with_its_usage_and_cost(server: FaultServer) -> None:
    server.read.append(json.dumps([{"role": "user", "content": "What is a fjord?"}]))
    lm = backend(server, prompt_price=1.0, cached_price=0.5, completion_price=4.0)
    pieces: list[str] = []
    out = decoding.generate("What is a fjord?", lm, params=SamplingParams(seed=7), on_text=pieces.append)
    assert out.text == "".join(pieces) == "You asked: What is a fjord?" and len(pieces) == 6
    assert (out.finish_reason, out.error, out.trace, out.tokens) == ("eos", None, [], [])
    metrics = out.metrics
    assert (metrics.prompt_tokens, metrics.reused_tokens, metrics.prefill_tokens, metrics.new_tokens) == (
        100,
        60,
        40,
        12,
    )
    assert 0 < metrics.first_token_seconds <= metrics.seconds < 60  # the client is imported first
    assert (lm.usage.calls, lm.usage.retries, lm.usage.failed, lm.usage.unreported) == (1, 0, 0, 0)
    assert lm.cost == pytest.approx((40 * 1.0 + 60 * 0.5 + 12 * 4.0) / 1e6)
    assert lm.account().endswith("tokens: 100 prompt (60 cached), 12 completion; cost 0.000118")
    assert backend(server).cost is None and "cost" not in backend(server).account()
    (body,) = server.bodies
    assert body["messages"] == [{"role": "user", "content": "What is a fjord?"}]
    assert (body["model"], body["temperature"], body["seed"], body["max_tokens"]) == ("tiny", 0.0, 7, 256)
    assert server.headers == [f"Bearer {KEY}"]


def test_streaming_and_several_event_loops(server: FaultServer) -> None:
    lm = backend(server)
    assert "".join(decoding.stream("One?", lm)) == "You asked: One?"
    assert [g.text for g in decoding.generate(["Two?", "Three?"], lm)] == ["You asked: Two?", "You asked: Three?"]
    stream = decoding.stream("Four, five, six, seven?", lm)
    assert next(stream) == "You"
    stream.close()
    assert decoding.generate("Eight?", lm).text == "You asked: Eight?"
    assert len(lm._sessions) == 1  # those of loops that are gone are dropped


def test_connections_are_closed_with_the_event_loop(server: FaultServer) -> None:
    lm = backend(server)
    decoding.generate("One?", lm)
    (session,) = lm._sessions.values()
    assert session.client.is_closed()


def test_limits_and_stop_reasons(server: FaultServer) -> None:
    short = decoding.generate("What is it?", backend(server), params=SamplingParams(max_new_tokens=3, stop=["\n"]))
    assert (short.text, short.finish_reason) == ("You asked: What", "length")
    assert server.bodies[0]["stop"] == ["\n"]


def test_a_listener_that_has_heard_enough_ends_the_answer(server: FaultServer) -> None:
    pieces: list[str] = []

    def enough(piece: str) -> bool:
        pieces.append(piece)
        return len(pieces) == 2

    lm = backend(server)
    out = decoding.generate("What is it?", lm, on_text=enough)
    assert (out.text, out.finish_reason, out.error) == ("You asked:", "stop", None)
    assert (lm.usage.unreported, out.metrics.new_tokens) == (1, 2)


def test_a_listener_that_fails_ends_the_answer_alone(server: FaultServer) -> None:
    def broken(piece: str) -> None:
        raise KeyError(piece)

    out = decoding.generate("What is it?", backend(server), on_text=broken)
    assert out.error is not None and "on_text failed: KeyError" in out.error and len(server.bodies) == 1


@pytest.mark.parametrize("fault", [*TRANSIENT, "503", "error-event"])
def test_transient_faults_are_tried_again(server: FaultServer, fault: str) -> None:
    server.script = fails_first(fault)
    lm = backend(server)
    pieces: list[str] = []
    out = decoding.generate("What is a fjord?", lm, on_text=pieces.append)
    assert out.error is None and out.text == "".join(pieces) == "You asked: What is a fjord?"
    assert server.faults == [fault, "ok"]
    assert (lm.usage.calls, lm.usage.retries, lm.usage.failed) == (1, 1, 0)


def test_retry_after_is_honored(server: FaultServer) -> None:
    server.script = fails_first("429")
    assert decoding.generate("One?", backend(server)).error is None
    assert server.times[1] - server.times[0] >= 0.3


def test_a_server_that_asks_to_wait_for_long_is_not_waited_for(server: FaultServer) -> None:
    server.script, server.retry_after = fails_first("429"), "3600"
    out = decoding.generate("One?", backend(server))
    assert out.error is not None and "3600 s" in out.error and out.metrics.seconds < 60


@pytest.mark.parametrize("fault", TRANSIENT)
def test_what_was_received_stays_when_all_attempts_fail(server: FaultServer, fault: str) -> None:
    server.script = lambda number, body: fault
    server.retry_after = "0"
    lm = backend(server, retries=1, timeout=0.2)
    out = decoding.generate("What is it?", lm)
    assert out.finish_reason == "error" and out.error is not None and "after 2 attempts" in out.error
    assert out.text == ("" if fault in ("429", "500") else "You asked:")
    assert (lm.usage.calls, lm.usage.failed, lm.usage.retries) == (1, 1, 1)


@pytest.mark.parametrize(("fault", "cause"), LASTING.items())
def test_lasting_faults_are_errors_with_their_cause(server: FaultServer, fault: str, cause: str) -> None:
    server.script = lambda number, body: fault
    out = decoding.generate("What is it?", backend(server))
    assert out.finish_reason == "error" and out.error is not None and cause in out.error
    assert len(server.bodies) == 1
    assert out.text == {
        "malformed": "You asked:",
        "not-choices": "You asked:",
        "endless": "You asked:" + "x" * (len(out.text) - 10),
        "filtered": "You asked: What is it?",
    }.get(fault, "")


def test_another_attempt_that_begins_differently_does_not_mix_two_answers(server: FaultServer) -> None:
    server.script = lambda number, body: "changed"
    pieces: list[str] = []
    out = decoding.generate("What is it?", backend(server, retries=1), on_text=pieces.append)
    assert out.text == "".join(pieces) == "You asked:" and out.error is not None
    assert "another attempt" in out.error or "2 attempts" in out.error


def test_nobody_listening(server: FaultServer) -> None:
    url = server.url
    server.shutdown()
    server.server_close()
    out = decoding.generate("One?", OpenAIBackend(url, "tiny", KEY, retries=1, timeout=1.0))
    assert out.finish_reason == "error" and out.error is not None and "connection failed" in out.error


def test_an_answer_without_usage_counts_events(server: FaultServer) -> None:
    server.script = lambda number, body: "uncounted"
    lm = backend(server)
    assert decoding.generate("What is it?", lm).metrics.new_tokens == 5
    assert lm.usage.unreported == 1


def test_skeleton_without_prefill_gives_instructions(server: FaultServer) -> None:
    lm = backend(server)
    pieces: list[str] = []
    out = decoding.generate("How do I grow tomatoes?", lm, strategy="skeleton", on_text=pieces.append)
    assert out.error is None and list(out.parts) == ["outline", "point 1", "point 2", "point 3"]
    assert all(f"All about {title}." in out.text for title in ("Morning sun", "Deep pots", "Daily water"))
    assert "".join(pieces) == out.text
    assert 'Begin your reply with "1."' in server.bodies[0]["messages"][-1]["content"]
    assert all(body["messages"][-1]["role"] == "user" for body in server.bodies)
    assert not any("repetition_penalty" in body for body in server.bodies)
    parts = out.parts.values()
    assert out.metrics.new_tokens == sum(part.metrics.new_tokens for part in parts) > 0
    assert out.metrics.prompt_tokens == 400
    assert out.metrics.reused_tokens == sum(part.metrics.reused_tokens for part in parts)
    assert out.metrics.first_token_seconds == out.parts["outline"].metrics.first_token_seconds


def test_a_point_that_fails_is_marked_and_the_others_stay(server: FaultServer) -> None:
    server.script = lambda number, body: "malformed" if "The point to write: 2." in str(body) else "ok"
    out = decoding.generate("How do I grow tomatoes?", backend(server), strategy="skeleton")
    assert out.finish_reason == "error" and out.error is not None and out.error.startswith("point 2: ")
    assert "All about Morning sun." in out.text and "All about Daily water." in out.text


def test_prefill_where_the_server_continues_a_message(server: FaultServer) -> None:
    lm = backend(server, prefill=True)
    decoding.generate("How do I grow tomatoes?", lm, strategy="skeleton")
    body = server.bodies[0]
    assert body["messages"][-1] == {"role": "assistant", "content": "1."}
    assert body["continue_final_message"] is True and body["add_generation_prompt"] is False


@pytest.mark.parametrize("continues", [True, False, 400, 422])
def test_prefill_is_found_out_once_and_only_for_strategies_that_use_it(
    server: FaultServer, continues: bool | int
) -> None:
    server.continues = continues
    lm = backend(server, prefill=None)
    decoding.generate("One?", lm)
    assert len(server.bodies) == 1 and "prefill" not in lm.capabilities
    decoding.generate("How do I grow tomatoes?", lm, strategy="skeleton")
    probe, outline = server.bodies[1:3]
    assert probe["messages"][-1]["role"] == "assistant" and probe["max_tokens"] == 4
    assert ("prefill" in lm.capabilities) == (continues is True)
    assert (outline["messages"][-1]["role"] == "assistant") == (continues is True)
    assert lm.usage.calls == len(server.bodies) - (continues not in (True, False))
    asked = len(server.bodies)
    decoding.generate("How do I grow plums?", other := backend(server, prefill=None), strategy="skeleton")
    assert len(server.bodies) == 2 * asked - 2  # no second plain answer, no second probe
    assert other.capabilities == lm.capabilities


def test_a_server_that_did_not_answer_is_asked_again(server: FaultServer) -> None:
    server.script = lambda number, body: "401" if number == 0 else "ok"
    lm = backend(server, prefill=None)
    for prefills in (False, True):
        decoding.generate("How do I grow tomatoes?", lm, strategy="skeleton")
        assert ("prefill" in lm.capabilities) == prefills


@pytest.mark.parametrize("warm", [0, 60])
def test_a_shared_prefix_is_warmed_by_the_first_call(server: FaultServer, warm: int) -> None:
    server.thinking_seconds = 0.4  # all that are sent together arrive within it
    lm = backend(server, warm_prefix=warm, timeout=5.0)
    long = "Here is a text that all of the questions are about: " + "once upon a time " * 10
    decoding.generate([f"{long}{n}?" for n in range(6)], lm)
    assert lm.usage.cached_tokens == (5 * 60 if warm else 0)
    assert server.most_under_way <= 5 if warm else server.most_under_way == 6


def test_calls_that_share_nothing_do_not_wait_for_each_other(server: FaultServer) -> None:
    server.thinking_seconds = 0.4
    decoding.generate([f"{n}: " + "a question " * 20 for n in range(6)], backend(server, warm_prefix=60, timeout=5.0))
    assert server.most_under_way == 6


def test_nobody_waits_for_a_first_call_that_fails(server: FaultServer) -> None:
    server.script = lambda number, body: "401" if number == 0 else "ok"
    answers = decoding.generate(["a question " * 20 + str(n) for n in range(4)], backend(server, warm_prefix=60))
    assert [answer.error is None for answer in answers] == [False, True, True, True]


def test_the_completions_endpoint_takes_text_as_it_is(server: FaultServer) -> None:
    assert backend(server, endpoint="completions", prefill=False).capabilities == {"text"}
    lm = backend(server, endpoint="completions", prefill=None)
    assert lm.capabilities == {"text", "prefill"}
    assert decoding.generate("Once upon a time", lm).text == "You asked: Once upon a time"
    run = lm.complete("Q: why?", SamplingParams(), Autoregressive(), prefill="\nA:")
    assert asyncio.run(run).error is None
    decoding.generate([1, 2, 3], lm)
    messages: list[Message] = [{"role": "user", "content": "One"}, {"role": "user", "content": "Two"}]
    decoding.generate(messages, lm)
    assert [body["prompt"] for body in server.bodies[1:]] == ["Q: why?\nA:", [1, 2, 3], "One\n\nTwo"]


@pytest.mark.parametrize(
    "changed",
    [{"top_k": 5}, {"min_p": 0.1}, {"repetition_penalty": 1.2}, {"min_new_tokens": 4}, {"ignore_eos": True}],
    ids=str,
)
def test_parameters_without_a_field_are_refused_unless_the_server_is_said_to_take_them(
    server: FaultServer, changed: dict[str, Any]
) -> None:
    params = SamplingParams(**changed)
    with pytest.raises(InvalidRequest, match=next(iter(changed))):
        decoding.generate("One?", backend(server), params=params)
    assert not server.bodies
    assert decoding.generate("One?", backend(server, extra_body=True), params=params).error is None
    (name, value) = next(iter(changed.items()))
    assert server.bodies[0]["min_tokens" if name == "min_new_tokens" else name] == value


@pytest.mark.parametrize("prompt", ["", "  ", [1, 2], [{"role": "user"}]], ids=str)
def test_prompts_that_make_no_sense(server: FaultServer, prompt: Any) -> None:
    with pytest.raises(InvalidRequest):
        decoding.generate(prompt, backend(server))
    with pytest.raises(InvalidRequest, match="logprobs"):
        decoding.generate("One?", backend(server), params=SamplingParams(logprobs=True))
    assert not server.bodies


@pytest.mark.parametrize("strategy", ["speculative", "jacobi", "skeleton(inner=jacobi)"])
def test_strategies_that_need_tokens_are_refused_up_front(server: FaultServer, strategy: str) -> None:
    with pytest.raises(CapabilityError, match="local model"):
        decoding.generate("One?", backend(server), strategy=strategy)
    assert not server.bodies


@pytest.mark.parametrize(
    "options",
    [
        {"base_url": "127.0.0.1:8000"},
        {"base_url": f"http://me:{KEY}@127.0.0.1/v1"},
        {"endpoint": "responses"},
        {"concurrency": 0},
        {"retries": -1},
        {"warm_prefix": -1},
        {"timeout": float("inf")},
    ],
    ids=lambda options: next(iter(options)),
)
def test_options_that_make_no_sense(options: dict[str, Any]) -> None:
    with pytest.raises(InvalidRequest) as error:
        OpenAIBackend(**{"base_url": "http://127.0.0.1/v1", "model": "tiny", **options})
    assert KEY not in str(error.value)


def test_no_more_calls_at_once_than_allowed(server: FaultServer) -> None:
    server.thinking_seconds = 0.05
    lm = backend(server, concurrency=3, timeout=5.0)
    answers = decoding.generate([f"Question {n}?" for n in range(20)], lm)
    assert [g.text for g in answers] == [f"You asked: Question {n}?" for n in range(20)]
    assert 1 < server.most_under_way <= 3


@pytest.mark.parametrize("strategy", ["autoregressive", "skeleton"])
def test_64_answers_at_once_with_a_tenth_of_all_calls_failing(server: FaultServer, strategy: str) -> None:
    kinds = (*TRANSIENT, "malformed", "empty", "html")

    def script(number: int, body: Mapping[str, Any]) -> str:
        return kinds[number // 10 % len(kinds)] if number % 10 == 3 else "ok"

    server.script = script
    lm = backend(server, concurrency=32, timeout=2.0, retries=6)
    questions = [f"Question {n}?" for n in range(64)]
    began = time.monotonic()
    answers = decoding.generate(questions, lm, strategy=strategy)
    assert time.monotonic() - began < 120  # no deadlock; a few seconds on an idle machine
    assert len(answers) == 64
    lasting = sum(fault in LASTING for fault in server.faults)
    transient = sum(fault in TRANSIENT for fault in server.faults)
    failures = [part for answer in answers for part in (answer.parts.values() or [answer]) if part.error is not None]
    assert transient > 0 and lasting > 0
    assert lm.usage.failed == len(failures) == lasting
    assert lm.usage.retries == transient
    for failure in failures:
        assert failure.finish_reason == "error" and failure.error is not None
        assert any(LASTING[kind] in failure.error for kind in kinds if kind in LASTING)
    for question, answer in zip(questions, answers, strict=True):
        assert (answer.error is None) == all(part.error is None for part in answer.parts.values() or [answer])
        if answer.error is not None:
            assert answer.finish_reason == "error"
        elif strategy == "skeleton":
            assert all(f"All about {title}." in answer.text for title in ("Morning sun", "Deep pots", "Daily water"))
        else:
            assert answer.text == f"You asked: {question}"


def test_a_long_queue_holds_no_more_than_its_prompts(server: FaultServer) -> None:
    server.script = lambda number, body: "endless" if number % 10 == 3 else "ok"
    lm = backend(server, concurrency=4, timeout=5.0)
    params = SamplingParams(max_new_tokens=16)
    decoding.generate("One?", lm, params=params)  # the client's own modules
    tracemalloc.start()
    answers = decoding.generate([f"Question {n}?" for n in range(50)], lm, params=params)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert server.most_under_way <= 4
    assert sum(answer.error is not None for answer in answers) == lm.usage.failed == 5
    assert peak < 8e6  # five answers of ten megabytes each were offered


@pytest.mark.parametrize("key", ["sk-one two", "sk-\nabcdef", "sk-schlüssel"])
def test_a_key_that_no_header_can_hold_is_refused_without_showing_it(key: str) -> None:
    with pytest.raises(InvalidRequest) as error:
        OpenAIBackend("http://127.0.0.1/v1", "tiny", key)
    assert key[3:] not in str(error.value)


def test_a_key_from_a_file_may_end_with_a_line_end(server: FaultServer) -> None:
    lm = OpenAIBackend(server.url, "tiny", KEY + "\n")
    assert decoding.generate("One?", lm).error is None and server.headers == [f"Bearer {KEY}"]


def test_the_key_is_shown_nowhere(server: FaultServer, caplog: pytest.LogCaptureFixture, tmp_path: Path) -> None:
    caplog.set_level(logging.DEBUG)
    server.script = lambda number, body: "401"  # with the key in its message
    lm = backend(server)
    out = decoding.generate("One?", lm)
    assert out.error is not None and "401" in out.error
    for text in (repr(lm), str(lm), lm.name, repr(out), caplog.text, str(lm.usage)):
        assert KEY not in text


def test_a_page_as_error_message_is_cut_after_the_key_was_masked(server: FaultServer) -> None:
    lm = backend(server)
    for before in range(260, 310):
        assert KEY[:8] not in lm._presentable("x" * before + " " + KEY)
    assert len(lm._presentable("word " * 1000)) < 310


@pytest.fixture
def questions(tmp_path: Path) -> Path:
    path = tmp_path / "questions.jsonl"
    turns = [["How do I grow tomatoes?"], ["Name a river.", "And one more."]]
    path.write_text(
        "".join(
            json.dumps({"question_id": n, "category": "generic", "turns": turn}) + "\n" for n, turn in enumerate(turns)
        )
    )
    return path


def test_the_command_line_asks_a_server(
    server: FaultServer, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("MY_KEY", KEY)
    options = ["--base-url", server.url, "--model", "served", "--api-key-env", "MY_KEY"]
    assert main(["generate", "Name a river.", *options]) == 0
    assert capsys.readouterr().out == "You asked: Name a river.\n"
    assert server.bodies[0]["model"] == "served" and server.headers == [f"Bearer {KEY}"]
    assert main(["generate", "Name a river.", "--strategy", "jacobi", *options]) == 2
    assert "local model" in capsys.readouterr().err
    assert main(["generate", "Name a river.", *options, "--dtype", "float32"]) == 2
    assert "dtype" in capsys.readouterr().err
    monkeypatch.delenv("MY_KEY")
    assert main(["generate", "Name a river.", *options]) == 2
    assert "api-key-env" in capsys.readouterr().err.replace("_", "-")
    assert len(server.bodies) == 1


def test_a_comparison_on_a_server(server: FaultServer, questions: Path, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    server.continues = False
    server.script = lambda number, body: "401" if "And one more." in str(body) else "ok"
    output = tmp_path / "run"
    arguments = ["compare", str(questions), "--strategies", "autoregressive", "skeleton", "--streams", "2"]
    assert main([*arguments, "--output", str(output), "--base-url", server.url, "--model", "served"]) == 0
    records = {(r.question_id, r.strategy): r for r in read_run(output).records}
    assert len(records) == 4
    assert records["0", "autoregressive"].error is None and records["0", "skeleton"].metrics.new_tokens > 0
    failed = records["1", "autoregressive"]
    assert failed.error is not None and "401" in failed.error and "Name a river." in failed.text
    assert failed.metrics.new_tokens > 0
    comparison = summarize(read_run(output)).row("skeleton").comparison
    assert comparison is not None and (comparison.compared, comparison.identical) == (1, 0)  # told by their texts
    for file in output.iterdir():
        assert KEY not in file.read_text(errors="replace")


def test_skeleton_options_stay_equal_and_printable() -> None:
    assert SkeletonOfThought() == SkeletonOfThought() and str(SkeletonOfThought()) == "skeleton"
