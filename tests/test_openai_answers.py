"""Answers of an OpenAI-compatible server: text, usage, cost, streaming, listeners, endpoints, limits."""

from __future__ import annotations

import asyncio
import json
import tracemalloc

import pytest

import decoding
from decoding import OpenAIBackend, SamplingParams
from decoding.strategies import Autoregressive
from decoding.types import Message
from tests.fault_server import KEY, FaultServer, backend


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


def test_no_more_calls_at_once_than_allowed(server: FaultServer) -> None:
    server.thinking_seconds = 0.05
    lm = backend(server, concurrency=3, timeout=5.0)
    answers = decoding.generate([f"Question {n}?" for n in range(20)], lm)
    assert [g.text for g in answers] == [f"You asked: Question {n}?" for n in range(20)]
    assert 1 < server.most_under_way <= 3


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
