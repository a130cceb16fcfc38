"""What is refused before anything is sent to a server."""

from __future__ import annotations

from typing import Any

import pytest

import decoding
from decoding import CapabilityError, InvalidRequest, OpenAIBackend, SamplingParams
from tests.fault_server import KEY, FaultServer, backend


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


@pytest.mark.parametrize("prompt", ["", "  ", [1, 2], [{"role": "user"}], "a\udcff"], ids=ascii)
def test_prompts_that_make_no_sense(server: FaultServer, prompt: Any) -> None:
    with pytest.raises(InvalidRequest):
        decoding.generate(prompt, backend(server))
    with pytest.raises(InvalidRequest, match="logprobs"):
        decoding.generate("One?", backend(server), params=SamplingParams(logprobs=True))
    with pytest.raises(InvalidRequest, match="UTF-8"):
        decoding.generate("a\udcff", backend(server, endpoint="completions"))
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
