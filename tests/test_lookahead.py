"""Lookahead: block layout, window, pool, and the equality with plain decoding."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Sequence as List

import numpy as np
import pytest
import torch
from scipy.stats import chisquare

import decoding
from decoding.engine.block import Commit, layout
from decoding.engine.confirm import confirm
from decoding.engine.decoder import Decoder
from decoding.engine.engine import Engine
from decoding.engine.output import Output
from decoding.engine.runner import Runner
from decoding.engine.sequence import Sequence
from decoding.engine.width import Width
from decoding.errors import InvalidRequest
from decoding.strategies import Lookahead, parse
from decoding.strategies.autoregressive import AutoregressiveDecoder
from decoding.strategies.jacobi import JacobiDecoder
from decoding.strategies.lookahead import LookaheadDecoder, lookahead_block
from decoding.strategies.ngrams import NgramPool
from decoding.strategies.speculative import SpeculativeDecoder
from decoding.types import SamplingParams
from drafters import PromptLookup
from tests.refiners import Slope, accepted, prompts, run, violations
from tests.tiny import EOS, tiny_model, tiny_tokenizer

KINDS = ("llama", "gemma3")  # the second with a sliding window of 8 tokens


def test_the_blocks_mask_is_the_papers() -> None:
    """Written down by hand for W = 2, N = 3, G = 2: row r of `expected` is what node r sees."""
    block, candidates = lookahead_block([(7, 8), (7, 9)], rows=[[20, 21], [30, 31]])
    expected = """
        1.......  last committed token
        11......  candidates: 7
        111.....  7 8
        11.1....  7 9
        1...1...  row 0: the first place,
        1...11..  and the second, which sees the first
        1...1.1.  row 1: each place sees row 0 up to its column, and its column
        1...11.1
    """
    mask = np.array([[c == "1" for c in line.split()[0]] for line in expected.strip().splitlines()])
    where = layout(len(block), 1, tuple(block.parents or ()), False)
    assert candidates == 3 and list(block.tokens) == [7, 8, 9, 20, 21, 30, 31]
    assert where.visible is not None
    np.testing.assert_array_equal(where.visible, mask)
    assert where.depth.tolist() == [0, 1, 2, 2, 1, 2, 2, 3]


@pytest.mark.parametrize(("width", "height"), [(1, 1), (1, 4), (5, 3), (4, 1)])
def test_a_place_of_the_window_sees_row_0_up_to_its_column_and_its_column(width: int, height: int) -> None:
    rows = np.arange(width * height).reshape(height, width).tolist()
    block, candidates = lookahead_block([(99, 98)], rows)
    where = layout(len(block), 1, tuple(block.parents or ()), False)
    assert where.visible is not None
    for level, column in itertools.product(range(height), range(width)):
        seen = {rows[0][j] for j in range(column + 1)} | {rows[k][column] for k in range(level + 1)}
        row = 1 + candidates + level * width + column
        assert {block.tokens[i] for i in np.flatnonzero(where.visible[row, 1:]).tolist()} == seen
        assert where.depth[row] == 1 + level + column


def test_the_pool_keeps_the_latest_ngrams_of_every_token() -> None:
    pool = NgramPool(2)
    for ngram in ([1, 2, 3], [1, 4, 5], [1, 2, 3], [1, 6, 7], [2, 1, 1]):
        pool.add(ngram)
    assert pool.after(1) == [(6, 7), (2, 3)], "4, 5 was seen longest ago"
    assert pool.after(2) == [(1, 1)]
    assert pool.after(3) == []


@pytest.mark.parametrize("kind", KINDS)
def test_the_window_holds_what_plain_forwards_of_each_place_say(kind: str) -> None:
    """Row by row, every new window token against an unbatched, uncached forward of all that its place sees."""
    model = tiny_model(kind)
    engine = Engine(Runner(model, slots=2, capacity=96))
    decoder = LookaheadDecoder(window=3, ngram=4, guesses=2)
    other = engine.submit(prompts(1, seed=9)[0], SamplingParams(max_new_tokens=40, ignore_eos=True), decoder)
    sequence = engine.submit(prompts(1)[0], SamplingParams(max_new_tokens=24, ignore_eos=True), decoder)
    compared = 0
    while not sequence.new_tokens:
        engine.step()
    for _ in range(8):
        text = list(sequence.tokens)
        rows = [list(row) for row in decoder._searches[sequence.id].rows]
        engine.step()
        if sequence.finish_reason is not None:
            break
        expected = []
        for column in range(3):
            below = [row[column] for row in rows[1:]]
            logits = model(torch.tensor([text + rows[0][: column + 1] + below])).logits
            expected.append(int(logits[0, -1].argmax()))
        assert decoder._searches[sequence.id].rows == [*rows, expected][-3:]
        compared += 1
    assert compared > 4
    engine.cancel(other)


@pytest.mark.parametrize(
    ("kind", "together"),
    [("llama", False), ("llama", True), ("gemma3", True)],
    ids=["llama, alone", "llama, ragged batch", "gemma3, ragged batch"],
)
@pytest.mark.parametrize(
    "make",
    [
        lambda: LookaheadDecoder(5, 4, 5),
        lambda: LookaheadDecoder(2, 2, 1),
        lambda: LookaheadDecoder(3, 3, 4, shared_pool=True),
        lambda: LookaheadDecoder(5, 4, 5, width=Width(Slope(0.005))),
    ],
    ids=["5,4,5", "2,2,1", "3,3,4 shared", "adaptive"],
)
def test_greedy_tokens_equal_plain_decoding(kind: str, together: bool, make: type[AutoregressiveDecoder]) -> None:
    model = tiny_model(kind)
    engine = Engine(Runner(model, slots=8, capacity=96), step_tokens=40)
    params = SamplingParams(max_new_tokens=32, ignore_eos=True)
    decoder = make()
    work = [(prompt, decoder) for prompt in prompts(6)]
    batches = [work] if together else [[one] for one in work]
    results = [s for batch in batches for s in run(engine, batch, params)]
    assert [len(s.new_tokens) for s in results] == [32] * 6
    assert violations(model, results) == 0
    assert accepted(results) > 0, "no guess was ever accepted, so nothing was tested"


@pytest.mark.parametrize("kind", KINDS)
def test_every_decoder_equals_plain_decoding_in_one_mixed_batch(kind: str) -> None:
    model = tiny_model(kind)
    decoders: list[Decoder] = [
        LookaheadDecoder(4, 3, 3),
        AutoregressiveDecoder(),
        JacobiDecoder(6, recycle=True),
        SpeculativeDecoder(PromptLookup(), 5),
        LookaheadDecoder(3, 4, 2, shared_pool=True),
    ]
    engine = Engine(Runner(model, slots=8, capacity=96), step_tokens=40)
    work = list(zip(prompts(10, seed=1), itertools.cycle(decoders)))
    results = run(engine, work, SamplingParams(max_new_tokens=24, ignore_eos=True))
    assert violations(model, results) == 0
    assert all(not decoder._searches for decoder in decoders if isinstance(decoder, LookaheadDecoder))


class AcceptsTheWindow(LookaheadDecoder):
    """The negative control: takes the first place of the window without asking the model."""

    def commit(self, sequences: List[Sequence], output: Output) -> list[Commit]:
        first = [self._search(s).candidates for s in sequences]
        commits = super().commit(sequences, output)
        for i, (block, node) in enumerate(zip(output.blocks, first, strict=True)):
            if len(block) > node:
                commits[i] = Commit([block.tokens[node], int(output.best(i)[1 + node])], [node])
        return commits


def test_the_equality_test_notices_an_unverified_window() -> None:
    model = tiny_model("llama")
    engine = Engine(Runner(model, slots=4, capacity=96))
    decoder = AcceptsTheWindow(3, 3, 2)
    results = run(engine, [(p, decoder) for p in prompts(2)], SamplingParams(max_new_tokens=24, ignore_eos=True))
    assert violations(model, results) > 0


def test_places_of_the_window_are_kept_when_the_model_confirms_them() -> None:
    model = tiny_model("llama")
    engine = Engine(Runner(model, slots=8, capacity=96))
    decoder = LookaheadDecoder(6, 3, 1)
    kept = 0
    sequences = [engine.submit(p, SamplingParams(max_new_tokens=40, ignore_eos=True), decoder) for p in prompts(8)]
    engine.filming = True
    while engine.busy:
        engine.step()
        for sequence in sequences:
            frame = sequence.trace[-1].frame if sequence.trace else None
            if sequence.finish_reason is None and frame is not None and len(frame.gained) > 1:
                first = [node for node, parent in enumerate(frame.parents or ()) if parent < 0]
                right = [node for node in first if frame.guesses[node] == frame.gained[0]]
                kept += all(node >= decoder._search(sequence).candidates for node in right)
    assert kept > 0, "only n-grams of the pool were ever accepted"
    assert violations(model, sequences) == 0


@pytest.mark.parametrize(("price", "window"), [(0.001, True), (1.0, False)])
def test_the_window_runs_only_where_a_wider_step_costs_little(price: float, window: bool) -> None:
    model = tiny_model("llama")
    engine = Engine(Runner(model, slots=4, capacity=96))
    decoder = LookaheadDecoder(5, 4, 5, width=Width(Slope(price)))
    results = run(engine, [(p, decoder) for p in prompts(4)], SamplingParams(max_new_tokens=32, ignore_eos=True))
    steps = [step for s in results for step in s.trace if not step.prefill]
    wide = sum(step.drafted >= 5 for step in steps)
    assert (wide > len(steps) / 3) == window
    assert violations(model, results) == 0


def test_repetitive_text_is_accepted_in_runs() -> None:
    model = tiny_model("llama")
    with torch.no_grad():  # without attention a token depends on the one before alone, and the text turns in a circle
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight.zero_()
    for decoder in (LookaheadDecoder(4, 4, 3), JacobiDecoder(6, recycle=True)):
        engine = Engine(Runner(model, slots=1, capacity=512))
        (result,) = run(engine, [([3, 4, 5], decoder)], SamplingParams(max_new_tokens=200, ignore_eos=True))
        late = [step.committed for step in result.trace][-10:-1]
        assert min(late) >= 4, f"{decoder.name} commits {late} tokens a step"
        assert violations(model, [result]) == 0


def test_a_shared_pool_helps_the_next_request_and_an_own_one_does_not() -> None:
    model = tiny_model("llama")
    prompt = prompts(1)[0]
    gains = {}
    for shared in (False, True):
        engine = Engine(Runner(model, slots=1, capacity=96))
        decoder = LookaheadDecoder(3, 3, 4, shared_pool=shared)
        params = SamplingParams(max_new_tokens=32, ignore_eos=True)
        once = run(engine, [(prompt, decoder)], params)
        engine.cache.forget()  # else the second request skips the prompt, and has one more step to guess in
        again = run(engine, [(prompt, decoder)], params)
        assert once[0].new_tokens == again[0].new_tokens
        gains[shared] = accepted(again) - accepted(once)
        assert not decoder._searches
    assert gains[False] == 0 < gains[True]


def test_blocks_stay_within_the_room_and_end_exactly() -> None:
    model = tiny_model("llama")
    prompt = prompts(1)[0]
    plain = Engine(Runner(model, slots=1, capacity=64))
    (reference,) = run(plain, [(prompt, AutoregressiveDecoder())], SamplingParams(max_new_tokens=64, ignore_eos=True))
    longest = reference.new_tokens
    for decoder in (LookaheadDecoder(5, 4, 5), JacobiDecoder(8, recycle=True)):
        for new in (1, 2, 7, 500):
            engine = Engine(Runner(model, slots=2, capacity=64))
            (result,) = run(engine, [(prompt, decoder)], SamplingParams(max_new_tokens=new, ignore_eos=True))
            assert result.new_tokens == longest[:new]
            assert result.finish_reason == ("context" if new == 500 else "length")
        engine = Engine(Runner(model, slots=2, capacity=64))
        ended = engine.submit(prompt, SamplingParams(max_new_tokens=30), decoder, eos=[longest[5]])
        while engine.busy:
            engine.step()
        assert ended.new_tokens == longest[: longest.index(longest[5]) + 1]


def test_a_block_that_the_engine_has_no_room_for_leaves_the_window_as_it_was() -> None:
    model = tiny_model("llama")
    engine = Engine(Runner(model, slots=1, capacity=48))
    decoder = LookaheadDecoder(window=8, ngram=5, guesses=2)  # a full window has 32 places
    sequence = engine.submit(prompts(1)[0], SamplingParams(max_new_tokens=100, ignore_eos=True), decoder)
    dropped = 0
    while engine.busy:
        before = [list(row) for row in decoder._search(sequence).rows]
        engine.step()
        if sequence.finish_reason is None and not sequence.trace[-1].prefill and not sequence.trace[-1].drafted:
            assert decoder._search(sequence).rows == before
            dropped += 1
    assert dropped > 0 and sequence.finish_reason == "context"
    assert violations(model, [sequence]) == 0


SUPPORT = (40, 41, 42)  # the only tokens that sampled answers are made of, and the prompt too
PARAMS = SamplingParams(max_new_tokens=4, temperature=1.5, logit_bias=dict.fromkeys(SUPPORT, 200.0), ignore_eos=True)
PROMPT = [40, 41, 40, 42, 41, 41, 42, 42, 40, 40, 41, 42, 40]


def sampled(decoder: Decoder, requests: int) -> tuple[Counter[tuple[int, ...]], int]:
    """Answers of many seeds, and the number of guesses that were accepted in them."""
    engine = Engine(Runner(tiny_model("llama"), slots=32, capacity=64))
    sequences = [engine.submit(PROMPT, PARAMS.but(seed=seed), decoder) for seed in range(requests)]
    while engine.busy:
        engine.step()
    return Counter(tuple(s.new_tokens) for s in sequences), accepted(sequences)


def law() -> dict[tuple[int, ...], float]:
    """The probability of every answer, by plain forwards."""
    model = tiny_model("llama")
    chances = {}
    for answer in itertools.product(SUPPORT, repeat=4):
        with torch.no_grad():
            logits = model(torch.tensor([[*PROMPT, *answer]])).logits[0, len(PROMPT) - 1 : -1, SUPPORT]
        steps = (logits.double() / PARAMS.temperature).softmax(-1)
        chances[answer] = float(np.prod([steps[i, SUPPORT.index(token)].item() for i, token in enumerate(answer)]))
    return chances


def fit(counts: Counter[tuple[int, ...]]) -> float:
    """p-value of the answers under the model's own law; answers expected less than five times count as one."""
    total = counts.total()
    expected, seen, rare = [], [], [0.0, 0]
    for answer, chance in law().items():
        if chance * total < 5:
            rare = [rare[0] + chance * total, rare[1] + counts[answer]]
        else:
            expected.append(chance * total)
            seen.append(counts[answer])
    if rare[0] > 0:
        expected.append(rare[0])
        seen.append(int(rare[1]))
    return float(chisquare(seen, np.array(expected) * (sum(seen) / sum(expected))).pvalue)


