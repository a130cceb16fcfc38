"""Compiled layers: the tokens of uncompiled ones, and one sentence where there are none."""

from __future__ import annotations

import logging
import math
import os
import shutil
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import nn
from torch._dynamo.utils import counters

from decoding.api import generate
from decoding.backends.local import LocalBackend
from decoding.comparison import _environment
from decoding.engine import compiled, kernels, latency
from decoding.engine.block import Block
from decoding.engine.fused import find_compiler
from decoding.engine.packing import Row
from decoding.engine.runner import Runner
from decoding.types import Generation, SamplingParams
from tests.exactness import greedy_violations
from tests.tiny import tiny_model, tiny_tokenizer

needs_compiler = pytest.mark.skipif(
    shutil.which(os.environ.get("CXX", "g++")) is None, reason="there is no C++ compiler here"
)

PROMPTS = [[7, 30, 101, 8, 55, 31, 2], [200], [9, 77, 140, 12, 9, 77, 140, 12, 9, 77, 31]]
LAYERS = 2


def gemma(**overrides: Any) -> Any:
    """A model that the fused step does not take, with layers of one kind."""
    return tiny_model("gemma3", num_hidden_layers=LAYERS, layer_types=["sliding_attention"] * LAYERS, **overrides)


def backend(model: Any, **options: Any) -> LocalBackend:
    return LocalBackend(model, tiny_tokenizer(), slots=4, capacity=160, **options)


def tokens(lm: LocalBackend, strategy: str = "autoregressive") -> list[list[int]]:
    answers: list[Generation] = generate(PROMPTS, lm, strategy=strategy, params=SamplingParams(max_new_tokens=24))
    return [answer.tokens for answer in answers]


def compile_by(backend: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Have layers traced as always, but what comes of it made into code by `backend` and not by a C++ compiler."""
    real = torch.compile
    monkeypatch.setattr(torch, "compile", lambda forward, options, **how: real(forward, backend=backend, **how))


def calls_from_code(runner: Runner, *counts: int) -> int:
    """How often compiled code calls attention in steps over so many tokens; uncompiled layers go another way."""
    with torch.profiler.profile() as profile:
        for count in counts:
            runner.forward([Row(0, [11] * count, Block())])
    return sum(event.count for event in profile.key_averages() if event.key == "parallel_decoding::attend")


@pytest.fixture(scope="module")
def both() -> Iterator[tuple[LocalBackend, LocalBackend]]:
    """The same model with and without compiled layers."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(compiled, "WARM_UP_SECONDS", math.inf)  # a busy machine fails no test
        patch.setattr(kernels, "fastest_kernels", lambda _: ["linear"] * len(kernels.TOKENS))  # less to compile
        model = gemma()
        yield backend(model, compile=True), backend(model)


@needs_compiler
def test_tokens_are_those_of_uncompiled_layers_alone_and_in_a_ragged_batch(
    both: tuple[LocalBackend, LocalBackend],
) -> None:
    ours, plain = both
    assert ours.engine.runner.kernels == "compiled layers" and plain.engine.runner.kernels == "layers"
    batch = tokens(ours)
    assert batch == tokens(plain) == tokens(ours, "speculative(drafter=prompt-lookup)")
    for prompt, answer in zip(PROMPTS, batch, strict=True):
        alone = generate(prompt, ours, params=SamplingParams(max_new_tokens=24))
        assert alone.tokens == answer
        assert greedy_violations(ours.model, prompt, answer)[0] == []


def test_code_serves_every_number_of_tokens_and_all_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    made = []

    def as_it_is(graph: Callable[..., Any], _: object) -> Callable[..., Any]:
        made.append(graph)
        return graph

    compile_by(as_it_is, monkeypatch)
    monkeypatch.setattr(kernels, "fastest_kernels", lambda _: ["flipped"] * 3 + ["linear"] * 3)
    model = gemma()
    ours, plain = Runner(model, slots=2, capacity=160, compile=True), Runner(model, slots=2, capacity=160)
    assert len(made) == 3  # for 1 token, for 2 to 8, for 9 and more; each for both layers
    assert calls_from_code(ours, 1, 2, 3, 8, 9, 33, 65, 160) == 8 * LAYERS
    with ThreadPoolExecutor(1) as thread:  # where streams run
        assert thread.submit(calls_from_code, ours, 3).result() == LAYERS
    assert len(made) == 3 and calls_from_code(plain, 3) == 0
    assert not any("forward" in vars(module) or type(module).__name__ == "ByTokens" for module in model.modules())


@needs_compiler
def test_the_warm_up_is_reported_and_latency_is_measured_apart(both: tuple[LocalBackend, LocalBackend]) -> None:
    ours, plain = both
    there = _environment(ours)
    assert there.kernels == "compiled layers" and there.compile_seconds > 0
    assert (_environment(plain).kernels, _environment(plain).compile_seconds) == ("layers", 0)
    assert latency._path(ours.engine.runner) != latency._path(plain.engine.runner)


def warnings(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.name.startswith("decoding")]


def uncompiled(model: Any, caplog: pytest.LogCaptureFixture) -> str:
    """What is said when the model's layers are not compiled after all; they run, and give its tokens."""
    with caplog.at_level(logging.WARNING, logger="decoding"):
        lm = backend(model, compile=True)
    assert lm.engine.runner.compiled is None
    assert tokens(lm) == tokens(backend(model))
    (said,) = warnings(caplog)
    return said


def test_a_warm_up_that_takes_too_long_is_given_up(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(compiled, "WARM_UP_SECONDS", 0.0)
    assert "it takes longer than 0 seconds;" in uncompiled(gemma(), caplog)


def test_layers_that_cannot_be_compiled_run_as_they_are(caplog: pytest.LogCaptureFixture) -> None:
    class Unsupported(nn.Module):
        def forward(self, input: torch.Tensor) -> torch.Tensor:
            torch._dynamo.graph_break()
            return torch.tanh(input)

    model = gemma()
    model.model.layers[1].mlp.act_fn = Unsupported()
    assert uncompiled(model, caplog).startswith("the layers run uncompiled, since they could not be compiled: ")


def test_code_that_computes_something_else_is_not_used(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def wrong(graph: Callable[..., Any], _: object) -> Callable[..., Any]:
        return lambda *inputs: [output.flip(-1) for output in graph(*inputs)]

    compile_by(wrong, monkeypatch)
    assert "the logits would be others" in uncompiled(gemma(), caplog)


@pytest.mark.skipif(find_compiler() is None, reason="there is no C++ compiler here")
def test_a_model_with_a_fused_step_has_nothing_left_to_compile(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, logger="decoding"):
        runner = Runner(tiny_model("llama"), slots=2, capacity=64, compile=True)
    assert runner.kernels == "fused float32" and runner.compiled is None
    assert warnings(caplog) == [
        "there is nothing left to compile: steps of this model run in one compiled call already."
    ]


@needs_compiler
def test_what_was_compiled_is_read_from_disk_the_next_time(both: tuple[LocalBackend, LocalBackend]) -> None:
    torch._dynamo.reset()  # forgets, as a new process has; so this comes last
    counters.clear()
    again = backend(both[0].model, compile=True)
    assert again.engine.runner.kernels == "compiled layers"
    found = counters["inductor"]  # one token, and more
    assert found["fxgraph_cache_hit"] == 2 and not found["fxgraph_cache_miss"]
