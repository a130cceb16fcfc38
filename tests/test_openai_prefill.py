"""Skeleton-of-Thought on a server: messages begun for it, and beginnings that calls share."""

from __future__ import annotations

import pytest

import decoding
from decoding.strategies import SkeletonOfThought
from tests.fault_server import FaultServer, backend


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


def test_skeleton_options_stay_equal_and_printable() -> None:
    assert SkeletonOfThought() == SkeletonOfThought() and str(SkeletonOfThought()) == "skeleton"
