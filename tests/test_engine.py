"""The engine against transformers' own generation and plain forwards, on tiny random models of every kind."""

from __future__ import annotations

import itertools
from collections.abc import Sequence as List
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import PreTrainedModel

from decoding.drafting import Draft, Drafter
from decoding.engine.block import Block, Commit
from decoding.engine.confirm import confirm
from decoding.engine.decoder import Decoder
from decoding.engine.engine import Engine
from decoding.engine.output import Output
from decoding.engine.packing import Row
from decoding.engine.runner import Runner
from decoding.engine.sequence import Sequence
from decoding.errors import ContextOverflow, InvalidRequest, ModelError
from decoding.strategies.autoregressive import AutoregressiveDecoder
from decoding.strategies.jacobi import JacobiDecoder
from decoding.strategies.speculative import SpeculativeDecoder
from decoding.types import SamplingParams
from drafters import DraftModel, PromptLookup
from tests.tiny import tiny_model

KINDS = ("llama", "qwen3", "gemma3", "mistral", "gpt2", "qwen3-moe")
VOCAB = 128


def prompts(count: int, seed: int = 0) -> list[list[int]]:
    """Ragged random prompts with repetitions in them, so that prompt lookup finds something."""
    random = np.random.default_rng(seed)
    result = []
    for _ in range(count):
        piece = random.integers(3, VOCAB, size=random.integers(2, 9)).tolist()
        result.append((piece * 4)[: int(random.integers(3, 30))])
    return result


def greedy_reference(model: PreTrainedModel, prompt: list[int], new: int) -> list[int]:
    """What transformers generates."""
    ids = torch.tensor([prompt])
    assert model.generation_config is not None
    model.generation_config.eos_token_id = None
    out = model.generate(  # type: ignore[operator]
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=new, do_sample=False
    )
    return out[0, len(prompt) :].tolist()


def run(engine: Engine, work: List[tuple[list[int], Decoder]], params: SamplingParams) -> list[Sequence]:
    """Submit everything, then step until nothing is left."""
    sequences = [engine.submit(prompt, params, decoder) for prompt, decoder in work]
    for _ in range(10_000):
        if not engine.busy:
            return sequences
        engine.step()
    raise AssertionError("the engine does not come to an end")


def truncated(model: PreTrainedModel) -> PreTrainedModel:
    """The same model with its first layer only: a draft model that is sometimes right."""
    small = tiny_model(model.config.model_type, num_hidden_layers=1)
    small.load_state_dict(model.state_dict(), strict=False)
    return small


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


def test_draft_model_equals_plain_decoding_and_is_accepted_sometimes() -> None:
    from decoding.backends.local import LocalBackend
    from tests.tiny import tiny_tokenizer

    model = tiny_model("llama", vocab_size=300)
    draft = tiny_model("llama", vocab_size=300)
    with torch.no_grad():
        for parameter in draft.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)) * 0.02)
    backend = LocalBackend(model, tiny_tokenizer(), slots=4, capacity=96)
    drafter = DraftModel(draft)
    drafter.attach(backend)
    inputs = prompts(6, seed=5)
    decoder = SpeculativeDecoder(drafter, 4)
    results = run(backend.engine, [(p, decoder) for p in inputs], SamplingParams(max_new_tokens=32, ignore_eos=True))
    assert [s.new_tokens for s in results] == [greedy_reference(model, p, 32) for p in inputs]
    assert 0 < sum(t.accepted for s in results for t in s.trace) < sum(t.drafted for s in results for t in s.trace)


def test_a_sampling_draft_model_that_is_the_target_is_always_accepted() -> None:
    """Drafting and verifying have to use one q, with the same temperature and filters, for any seed."""
    from decoding.backends.local import LocalBackend
    from tests.tiny import tiny_tokenizer

    model = tiny_model("llama")

    def wasted(draft: PreTrainedModel) -> int:
        backend = LocalBackend(model, tiny_tokenizer(), slots=4, capacity=96)
        drafter = DraftModel(draft)
        drafter.attach(backend)
        params = SamplingParams(max_new_tokens=24, temperature=0.9, top_p=0.95, seed=2**63 + 5, ignore_eos=True)
        results = run(backend.engine, [(p, SpeculativeDecoder(drafter, 3)) for p in prompts(4)], params)
        assert [s.error for s in results] == [None] * 4
        return sum(t.drafted - t.accepted for s in results for t in s.trace)

    assert wasted(model) == 0
    assert wasted(tiny_model("llama", seed=3)) > 0, "a draft model of other weights must be refused sometimes"


