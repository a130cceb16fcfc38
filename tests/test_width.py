"""How many guesses are verified: admission, what is learnt from the text, and that nothing of it changes an answer."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence as List
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch

from decoding.backends.local import LocalBackend
from decoding.drafting import Draft, Drafter
from decoding.engine.block import Block
from decoding.engine.calibration import Calibration
from decoding.engine.engine import Engine
from decoding.engine.pace import Pace
from decoding.engine.runner import Runner
from decoding.engine.sequence import Sequence
from decoding.engine.verify import verify_block, verify_rejection
from decoding.engine.width import MOST_LEVELS, Width, _floor, admit, lengths
from decoding.strategies.autoregressive import AutoregressiveDecoder
from decoding.strategies.speculative import Speculative, SpeculativeDecoder
from decoding.trace import speculation
from decoding.types import SamplingParams
from drafters import DraftModel, Mixed, PromptLookup, Suffix, TokenRecycling
from tests.greedy import greedy_reference, prompts, run
from tests.test_drafters import KeepsTheFirstGuess, accepted, chi_square, outcomes
from tests.test_verify import Chain
from tests.test_verify import run as over_all_drafts
from tests.tiny import tiny_model, tiny_tokenizer
from tests.verification_law import Drafted, draw_drafts, languages, outcome


@dataclass(frozen=True)
class Table:
    """Seconds of a step: `fixed`, and `each` for every token."""

    fixed: float = 1.0
    each: float = 0.05

    def cost(self, tokens: Any, sequences: Any, context: Any) -> Any:
        return self.fixed + self.each * np.asarray(tokens, dtype=float)


FREE, DEAR = Table(1.0, 0.0), Table(0.0, 1.0)


def test_admission_is_the_best_choice_of_all() -> None:
    survival = [[0.8, 0.5, 0.1], [0.3], [0.6, 0.55]]
    places = [(i, node) for i, chances in enumerate(survival) for node in range(len(chances))]
    for table in (Table(1, 0.05), Table(1, 0.2), Table(1, 0.4), FREE, DEAR):

        def rate(chosen: List[tuple[int, int]], table: Table = table) -> float:
            return float((3 + sum(survival[i][n] for i, n in chosen)) / table.cost(3 + len(chosen), 3, 0))

        every = [c for n in range(len(places) + 1) for c in itertools.combinations(places, n)]
        best = max(map(rate, every))
        chosen = [(i, node) for i, nodes in enumerate(admit(survival, table, 0)) for node in nodes]
        assert rate(chosen) >= best / 1.02
        assert set(chosen) == set(places) if table is FREE else True
        assert not chosen if table is DEAR else True


def test_admission_follows_a_bumpy_cost_over_the_bump() -> None:
    class Bump:
        def cost(self, tokens: Any, sequences: Any, context: Any) -> Any:
            return np.where(np.asarray(tokens) > 2, 1.5, np.where(np.asarray(tokens) > 1, 1.9, 1.0))

    assert admit([[0.8, 0.8, 0.8]], Bump(), 0) == [[0, 1, 2]]


def test_what_is_admitted_of_a_tree_is_a_tree() -> None:
    random = np.random.default_rng(4)
    for _ in range(50):
        parents = [int(random.integers(-1, node)) for node in range(12)]
        draft = Draft(Block(list(range(12)), parents), confidence=random.choice([0.2, 0.5, 1.0], 12).tolist())
        width = Width(Table(1, 0.15))
        sequence = Sequence(0, [1], SamplingParams(), AutoregressiveDecoder(), frozenset(), 99, 0.0)
        (kept,), (expected,) = width.trim([sequence], [draft])
        kept.block.check(99)
        assert kept.confidence is not None and len(kept.confidence) == len(kept.block)
        assert expected >= 1
        for token, parent in zip(kept.block.tokens, kept.block.parents or (), strict=True):
            above = -1 if parent < 0 else kept.block.tokens[parent]
            assert parents[token] == above


def test_confidences_are_corrected_by_what_comes_true() -> None:
    calibration = Calibration()
    draft = Draft(Block([7, 8]), confidence=[0.9, 0.9])
    before = calibration.survival(0, draft)
    for _ in range(60):
        calibration.watch(0, draft)
        calibration.learn(0, [5])
    assert before[0] == pytest.approx(0.9) and calibration.survival(0, draft)[0] < 0.1
    assert calibration.survival(1, draft)[0] < 0.15, "another sequence starts from what was seen in this one"
    for _ in range(60):
        calibration.watch(1, draft)
        calibration.learn(1, [7, 8, 1])
    assert calibration.survival(1, draft)[1] > 0.6
    assert calibration.survival(0, draft)[0] < 0.2, "a sequence's own record outweighs the others'"
    calibration.unlearn()
    assert calibration.survival(0, draft) == before


def test_what_cannot_pay_is_neither_judged_nor_watched() -> None:
    calibration = Calibration()
    draft = Draft(Block([7, 8, 9, 3], [-1, 0, 1, -1]), confidence=[0.5, 0.5, 0.5, 0.9])
    chances, survival = calibration.judge(0, draft, 0.4)
    assert chances == pytest.approx([0.5, 0.5, 0.0, 0.9]) and survival == pytest.approx([0.5, 0.25, 0.0, 0.9])
    calibration.watch(0, draft, chances)
    calibration.learn(0, [7, 8, 9])
    assert calibration.judge(0, draft)[0][:2] > [0.5, 0.5], "both were right"
    assert not calibration._watched[0], "nobody waits for a guess that was left out"
    chain = Draft(Block([7, 8, 9]), confidence=[0.5, 0.5, 0.5])
    assert Calibration().judge(0, chain, 0.6)[1] == [0.5, 0.0, 0.0]


@pytest.mark.parametrize("fixed", [0.2, 1.0, 3.0])
def test_the_floor_leaves_out_nothing_that_would_be_admitted(fixed: float) -> None:
    random = np.random.default_rng(6)
    for _ in range(40):
        survival = [np.sort(random.random(int(random.integers(1, 6))))[::-1].tolist() for _ in range(3)]
        table = Table(fixed, float(random.uniform(0.02, 0.5)))
        floor = _floor(table, 3, sum(map(len, survival)), 0.0)
        few = [[chance if chance >= floor else 0.0 for chance in chances] for chances in survival]
        assert admit(few, table, 0.0) == admit(survival, table, 0.0)


def test_guesses_that_were_withheld_teach_as_much() -> None:
    """The text alone judges them, over several steps if need be."""
    calibration = Calibration()
    draft = Draft(Block([7, 8, 9, 7], [-1, 0, 1, -1]), confidence=[0.5, 0.5, 0.5, 0.5])
    for _ in range(40):
        calibration.watch(0, draft)
        for token in (7, 8, 4):
            calibration.learn(0, [token])
    survival = calibration.survival(0, Draft(Block([1, 2, 3]), confidence=[0.5, 0.5, 0.5]))
    first, second, third = survival[0], survival[1] / survival[0], survival[2] / survival[1]
    assert second > 0.9 and third < 0.1
    assert 0.4 < first < 0.6, "of two equal guesses in one place only one came true"
    assert not calibration._watched[0], "drafts that the text has left are let go"


@dataclass(eq=False)
class Oracle(Drafter):
    """Knows the right continuation, and is right with a chance of its own; says nothing about it."""

    truth: dict[tuple[int, ...], list[int]]
    right: float = 1.0
    seconds: float = 0.0
    asked: int = 0

    def __post_init__(self) -> None:
        self.name = "oracle"  # type: ignore[misc]
        self.random = np.random.default_rng(1)

    def propose(self, sequences: List[Sequence], lengths: List[int]) -> list[Draft]:
        drafts = []
        for sequence, length in zip(sequences, lengths, strict=True):
            self.asked += length
            done = len(sequence.new_tokens)
            guesses = self.truth[tuple(sequence.prompt)][done : done + length]
            drafts.append(Draft(Block([t if self.random.random() < self.right else (t + 1) % 64 for t in guesses])))
        return drafts

    def cost(self, levels: int, sequences: int, context: float) -> float:
        return self.seconds * levels


NEW = 64


def drafted(right: float, table: Table, seconds: float = 0.0) -> tuple[list[Sequence], Oracle]:
    model = tiny_model("llama")
    inputs = prompts(2, seed=9)
    truth = {tuple(p): greedy_reference(model, p, NEW) for p in inputs}
    oracle = Oracle(truth, right, seconds)
    decoder = SpeculativeDecoder(oracle, Width(table))
    engine = Engine(Runner(model, slots=2, capacity=128))
    results = run(engine, [(p, decoder) for p in inputs], SamplingParams(max_new_tokens=NEW, ignore_eos=True))
    assert [s.new_tokens for s in results] == list(truth.values())
    return results, oracle


def test_a_drafter_that_is_right_drafts_far_and_one_that_is_wrong_not_at_all() -> None:
    table = Table(1.0, 0.1)
    good, bad = (speculation(drafted(right, table)[0][0].trace) for right in (1.0, 0.0))
    assert good.acceptance_length > 4 and good.wasted == 0
    # At first nobody knows that it is bad; the cost of finding out is a few guesses.
    assert bad.acceptance_length == 1 and bad.wasted <= 12
    spent = sum(1.0 + 0.1 * (1 + s.drafted) for s in drafted(0.0, table)[0][0].trace if not s.prefill)
    assert spent * 0.97 <= NEW * 1.1, "never below 0.97 times plain decoding"


class Clock:
    """Stands still unless told otherwise."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def one_sequence() -> Sequence:
    return Sequence(0, [1], SamplingParams(), AutoregressiveDecoder(), frozenset(), 99, 0.0)


