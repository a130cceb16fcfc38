"""What a server does wrong: tried again where that may help, told with its cause where not."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

import pytest

import decoding
from tests.fault_server import FaultServer, backend, fails_first

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
