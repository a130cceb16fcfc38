"""Who decodes when: slots, queues, prompts in chunks, and prefixes that are read once."""

from __future__ import annotations

import gc

import numpy as np
import psutil

from decoding.engine.engine import Engine
from decoding.engine.runner import Runner
from decoding.strategies.autoregressive import AutoregressiveDecoder
from decoding.strategies.speculative import SpeculativeDecoder
from decoding.trace import measure
from decoding.types import SamplingParams
from drafters import PromptLookup
from tests.greedy import VOCAB, greedy_reference, prompts, run
from tests.tiny import tiny_model


def test_prefix_reuse_changes_no_token_and_skips_the_prefix() -> None:
    model = tiny_model("gemma3")
    engine = Engine(Runner(model, slots=4, capacity=96))
    params = SamplingParams(max_new_tokens=12, ignore_eos=True)
    shared = prompts(1, seed=9)[0] * 2
    first = run(engine, [([*shared, 5], AutoregressiveDecoder())], params)[0]
    tails = [[6], [7, 8], [9, 10, 11]]
    later = run(engine, [(shared + tail, AutoregressiveDecoder()) for tail in tails], params)
    assert first.reused == 0 and [s.reused for s in later] == [len(shared)] * 3
    assert [s.new_tokens for s in later] == [greedy_reference(model, shared + tail, 12) for tail in tails]


def test_requests_with_a_common_beginning_read_it_once() -> None:
    model = tiny_model("llama")
    engine = Engine(Runner(model, slots=4, capacity=96))
    shared = list(range(3, 43))
    work = [([*shared, 50 + i], AutoregressiveDecoder()) for i in range(3)]
    results = run(engine, work, SamplingParams(max_new_tokens=4, ignore_eos=True))
    assert sum(step.tokens for s in results for step in s.trace if step.prefill) == len(shared) + 3
    assert [s.new_tokens for s in results] == [greedy_reference(model, prompt, 4) for prompt, _ in work]


def test_more_requests_than_slots_wait_and_all_finish() -> None:
    model = tiny_model("llama")
    engine = Engine(Runner(model, slots=2, capacity=64))
    inputs = prompts(9, seed=4)
    decoder = AutoregressiveDecoder()
    results = run(engine, [(p, decoder) for p in inputs], SamplingParams(max_new_tokens=10, ignore_eos=True))
    assert [s.new_tokens for s in results] == [greedy_reference(model, p, 10) for p in inputs]
    assert max(step.batch_sequences for s in results for step in s.trace) == 2


def test_long_prompts_are_read_in_chunks_while_others_decode() -> None:
    model = tiny_model("llama")
    engine = Engine(Runner(model, slots=4, capacity=200), step_tokens=34)
    decoder = AutoregressiveDecoder()
    params = SamplingParams(max_new_tokens=20, ignore_eos=True)
    short = engine.submit(prompts(1)[0], params, decoder)
    engine.step()
    long_prompt = np.random.default_rng(0).integers(3, VOCAB, 150).tolist()
    long = engine.submit(long_prompt, params, decoder)
    while engine.busy:
        engine.step()
    chunks = [step for step in long.trace if step.prefill]
    assert len(chunks) > 3 and all(step.batch_sequences == 2 for step in chunks)
    assert short.new_tokens == greedy_reference(model, short.prompt, 20)
    assert long.new_tokens == greedy_reference(model, long_prompt, 20)


def test_steps_of_two_engines_have_different_numbers() -> None:
    """One answer may be made by both, and is measured by its steps."""
    params = SamplingParams(max_new_tokens=4, ignore_eos=True)
    seen: list[set[int]] = []
    for _ in range(2):
        engine = Engine(Runner(tiny_model("llama"), slots=1, capacity=64))
        (result,) = run(engine, [(prompts(1)[0], AutoregressiveDecoder())], params)
        seen.append({t.step for t in result.trace})
    assert seen[0] and not seen[0] & seen[1]


def test_the_first_token_of_a_prompt_that_is_known_is_no_verification() -> None:
    engine = Engine(Runner(tiny_model("llama"), slots=2, capacity=64))
    prompt, decoder = [1, 2, 3, 4] * 5, SpeculativeDecoder(PromptLookup(), 4)
    for reused in (0, len(prompt) - 1):
        (result,) = run(engine, [(prompt, decoder)], SamplingParams(max_new_tokens=8, ignore_eos=True))
        metrics = measure(result.trace, seconds=1.0, prompt_tokens=len(prompt))
        assert metrics.reused_tokens == reused and metrics.prefill_tokens == len(prompt) - reused
        assert not any(t.drafted for t in result.trace if t.prefill)


def test_the_same_requests_give_the_same_batches() -> None:
    def once() -> list[tuple[int, int, int, int]]:
        engine = Engine(Runner(tiny_model("llama"), slots=3, capacity=64), step_tokens=40)
        decoder = SpeculativeDecoder(PromptLookup(), 4)
        results = run(engine, [(p, decoder) for p in prompts(7)], SamplingParams(max_new_tokens=16, temperature=0.8))
        step, first = results[0].trace[0].step, results[0].id
        return [(t.step - step, t.sequence - first, t.tokens, t.committed) for s in results for t in s.trace]

    assert once() == once()


def test_a_thousand_requests_leave_memory_flat() -> None:
    engine = Engine(Runner(tiny_model("llama"), slots=8, capacity=48))
    decoder = SpeculativeDecoder(PromptLookup(), 4)
    process = psutil.Process()
    inputs = prompts(50, seed=6)
    params = SamplingParams(max_new_tokens=4, ignore_eos=True)
    before = 0
    for round_number in range(20):
        run(engine, [(p, decoder) for p in inputs], params)
        if round_number == 4:
            gc.collect()
            before = process.memory_info().rss
    gc.collect()
    assert process.memory_info().rss - before < 8 * 2**20
    assert not decoder.drafter._indices and engine.cache.free == 8  # type: ignore[attr-defined]