def asks(width: Width, clock: Clock, draft: Draft, seconds: float, steps: int) -> list[bool]:
    """In which steps a draft is asked for, if making this one takes so many seconds."""
    drafter, sequence, asked = Oracle({}), one_sequence(), []
    for _ in range(steps):
        with width.timing():
            (length,) = width.lengths(drafter, [sequence])
            clock.now += seconds if length else 0.0
            width.trim([sequence], [draft if length else Draft()])
        asked.append(length > 0)
    return asked


def test_a_drafter_that_takes_more_time_than_it_saves_is_asked_for_a_hundredth_of_it() -> None:
    clock = Clock()
    width = Width(Table(1.0, 0.0), clock=clock)
    useless, good = Draft(Block([5]), confidence=[0.01]), Draft(Block([5]), confidence=[0.9])
    asked = asks(width, clock, useless, 0.05, 400)
    assert all(asked[:8]), "it gets a chance"
    assert 0.005 < 0.05 * sum(asked[100:]) / 300 <= 0.0101
    assert all(asks(width, clock, good, 0.05, 20)[8:]), "as soon as it pays, it is asked every time"
    assert all(asks(Width(Table(1.0, 0.0), clock=clock), clock, useless, 0.0, 50)), "what costs nothing may go on"
    assert sum(asks(Width(DEAR, clock=clock), clock, good, 0.05, 100)) < 35, "a guess that costs a step saves nothing"


