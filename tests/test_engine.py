"""The engine's answers against transformers' own, with every decoder, on tiny random models of every kind."""

from __future__ import annotations

import itertools
from collections.abc import Sequence as List
from typing import Any

import numpy as np
import pytest
import torch

from decoding.drafting import Draft, Drafter
from decoding.engine.block import Block, Commit
from decoding.engine.decoder import Decoder
from decoding.engine.engine import Engine
from decoding.engine.output import Output
from decoding.engine.runner import Runner
from decoding.engine.sequence import Sequence
from decoding.strategies.autoregressive import AutoregressiveDecoder
from decoding.strategies.jacobi import JacobiDecoder
from decoding.strategies.speculative import SpeculativeDecoder
from decoding.types import SamplingParams
from drafters import PromptLookup
from tests.greedy import VOCAB, greedy_reference, prompts, run
from tests.tiny import tiny_model

KINDS = ("llama", "qwen3", "gemma3", "mistral", "gpt2", "qwen3-moe")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("together", [False, True], ids=["alone", "ragged batch"])
def test_greedy_tokens_equal_transformers(kind: str, together: bool) -> None:
    model = tiny_model(kind)
    engine = Engine(Runner(model, slots=8, capacity=96), step_tokens=24)
    params = SamplingParams(max_new_tokens=24, ignore_eos=True)
    inputs = prompts(6)
    expected = [greedy_reference(model, prompt, 24) for prompt in inputs]
    batches = [inputs] if together else [[prompt] for prompt in inputs]
    results = [s for batch in batches for s in run(engine, [(p, AutoregressiveDecoder()) for p in batch], params)]
    assert [s.new_tokens for s in results] == expected


class RandomTrees(Drafter):
    """Guesses random trees that hold the right continuation now and then."""

    name = "random-trees"

    def __init__(self, truth: dict[tuple[int, ...], list[int]], seed: int) -> None:
        self.truth = truth
        self.random = np.random.default_rng(seed)

    def propose(self, sequences: List[Sequence], lengths: List[int]) -> list[Draft]:
        drafts = []
        for sequence, length in zip(sequences, lengths, strict=True):
            done = len(sequence.new_tokens)
            right = self.truth[tuple(sequence.prompt)][done : done + length]
            tokens: list[int] = []
            parents: list[int] = []
            tip = -1  # the node on the right path that is deepest so far
            for _ in range(int(self.random.integers(0, 12)) if length else 0):
                if right and self.random.random() < 0.5:
                    parents.append(tip)
                    tokens.append(right.pop(0))
                    tip = len(tokens) - 1
                else:
                    parents.append(int(self.random.integers(-1, len(tokens))))
                    tokens.append(int(self.random.integers(0, VOCAB)))
            drafts.append(Draft(Block(tokens, parents)))
        return drafts


@pytest.mark.parametrize("kind", KINDS)
def test_every_decoder_equals_plain_decoding_in_one_mixed_batch(kind: str) -> None:
    model = tiny_model(kind)
    inputs = prompts(8, seed=1)
    truth = {tuple(p): greedy_reference(model, p, 32) for p in inputs}
    decoders: list[Decoder] = [
        AutoregressiveDecoder(),
        JacobiDecoder(6),
        SpeculativeDecoder(PromptLookup(), 5),
        SpeculativeDecoder(RandomTrees(truth, seed=3), 8),
    ]
    engine = Engine(Runner(model, slots=8, capacity=96), step_tokens=40)
    work = list(zip(inputs, itertools.cycle(decoders)))
    results = run(engine, work, SamplingParams(max_new_tokens=32, ignore_eos=True))
    assert [s.error for s in results] == [None] * len(results)
    assert [s.new_tokens for s in results] == list(truth.values())
    trees = [step for s in results if s.decoder is decoders[3] for step in s.trace]
    assert sum(step.accepted for step in trees) > 0, "no tree path was ever accepted, so nothing was tested"


class AcceptsOneWrongToken(AutoregressiveDecoder):
    """The negative control: takes one guess that the model did not confirm."""

    def plan(self, sequences: List[Sequence]) -> list[Block]:
        return [Block([5]) if len(s.new_tokens) == 7 and s.room else Block() for s in sequences]

    def commit(self, sequences: List[Sequence], output: Output) -> list[Commit]:
        return [Commit([*block.tokens, int(output.best(i)[len(block)])]) for i, block in enumerate(output.blocks)]


def test_the_equality_test_notices_one_wrong_token() -> None:
    model = tiny_model("llama")
    engine = Engine(Runner(model, slots=2, capacity=96))
    (result,) = run(engine, [(prompts(1)[0], AcceptsOneWrongToken())], SamplingParams(max_new_tokens=24))
    assert result.new_tokens != greedy_reference(model, prompts(1)[0], 24)