def test_a_draft_model_with_another_vocabulary_is_refused() -> None:
    from decoding.backends.local import LocalBackend
    from tests.tiny import tiny_tokenizer

    backend = LocalBackend(tiny_model("llama"), tiny_tokenizer(), slots=2, capacity=64)
    with pytest.raises(ModelError, match="same tokenizer"):
        DraftModel(tiny_model("llama", vocab_size=200, bos_token_id=None, eos_token_id=None, pad_token_id=None)).attach(
            backend
        )


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


@st.composite
def tree_steps(draw: st.DrawFn) -> list[list[tuple[list[int], list[int], int]]]:
    """For each of up to 3 sequences, up to 4 steps of (tokens, parents, node whose path is kept or -1)."""
    sequences = []
    for _ in range(draw(st.integers(1, 3))):
        steps = []
        for _ in range(draw(st.integers(1, 4))):
            size = draw(st.integers(0, 7))
            tokens = draw(st.lists(st.integers(0, VOCAB - 1), min_size=size, max_size=size))
            parents = [draw(st.integers(-1, node - 1)) for node in range(size)]
            steps.append((tokens, parents, draw(st.integers(-1, size - 1)) if size else -1))
        sequences.append(steps)
    return sequences


@pytest.mark.parametrize("kind", ["llama", "gemma3"])
def test_random_trees_and_rollbacks_equal_a_plain_forward(kind: str) -> None:
    model = tiny_model(kind)
    runner = Runner(model, slots=4, capacity=64)

    @settings(max_examples=25, deadline=None, derandomize=True)
    @given(tree_steps())
    def check(sequences: list[list[tuple[list[int], list[int], int]]]) -> None:
        cache = runner.cache
        cache.forget()
        slots = [cache.acquire([7 + i, 3])[0] for i in range(len(sequences))]
        texts = [[7 + i, 3] for i in range(len(sequences))]
        try:
            for turn in range(max(map(len, sequences))):
                active = [i for i, steps in enumerate(sequences) if len(steps) > turn]
                steps = [sequences[i][turn] for i in active]
                rows = [
                    Row(slots[i], texts[i][int(cache.lengths[slots[i]]) :], Block(tokens, parents))
                    for i, (tokens, parents, _) in zip(active, steps, strict=True)
                ]
                logits = runner.forward(rows).split([1 + len(row.block) for row in rows])
                moves = []
                for i, row, (tokens, parents, leaf), said in zip(active, rows, steps, logits, strict=True):
                    for node in range(-1, len(tokens)):
                        path = _path(parents, node)
                        plain = model(torch.tensor([texts[i] + [tokens[n] for n in path]])).logits[0, -1]
                        torch.testing.assert_close(said[1 + node], plain, atol=2e-4, rtol=1e-4)
                    kept = _path(parents, leaf)
                    base = int(cache.lengths[row.slot]) + len(row.pending)
                    moves += [(row.slot, base + n, base + place) for place, n in enumerate(kept) if n != place]
                    cache.commit(row.slot, [*row.pending, *(tokens[n] for n in kept)])
                    texts[i] += [tokens[n] for n in kept] + [11]
                cache.move(moves)
        finally:
            for slot in slots:
                cache.release(slot)

    check()


def _path(parents: list[int], node: int) -> list[int]:
    path: list[int] = []
    while node >= 0:
        path.append(node)
        node = parents[node]
    return path[::-1]


def test_bidirectional_blocks_see_all_of_themselves() -> None:
    model = tiny_model("llama")
    runner = Runner(model, slots=2, capacity=32)
    slot, _ = runner.cache.acquire([1, 2, 3])
    one = runner.forward([Row(slot, [1, 2, 3], Block([4, 5, 6], bidirectional=True))])
    other = runner.forward([Row(slot, [1, 2, 3], Block([4, 5, 9], bidirectional=True))])
    assert torch.equal(one[0], other[0]), "committed tokens must not see the block"
    assert not torch.allclose(one[1], other[1]), "the first token of the block must see its last"


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


def test_the_same_requests_give_the_same_batches() -> None:
    def once() -> list[tuple[int, int, int, int]]:
        engine = Engine(Runner(tiny_model("llama"), slots=3, capacity=64), step_tokens=40)
        decoder = SpeculativeDecoder(PromptLookup(), 4)
        results = run(engine, [(p, decoder) for p in prompts(7)], SamplingParams(max_new_tokens=16, temperature=0.8))
        return [(t.step, t.sequence, t.tokens, t.committed) for s in results for t in s.trace]

    assert once() == once()


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