def test_the_clock_decides_on_no_draft_that_is_sampled() -> None:
    clock = Clock()
    sampled = Draft(Block([5]), probabilities=torch.ones(1, 9) / 9)
    assert all(asks(Width(Table(1.0, 0.5), clock=clock), clock, sampled, 5.0, 50))


def test_trials_of_a_drafter_of_stated_cost_take_a_hundredth_of_the_time() -> None:
    width, drafter, sequence, spent = Width(Table(1.0, 0.0)), Oracle({}, seconds=2.0), one_sequence(), 0.0
    for _ in range(2000):
        (length,) = width.lengths(drafter, [sequence])
        spent += drafter.cost(length, 1, 0.0)
        width.trim([sequence], [Draft(Block([5] * length))])
        width.learn(sequence, [4])
    assert 4 < spent <= 0.01 * 2000 + 4, "the first trial is made at once"


def test_trials_go_on_of_a_drafter_that_cannot_guess_so_far() -> None:
    """One Medusa head: more levels than one have no finite cost."""

    class Short(Oracle):
        def cost(self, levels: int, sequences: int, context: float) -> float:
            return 2.0 if levels == 1 else math.inf

    clock, drafter, sequence, asked = Clock(), Short({}), one_sequence(), []
    width = Width(Table(1.0, 0.0), clock=clock)
    for _ in range(3000):
        (length,) = width.lengths(drafter, [sequence])
        with width.drafting():
            clock.now += 2.0 * length
        width.trim([sequence], [Draft(Block([5] * length))])
        width.learn(sequence, [4])
        asked.append(length)
    assert max(asked) == 1
    assert 10 < sum(asked[100:]) <= 15, "a hundredth of the time goes into trials of 2 s"