@pytest.mark.parametrize("make", [AutoregressiveDecoder, lambda: SpeculativeDecoder(PromptLookup(), 4)])
def test_a_sampled_request_does_not_depend_on_its_neighbours(make: type[AutoregressiveDecoder]) -> None:
    model = tiny_model("llama")
    inputs = prompts(5, seed=2)

    def sample(batch: list[list[int]], seeds: list[int]) -> list[list[int]]:
        engine = Engine(Runner(model, slots=8, capacity=64))
        decoder = make()
        sequences = [
            engine.submit(p, SamplingParams(max_new_tokens=20, temperature=1.0, seed=seed), decoder)
            for p, seed in zip(batch, seeds, strict=True)
        ]
        while engine.busy:
            engine.step()
        return [s.new_tokens for s in sequences]

    together = sample(inputs, [0, 1, 2, 3, 4])
    assert [sample([p], [i])[0] for i, p in enumerate(inputs)] == together
    assert sample(inputs[:1], [17]) != together[:1], "the seed has no effect"


def test_the_ends_of_a_neighbour_are_not_banned_for_who_has_none() -> None:
    model = tiny_model("llama")
    prompt, other = prompts(2)
    plain = greedy_reference(model, prompt, 8)
    engine = Engine(Runner(model, slots=3, capacity=64))
    free = SamplingParams(max_new_tokens=8, min_new_tokens=8, ignore_eos=True)
    mine = engine.submit(prompt, free, AutoregressiveDecoder(), plain[1:2])
    engine.submit(other, SamplingParams(max_new_tokens=8), AutoregressiveDecoder(), plain[1:2])
    late = engine.submit(
        prompt, SamplingParams(max_new_tokens=8, min_new_tokens=8), AutoregressiveDecoder(), plain[1:2]
    )
    while engine.busy:
        engine.step()
    assert mine.new_tokens == plain and plain[1] not in late.new_tokens


def test_limits_end_a_sequence_exactly() -> None:
    model = tiny_model("llama")
    engine = Engine(Runner(model, slots=2, capacity=32))
    prompt = prompts(1)[0]
    reference = greedy_reference(model, prompt, 32 - len(prompt))
    for decoder in (AutoregressiveDecoder(), JacobiDecoder(8), SpeculativeDecoder(PromptLookup(), 9)):
        short, full = (
            run(engine, [(prompt, decoder)], SamplingParams(max_new_tokens=n, ignore_eos=True))[0] for n in (7, 500)
        )
        assert (short.new_tokens, short.finish_reason) == (reference[:7], "length")
        assert (full.new_tokens, full.finish_reason) == (reference, "context")
        eos = reference[5]
        first = reference.index(eos)
        ended = engine.submit(prompt, SamplingParams(max_new_tokens=20), decoder, eos=[eos])
        while engine.busy:
            engine.step()
        assert (ended.new_tokens, ended.finish_reason) == (reference[: first + 1], "eos")


def test_logprobs_are_the_models_own() -> None:
    model = tiny_model("llama")
    engine = Engine(Runner(model, slots=2, capacity=64))
    params = SamplingParams(max_new_tokens=16, logprobs=True, temperature=0.7, repetition_penalty=1.3, seed=5)
    for decoder in (AutoregressiveDecoder(), SpeculativeDecoder(PromptLookup(), 4)):
        (result,) = run(engine, [(prompts(1)[0], decoder)], params)
        with torch.no_grad():
            logits = model(torch.tensor([result.tokens])).logits[0].log_softmax(-1)
        at = range(len(result.prompt) - 1, len(result.tokens) - 1)
        expected = [float(logits[i, result.tokens[i + 1]]) for i in at]
        np.testing.assert_allclose(result.logprobs, expected, atol=1e-4)


@pytest.mark.parametrize("options", [{"repetition_penalty": 1.7}, {"logit_bias": {5: 4.0, 9: -3.0}}], ids=str)
def test_processed_logits_equal_transformers_for_every_decoder(options: dict[str, float]) -> None:
    model = tiny_model("llama")
    prompt = prompts(1, seed=8)[0]
    ids = torch.tensor([prompt])
    theirs: dict[str, Any] = dict(options)
    if "logit_bias" in theirs:
        theirs["sequence_bias"] = [[[t], b] for t, b in theirs.pop("logit_bias").items()]
    assert model.generation_config is not None
    model.generation_config.eos_token_id = None
    out = model.generate(  # type: ignore[operator]
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=20, do_sample=False, **theirs
    )
    expected = out[0, len(prompt) :].tolist()
    engine = Engine(Runner(model, slots=2, capacity=96))
    params = SamplingParams(max_new_tokens=20, ignore_eos=True, **options)  # type: ignore[arg-type]
    for decoder in (AutoregressiveDecoder(), JacobiDecoder(6), SpeculativeDecoder(PromptLookup(), 6)):
        assert run(engine, [(prompt, decoder)], params)[0].new_tokens == expected
