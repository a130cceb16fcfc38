"""Predicted costs follow the steps that run, and prompts in a step are weighed against guesses."""

from __future__ import annotations

from collections.abc import Sequence as List

import numpy as np
import pytest

from decoding.backends.local import LocalBackend
from decoding.drafting import Draft
from decoding.engine.block import Block
from decoding.engine.pace import Live
from decoding.engine.sequence import Sequence
from decoding.engine.width import Remembered, Width
from decoding.strategies.speculative import SpeculativeDecoder
from decoding.types import SamplingParams
from drafters import PromptLookup
from tests.greedy import prompts, run
from tests.test_drafters import text
from tests.test_width import Clock, Oracle, Table
from tests.tiny import tiny_model, tiny_tokenizer


def test_predictions_follow_the_steps_that_run_plain_and_wide_ones_apart() -> None:
    live = Live(Table(1.0, 0.1))
    for _ in range(4):
        live.saw(2, 2, 10.0, 3.6)
    assert live.cost(2, 2, 10.0) == pytest.approx(1.2), "a few steps say nothing yet"
    live.saw(2, 2, 10.0, 3.6)
    assert live.cost(2, 2, 10.0) == pytest.approx(3.6) and live.cost(5, 2, 10.0) == pytest.approx(1.5)
    for _ in range(31):
        live.saw(2, 2, 10.0, 0.6)
        live.saw(5, 2, 10.0, 3.0)
    assert live.cost(np.arange(2, 5), 2, 10.0) == pytest.approx([0.6, 2 * 1.3, 2 * 1.4])
    remembered = Remembered(live)
    assert remembered.cost(np.arange(2, 5), 2, 10.0) == pytest.approx([0.6, 2 * 1.3, 2 * 1.4])
    assert remembered.fixed.cost(np.arange(2, 5), 2, 10.0) == pytest.approx([1.2, 1.3, 1.4])


def test_the_engine_tells_of_steps_that_only_decode() -> None:
    backend = LocalBackend(tiny_model("llama"), tiny_tokenizer(), slots=4, capacity=64)
    backend.latency = Table()  # type: ignore[assignment]
    seen: list[tuple[int, int, float, float]] = []
    assert backend.live.cost(1, 1, 0.0) == Table().cost(1, 1, 0.0)
    backend.engine.on_step = lambda *step: seen.append(step)
    params = SamplingParams(max_new_tokens=6, ignore_eos=True)
    decoder = SpeculativeDecoder(PromptLookup(), 3)
    results = run(backend.engine, [(p, decoder) for p in prompts(3)], params)
    steps = {t.step: t for s in results for t in s.trace}
    mixed = {t.step for s in results for t in s.trace if t.prefill}
    assert [(tokens, rows) for tokens, rows, _, _ in seen] == [
        (steps[at].batch_tokens, steps[at].batch_sequences) for at in sorted(steps) if at not in mixed
    ]
    assert seen and all(context > 0 and seconds > 0 for _, _, context, seconds in seen)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_drafts_that_take_longer_than_stated_are_asked_for_less_unless_they_are_drawn(temperature: float) -> None:
    clock = Clock()
    width, drafter = Width(Table(1.0, 0.01), clock=clock), Oracle({}, seconds=0.05)
    width._saved_up = 0.0  # no trial is due
    sequence = text([1, 2, 3])
    sequence.params = SamplingParams(temperature=temperature)
    (stated,) = width.lengths(drafter, [sequence])
    for _ in range(8):
        (asked,) = width.lengths(drafter, [sequence])
        with width.drafting():
            clock.now += 20 * drafter.cost(asked, 1, 3.0)
    assert width.lengths(drafter, [sequence]) == [stated if temperature else 0] and stated > 0


def test_what_else_is_in_the_step_counts_as_what_it_brings() -> None:
    """Where a step is long anyway, and every token makes it longer, guesses keep prompts and others waiting."""
    others = [0]
    live, drafter = Live(Table(1.0, 0.1), lambda sequences: others[0]), Oracle({}, seconds=0.1)
    width, sequence = Width(live), text([1, 2, 3])
    width._saved_up = 0.0  # no trial is due
    guess = Draft(Block([4, 5]), confidence=[0.5, 0.5])
    assert width.lengths(drafter, [sequence])[0] > 0 and len(width.trim([sequence], [guess])[0][0].block) == 2
    others[0] = 64
    assert width.lengths(drafter, [sequence]) == [0] and not width.trim([sequence], [guess])[0][0].block


def test_the_engine_says_what_else_is_in_a_step() -> None:
    backend = LocalBackend(tiny_model("llama"), tiny_tokenizer(), slots=4, capacity=64, step_tokens=40)
    backend.latency = Table()  # type: ignore[assignment]
    seen: list[int] = []
    apart: list[int] = []

    class Watching(SpeculativeDecoder):
        def plan(self, sequences: List[Sequence]) -> list[Block]:
            seen.append(backend.live.beside(len(sequences)))
            apart.append(backend.live.beside(len(sequences) - 1))
            return super().plan(sequences)

    params, decoder = SamplingParams(max_new_tokens=5, ignore_eos=True), Watching(PromptLookup(), 2)
    first = backend.engine.submit([1, 2, 3], params, decoder, [])
    backend.engine.step()
    second = backend.engine.submit([7] * 50, params, decoder, [])
    while backend.engine.busy:
        backend.engine.step()
    assert seen[0] > 0 and set(seen[2:]) == {0} and not first.error and not second.error
    assert apart == [tokens + 1 for tokens in seen]