def test_an_infinite_prediction_is_held_against_nothing() -> None:
    pace = Pace()
    for _ in range(9):
        pace.saw(0.1, math.inf)
    assert pace.factor == 1.0


def test_a_clock_that_jumps_changes_no_answer() -> None:
    """Sequences rest and are asked for again at any time; what they say stays plain decoding's."""
    model = tiny_model("llama")
    backend = LocalBackend(model, tiny_tokenizer(), slots=4, capacity=128)
    inputs = prompts(4, seed=3)
    random = np.random.default_rng(2)
    for temperature in (0.0, 0.7):
        params = SamplingParams(max_new_tokens=32, ignore_eos=True, temperature=temperature, seed=5)
        plain = [s.new_tokens for s in run(backend.engine, [(p, AutoregressiveDecoder()) for p in inputs], params)]
        drafter, ticks = Watched("suffix+token-recycling"), itertools.accumulate(random.exponential(200.0, 10_000))
        decoder = SpeculativeDecoder(drafter, Width(Table(1.0, 0.1), clock=partial(next, ticks)))
        results = run(backend.engine, [(p, decoder) for p in inputs], params)
        assert [s.new_tokens for s in results] == plain
        steps = sum(step.committed > 0 for s in results for step in s.trace)
        assert len(inputs) < drafter.observed, "nothing was asked for"
        assert drafter.observed < steps or not temperature, "nothing rested"


class Watched(Mixed):
    observed = 0

    def observe(self, sequences: List[Sequence], output: Any, commits: List[Any]) -> None:
        assert len(sequences) == len(output.blocks) == len(commits)
        self.observed += len(sequences)
        super().observe(sequences, output, commits)


def test_expectations_come_true_on_average() -> None:
    results, _ = drafted(0.7, Table(1.0, 0.1))
    parts = [speculation(s.trace) for s in results]
    expected, measured = sum(p.expected for p in parts), sum(p.measured for p in parts)
    assert 0.75 < expected / measured < 1.3


def test_a_drafter_that_takes_longer_than_it_saves_is_only_probed() -> None:
    _, dear = drafted(1.0, Table(1.0, 0.01), seconds=3.0)
    assert 0 < dear.asked <= 2 * 2 * 4
    _, cheap = drafted(1.0, Table(1.0, 0.01), seconds=0.1)
    assert cheap.asked > 5 * dear.asked


def test_lengths_share_a_step_by_how_likely_each_is() -> None:
    likely, unlikely = [0.9**n for n in range(1, 9)], [0.4**n for n in range(1, 9)]
    chosen, gain = lengths([likely, unlikely], Table(1.0, 0.1), Oracle({}, seconds=0.05), 0.0)
    assert chosen[0] > chosen[1] >= 0 and gain > 1
    assert lengths([likely, unlikely], DEAR, Oracle({}, seconds=0.05), 0.0) == ([0, 0], 1.0)
    # 6 tokens are expected of guesses that cost nothing to make, so a second is worth more than a draft makes of it.
    assert lengths([likely, unlikely], Table(1.0, 0.1), Oracle({}, seconds=0.15), 0.0, sure=6.0, spent=8)[0] == [0, 0]