class AcceptsByArgmax(LookaheadDecoder):
    """The negative control: verifies sampled requests as if they were greedy."""

    def commit(self, sequences: List[Sequence], output: Output) -> list[Commit]:
        commits = super().commit(sequences, output)
        for i, block in enumerate(output.blocks):
            if block and block.tokens[0] == output.best(i)[0]:
                commits[i] = Commit([block.tokens[0], commits[i].tokens[-1]], [0])
        return commits


def test_sampled_answers_have_the_models_own_distribution() -> None:
    counts, guesses = sampled(LookaheadDecoder(3, 3, 3), 1000)
    assert guesses > 200
    assert fit(counts) > 1e-3
    assert fit(sampled(AcceptsByArgmax(3, 3, 3), 1500)[0]) < 1e-6


def test_sampled_requests_do_not_depend_on_their_neighbors() -> None:
    model = tiny_model("llama")

    def answers(picks: List[int]) -> list[list[int]]:
        engine = Engine(Runner(model, slots=8, capacity=96))
        decoder = LookaheadDecoder(3, 3, 3)
        inputs = prompts(4, seed=2)
        params = SamplingParams(max_new_tokens=16, temperature=1.0, ignore_eos=True)
        sequences = [engine.submit(inputs[i], params.but(seed=i), decoder) for i in picks]
        while engine.busy:
            engine.step()
        return [s.new_tokens for s in sequences]

    assert [answers([i])[0] for i in range(4)] == answers([0, 1, 2, 3])