class FailsOn(AutoregressiveDecoder):
    """Raises when asked about a prompt that begins with 13."""

    def __init__(self, where: str) -> None:
        self.where = where

    def plan(self, sequences: List[Sequence]) -> list[Block]:
        self._fail("plan", sequences)
        return super().plan(sequences)

    def commit(self, sequences: List[Sequence], output: Output) -> list[Commit]:
        self._fail("commit", sequences)
        if self.where == "out of vocabulary":
            return confirm(output)
        return confirm(output)

    def _fail(self, where: str, sequences: List[Sequence]) -> None:
        if self.where == where and any(s.prompt[0] == 13 and len(s.new_tokens) > 2 for s in sequences):
            raise RuntimeError("unlucky")


@pytest.mark.parametrize("where", ["plan", "commit", "forward", "nan", "hook", "guess"])
def test_a_failing_sequence_fails_alone(where: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model("llama")
    engine = Engine(Runner(model, slots=4, capacity=64))
    params = SamplingParams(max_new_tokens=10, ignore_eos=True)
    good, bad = prompts(3), [13, 14, 15]
    plain = engine.runner.forward
    decoder: Decoder = FailsOn(where)

    def sabotaged(rows: List[Row]) -> torch.Tensor:
        guilty = [row for row in rows if engine.cache.tokens[row.slot, 0] == 13 and engine.cache.lengths[row.slot] > 5]
        if guilty and where == "forward":
            raise RuntimeError("unlucky")
        logits = plain(rows)
        if guilty and where == "nan":
            logits = logits.clone()
            logits[rows.index(guilty[0])] = float("nan")
        return logits

    def hook(sequence: Sequence, _: List[int]) -> None:
        if len(sequence.new_tokens) > 2:
            raise RuntimeError("unlucky")

    class GuessesNonsense(AutoregressiveDecoder):
        def plan(self, sequences: List[Sequence]) -> list[Block]:
            return [Block([VOCAB + 9000]) if s.prompt[0] == 13 else Block() for s in sequences]

    if where in ("forward", "nan"):
        monkeypatch.setattr(engine.runner, "forward", sabotaged)
    if where == "guess":
        decoder = GuessesNonsense()
    victims = [engine.submit(bad, params, decoder, on_commit=hook if where == "hook" else None)]
    others = [engine.submit(p, params, decoder) for p in good]
    while engine.busy:
        engine.step()
    assert victims[0].finish_reason == "error" and victims[0].error is not None
    assert [s.new_tokens for s in others] == [greedy_reference(model, p, 10) for p in good]
    monkeypatch.undo()
    again = run(engine, [(bad, AutoregressiveDecoder())], params)[0]
    assert again.new_tokens == greedy_reference(model, bad, 10), "the engine must serve the next request"


def test_cancelling_one_request_leaves_the_others_alone() -> None:
    model = tiny_model("llama")
    engine = Engine(Runner(model, slots=2, capacity=64))
    params = SamplingParams(max_new_tokens=12, ignore_eos=True)
    sequences = [engine.submit(p, params, AutoregressiveDecoder()) for p in prompts(4)]
    for _ in range(3):
        engine.step()
    engine.cancel(sequences[0])
    engine.cancel(sequences[3])  # still waiting
    while engine.busy:
        engine.step()
    assert [s.finish_reason for s in sequences] == ["cancelled", "length", "length", "cancelled"]
    assert [s.new_tokens for s in sequences[1:3]] == [greedy_reference(model, s.prompt, 12) for s in sequences[1:3]]
    assert engine.cache.free == 2


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


def test_recurrent_models_are_refused() -> None:
    with pytest.raises(ModelError, match="roll back"):
        Runner(tiny_model("mamba"))


def test_bad_requests_say_what_is_wrong() -> None:
    engine = Engine(Runner(tiny_model("llama"), slots=1, capacity=16))
    decoder = AutoregressiveDecoder()
    with pytest.raises(InvalidRequest, match="empty"):
        engine.submit([], SamplingParams(), decoder)
    with pytest.raises(ContextOverflow, match="shorten"):
        engine.submit([3] * 16, SamplingParams(), decoder)
    with pytest.raises(InvalidRequest, match="vocabulary"):
        engine.submit([10**6], SamplingParams(), decoder)
    with pytest.raises(InvalidRequest, match="logit_bias"):
        engine.submit([3], SamplingParams(logit_bias={10**6: 1.0}), decoder)


def test_a_thousand_requests_leave_memory_flat() -> None:
    import gc

    import psutil

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