def noisy(model: Any) -> Any:
    other = tiny_model(model.config.model_type)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)) * 0.005)
    return other


@pytest.mark.parametrize("make", [PromptLookup, Suffix, TokenRecycling, DraftModel])
def test_answers_are_plain_decodings_greedy_and_sampled(make: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Sampled guesses aside, a seed gives the same answer whatever was guessed, withheld, or ran beside it."""
    monkeypatch.setattr(DraftModel, "cost", lambda self, levels, sequences, context: 0.1 * levels)
    model = tiny_model("llama")
    backend = LocalBackend(model, tiny_tokenizer(), slots=8, capacity=128)
    inputs = prompts(6, seed=3)
    for temperature in (0.0, 0.7):
        if make is DraftModel and temperature:
            continue
        params = SamplingParams(max_new_tokens=24, ignore_eos=True, temperature=temperature, top_p=0.95, seed=5)
        plain = [s.new_tokens for s in run(backend.engine, [(p, AutoregressiveDecoder()) for p in inputs], params)]
        drafter = DraftModel(noisy(model)) if make is DraftModel else make()
        drafter.attach(backend)
        for width in (3, Width(Table(1.0, 0.1))):
            decoder = SpeculativeDecoder(drafter, width)
            together = run(backend.engine, [(p, decoder) for p in inputs * 2], params)
            assert [s.new_tokens for s in together] == plain * 2
            rare = temperature if make is PromptLookup else make is TokenRecycling and isinstance(width, Width)
            assert accepted(together) > 0 or (rare and sum(t.drafted for s in together for t in s.trace) > 0)
        if temperature:
            broken = KeepsTheFirstGuess(drafter, 3)
            assert [s.new_tokens for s in run(backend.engine, [(p, broken) for p in inputs], params)] != plain


def test_the_same_requests_get_the_same_widths() -> None:
    model = tiny_model("llama")

    def steps() -> list[tuple[int, int]]:
        engine = Engine(Runner(model, slots=4, capacity=128))
        decoder = SpeculativeDecoder(TokenRecycling(), Width(Table(1.0, 0.1), clock=Clock()))
        results = run(engine, [(p, decoder) for p in prompts(8)], SamplingParams(max_new_tokens=24, ignore_eos=True))
        first = results[0].trace[0].step
        return [(t.step - first, t.drafted) for s in results for t in s.trace]

    assert steps() == steps()


def test_the_strategy_measures_where_the_backend_does() -> None:
    backend = LocalBackend(tiny_model("llama"), tiny_tokenizer(), slots=1, capacity=64)
    backend.latency = Table()  # type: ignore[assignment]
    adaptive = Speculative().decoder(backend)
    fixed = Speculative(draft_length=3).decoder(backend)
    assert isinstance(adaptive, SpeculativeDecoder) and isinstance(adaptive.width, Width)
    assert isinstance(fixed, SpeculativeDecoder) and fixed.width == 3
    assert adaptive.width.lengths(PromptLookup(), []) == [] and MOST_LEVELS > 8


class Crooked(Drafter):
    """Proposes `block` behind texts that begin with token 1."""

    def __init__(self, block: Block) -> None:
        self.name = "crooked"  # type: ignore[misc]
        self.block = block

    def propose(self, sequences: List[Sequence], lengths: List[int]) -> list[Draft]:
        return [Draft(self.block if s.tokens[0] == 1 else Block()) for s in sequences]


@pytest.mark.parametrize(
    ("block", "says"),
    [
        (Block([1, 2], [1, -1]), "names parent 1"),
        (Block([1, 2], [-1]), "one parent for every token"),
        (Block([1, 999]), "outside the model's vocabulary"),
        (Block([1] * 500, [-1] * 500), ""),  # larger than a sequence may be: decoded plainly
    ],
)
def test_a_bad_draft_fails_alone_and_with_a_clear_reason(block: Block, says: str) -> None:
    model = tiny_model("llama")
    for width in (8, Width(FREE)):
        engine = Engine(Runner(model, slots=2, capacity=64))
        decoder = SpeculativeDecoder(Crooked(block), width)
        params = SamplingParams(max_new_tokens=6, ignore_eos=True)
        bad, good = run(engine, [([1, 5, 9], decoder), ([2, 7, 3], decoder)], params)
        assert good.new_tokens == greedy_reference(model, [2, 7, 3], 6)
        if says:
            assert bad.error is not None and says in str(bad.error)
        else:
            assert bad.new_tokens == greedy_reference(model, [1, 5, 9], 6)


def withheld(drafts: Drafted, keeps: Any) -> Drafted:
    """The drafts with every token withheld behind the first that `keeps(text before it, token)` refuses."""
    texts = []
    for row in drafts.texts:
        kept: list[Any] = [()]
        for text in row[1:]:
            before = kept[-1]
            kept.append(text if before is not None and text and keeps(before, text[-1]) else None)
        texts.append(kept)
    return replace(drafts, texts=texts)


@pytest.mark.parametrize("chain", [verify_rejection, verify_block])
@pytest.mark.parametrize("name", ["random", "peaked", "zeros"])
def test_withholding_a_sampled_guess_is_lossless_only_if_decided_before_it_is_drawn(chain: Chain, name: str) -> None:
    target, drafter = languages(name, 3, 4)
    every = draw_drafts(drafter, range(-1, 2), replacement=True)

    def distance(keeps: Any) -> float:
        drafts = withheld(every, keeps)
        verify, total = over_all_drafts(chain, drafts, target, drafter)
        return outcome(verify, drafts, target, total).distance

    assert distance(lambda before, token: float(drafter.next[before].max()) > 0.5) <= 1e-9
    assert distance(lambda before, token: token == int(drafter.next[before].argmax())) > 1e-6


class ByTheText(Width):
    """Lengths that depend on what was drawn in earlier steps, as learnt ones do."""

    def lengths(self, drafter: Drafter, sequences: List[Sequence], covered: List[List[float]] = ()) -> list[int]:
        return [max(0, min(s.room, 1 + sum(s.tokens) % 2)) for s in sequences]


class Adaptive(SpeculativeDecoder):
    def __init__(self, drafter: Drafter, length: int) -> None:
        super().__init__(drafter, ByTheText(Table(1.0, 0.01)))


def small_draft_model(seed: int) -> DraftModel:
    from tests.test_drafters import _SMALL

    small = tiny_model("llama", **_SMALL)
    drafter = DraftModel(tiny_model("llama", **{**_SMALL, "num_hidden_layers": 1, "initializer_range": 0.3}, seed=seed))
    backend = LocalBackend(small, tiny_tokenizer(), slots=64, capacity=16)
    backend.tokenizer = []  # type: ignore[assignment]  # a vocabulary of four has none
    drafter.attach(backend)
    return drafter


def test_sampled_drafts_keep_the_distribution_whatever_the_widths() -> None:
    assert chi_square(*outcomes(small_draft_model(3), Adaptive, 1500)) > 1e-4


def test_a_level_that_was_never_reached_is_taken_for_like_the_one_above() -> None:
    calibration = Calibration()
    before = calibration.levels(0, 6)
    for _ in range(12):
        calibration.watch(0, Draft(Block([1, 2])))
        calibration.learn(0, [1, 2, 9])
    assert calibration.levels(0, 6)[5] > 0.6 > before[5]  # two levels that hold promise well for the third
    for _ in range(24):
        calibration.watch(0, Draft(Block([1, 2])))
        calibration.learn(0, [3, 9])
    assert calibration.levels(0, 6)[1] < 0.3