class Echo(Decoder):
    """Confirms whatever was proposed, so that a decoder can be asked what it would propose."""

    def commit(self, sequences: List[Sequence], output: Output) -> list[Commit]:
        return confirm(output)


def waiting(tokens: list[int], room: int = 32) -> Sequence:
    """A sequence that has not run yet, with room for so many guesses."""
    return Sequence(0, tokens, SamplingParams(), Echo(), frozenset(), len(tokens) + 1 + room, 0.0)


def test_no_place_of_a_block_lies_beyond_the_room() -> None:
    deepest = []
    for room in range(8):
        decoder = LookaheadDecoder(window=3, ngram=4, guesses=2)
        sequence = waiting([4, 5, 6, 7, 8, 4], room)
        decoder._search(sequence).rows = [[10, 11, 12], [20, 21, 22], [30, 31, 32]]
        (block,) = decoder.plan([sequence])
        deepest.append(int(layout(len(block), 1, tuple(block.parents or ()), False).depth.max()))
    assert deepest == [0, 1, 2, 3, 3, 5, 5, 5], "a candidate is 3 tokens deep, the window 5"


def test_the_strategies_decode_through_the_public_interface() -> None:
    lm = decoding.LocalBackend(tiny_model("llama"), tiny_tokenizer(), eos=[EOS], slots=4, capacity=128)
    params = SamplingParams(max_new_tokens=20)
    expected = decoding.generate("la la la la", lm, params=params).tokens
    for strategy in (Lookahead(adaptive=False), Lookahead(window=2, shared_pool=True, adaptive=False)):
        answer = decoding.generate("la la la la", lm, strategy=str(strategy), params=params)
        assert parse(str(strategy)) == strategy
        assert answer.tokens == expected and answer.metrics.drafted > 0
        assert {step.drafter for step in answer.trace if step.drafted} == {strategy.name}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("lookahead(window=0)", "window must be an integer of at least 1"),
        ("lookahead(ngram=1)", "ngram must be an integer of at least 2"),
        ("lookahead(guesses=none)", "guesses must be an integer of at least 1"),
        ("lookahead(shared_pool=maybe)", "shared_pool must be true or false"),
        ("lookahead(gueses=3)", "did you mean 'guesses'"),
        ("lookahead(adaptive=1)", "adaptive must be true or false"),
    ],
)
def test_bad_options_are_named(text: str, message: str) -> None:
    with pytest.raises(InvalidRequest, match=message):
        parse(text)
