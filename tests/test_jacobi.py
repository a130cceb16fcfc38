"""Jacobi decoding: every schedule gives plain decoding's tokens, and spends width only where it pays."""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Sequence as List

import numpy as np
import pytest
import torch

import decoding
from decoding.engine.block import Commit
from decoding.engine.engine import Engine
from decoding.engine.output import Output
from decoding.engine.runner import Runner
from decoding.engine.sequence import Sequence
from decoding.engine.width import Width
from decoding.errors import InvalidRequest
from decoding.strategies import Jacobi, parse
from decoding.strategies.autoregressive import AutoregressiveDecoder
from decoding.strategies.jacobi import JacobiDecoder
from decoding.strategies.ngrams import Followers, branches
from decoding.strategies.worth import Reach, Worth
from decoding.types import SamplingParams
from tests.refiners import Slope, accepted, prompts, run, violations
from tests.tiny import EOS, tiny_model, tiny_tokenizer

PARAMS = SamplingParams(max_new_tokens=32, ignore_eos=True)
DECODERS = {
    "sliding": lambda: JacobiDecoder(6),
    "text n-grams": lambda: JacobiDecoder(6, recycle=False),
    "iterate": lambda: JacobiDecoder(6, initial="iterate"),
    "prompt": lambda: JacobiDecoder(6, initial="prompt", candidates=2),
    "branches": lambda: JacobiDecoder(6, candidates=3),
    "gauss-seidel": lambda: JacobiDecoder(8, schedule="gauss-seidel"),
    "hybrid": lambda: JacobiDecoder(8, schedule="hybrid", recycle=False, initial="iterate"),
    "several blocks": lambda: JacobiDecoder(5, schedule="gauss-seidel", blocks=3, candidates=2),
    "adaptive": lambda: JacobiDecoder(16, candidates=2, width=Width(Slope(0.05))),
    "adaptive, trained": lambda: JacobiDecoder(8, initial="iterate", width=Width(Slope(0.05)), trained=True),
}


def engine(kind: str = "llama", slots: int = 8) -> Engine:
    return Engine(Runner(tiny_model(kind), slots=slots, capacity=96), step_tokens=40)


@pytest.mark.parametrize("together", [False, True], ids=["alone", "ragged batch"])
@pytest.mark.parametrize("name", DECODERS)
def test_greedy_tokens_equal_plain_decoding(name: str, together: bool) -> None:
    kind = "gemma3" if together and name == "several blocks" else "llama"
    decoder, here = DECODERS[name](), engine(kind)
    work = [(prompt, decoder) for prompt in prompts(6)]
    batches = [work] if together else [[one] for one in work]
    results = [s for batch in batches for s in run(here, batch, PARAMS)]
    assert [len(s.new_tokens) for s in results] == [32] * 6
    assert violations(tiny_model(kind), results) == 0
    assert accepted(results) > 0, "no guess was ever accepted, so nothing was tested"
    assert not decoder._iterations


@pytest.mark.parametrize("name", DECODERS)
def test_a_seed_gives_plain_decodings_sampled_tokens(name: str) -> None:
    params = [PARAMS.but(temperature=0.9, top_p=0.95, seed=seed, max_new_tokens=20) for seed in range(4)]
    here, answers = engine(), {}
    for which, decoder in (("plain", AutoregressiveDecoder()), (name, DECODERS[name]())):
        sequences = [here.submit(p, each, decoder) for p, each in zip(prompts(4), params, strict=True)]
        while here.busy:
            here.step()
        answers[which] = [s.new_tokens for s in sequences]
    assert answers[name] == answers["plain"]
    assert len({tuple(tokens) for tokens in answers["plain"]}) == 4


class AcceptsTheFirstGuess(JacobiDecoder):
    """The negative control: keeps the block's first guess without asking the model."""

    def commit(self, sequences: List[Sequence], output: Output) -> list[Commit]:
        commits = super().commit(sequences, output)
        for i, block in enumerate(output.blocks):
            if block:
                commits[i] = Commit([block.tokens[0], int(output.best(i)[1])])
        return commits


def test_the_equality_tests_notice_an_unverified_guess() -> None:
    results = run(engine(), [(p, AcceptsTheFirstGuess(6)) for p in prompts(2)], PARAMS)
    assert violations(tiny_model(), results) > 0


def widths(decoder: JacobiDecoder, params: SamplingParams = PARAMS, eos: List[int] = ()) -> list[tuple[int, int]]:
    """(guesses, tokens gained) of every step after the prompt, one sequence alone."""
    here = engine()
    sequence = here.submit(prompts(1)[0], params, decoder, eos)
    while here.busy:
        here.step()
    return [(step.drafted, step.committed) for step in sequence.trace if not step.prefill]


def test_a_block_is_iterated_to_its_fixed_point_before_the_next_one_starts() -> None:
    left = 0
    for drafted, gained in widths(JacobiDecoder(6, schedule="gauss-seidel", recycle=False, initial="iterate"))[:-6]:
        left = left or 5
        assert drafted == left, "the block shrinks by what became text, and by nothing else"
        left = max(0, left - gained)


def test_a_further_block_joins_when_half_of_the_one_before_is_settled() -> None:
    one = widths(JacobiDecoder(7, schedule="gauss-seidel"))
    several = widths(JacobiDecoder(7, schedule="gauss-seidel", blocks=3))
    assert max(drafted for drafted, _ in one) == 6
    assert 6 < max(drafted for drafted, _ in several[:-18]) <= 18


def test_the_hybrid_decodes_plainly_behind_a_guessed_end() -> None:
    params = SamplingParams(max_new_tokens=32)
    # Every token ends the answer but those of the answer itself, so that any wrong guess looks like an end.
    text = run(engine(), [(prompts(1)[0], AutoregressiveDecoder())], PARAMS)[0].new_tokens
    eos = [token for token in range(128) if token not in text]
    hybrid = widths(JacobiDecoder(8, schedule="hybrid", initial="iterate", recycle=False), params, eos)
    seidel = widths(JacobiDecoder(8, schedule="gauss-seidel", initial="iterate", recycle=False), params, eos)
    assert sum(drafted == 0 for drafted, _ in hybrid[:-1]) > sum(drafted == 0 for drafted, _ in seidel[:-1])


def test_guesses_continue_the_longest_run_seen_before() -> None:
    followers = Followers()
    followers.read([1, 2, 3, 4, 9, 2, 7, 1, 2])
    assert followers.find([1, 2]) == ([3], 2), "'1 2' was followed by 3, though a lone 2 came later with 7"
    assert followers.find([5, 2]) == ([7], 1)
    assert followers.find([5]) == ([], 0)


def test_a_first_guess_may_be_the_prompt() -> None:
    here, decoder, prompt = engine(slots=1), JacobiDecoder(6, initial="prompt"), list(range(5, 14))
    sequence = here.submit(prompt, PARAMS, decoder)
    here.step()
    at = len(sequence.tokens)
    assert list(decoder.plan([sequence])[0].tokens) == [prompt[(at + i) % len(prompt)] for i in range(5)]


def test_recycled_ngrams_hold_answers_to_rejected_guesses() -> None:
    model, here = tiny_model(), engine(slots=1)
    decoder = JacobiDecoder(4)
    sequence = here.submit([5, 6, 7], SamplingParams(max_new_tokens=20, ignore_eos=True), decoder)
    here.step()
    (guess,) = decoder.plan([sequence])
    text = [*sequence.tokens, *guess.tokens]
    with torch.no_grad():
        answer = int(model(torch.tensor([text])).logits[0, -1].argmax())
    here.step()
    assert len(sequence.new_tokens) < 5, "everything was accepted, so nothing was rejected"
    assert decoder._iterations[sequence.id].followers.find(text)[0] == [answer]


def test_branches_share_what_they_have_in_common() -> None:
    block = branches([[1, 2, 3], [1, 4], [5]])
    assert list(block.tokens) == [1, 2, 3, 4, 5] and list(block.parents or ()) == [-1, 0, 1, 0, -1]


@pytest.mark.parametrize(
    "make", [lambda w: JacobiDecoder(16, width=w), lambda w: JacobiDecoder(16, width=w, trained=True)]
)
def test_no_width_is_spent_where_a_guess_costs_a_whole_step(make: Callable[[Width], JacobiDecoder]) -> None:
    dear = [sum(drafted for drafted, _ in widths(make(Width(Slope(price))))) for price in (2.0, 0.001)]
    assert dear[0] == 0 < dear[1]


def test_decisions_depend_on_what_was_asked_alone() -> None:
    first, again = (widths(JacobiDecoder(16, candidates=2, width=Width(Slope(0.05)))) for _ in range(2))
    assert first == again


def test_what_does_not_pay_is_dropped_and_tried_again_after_a_while() -> None:
    worth, ran = Worth(2.0), []
    for _ in range(600):
        ran.append(worth.mean >= 1.5)
        if ran[-1]:
            worth.saw(1)
        else:
            worth.rested()
    assert ran[0] and sum(ran) < 40, "it brings one token for the price of one and a half"
    assert any(ran[100:]), "never tried again"


def test_a_block_is_as_long_as_iterating_it_pays() -> None:
    steep, flat = 1 + 0.2 * np.arange(9), np.ones(9)
    reach = Reach(0.6, 8)
    assert reach.width(1 + np.arange(9.0)) == 0 and 0 < reach.width(steep) < reach.width(flat) == 8
    for _ in range(40):
        reach.saw(8, 5)
    assert reach.width(steep) == 5, "five guesses hold, the sixth never does"
    for _ in range(60):
        reach.saw(5, 0)
    assert reach.width(steep) == 0
    for _ in range(400):
        reach.saw(0, 0)
    assert reach.width(steep) > 0, "never tried again"


def test_blocks_stay_within_the_room_and_end_exactly() -> None:
    model, prompt = tiny_model(), prompts(1)[0]
    plain = Engine(Runner(model, slots=1, capacity=64))
    (reference,) = run(plain, [(prompt, AutoregressiveDecoder())], PARAMS.but(max_new_tokens=64))
    longest = reference.new_tokens
    for make in (DECODERS["branches"], DECODERS["several blocks"], DECODERS["hybrid"]):
        for new in (1, 2, 7, 500):
            here = Engine(Runner(model, slots=2, capacity=64))
            (result,) = run(here, [(prompt, make())], PARAMS.but(max_new_tokens=new))
            assert result.new_tokens == longest[:new]
            assert result.finish_reason == ("context" if new == 500 else "length")


def test_the_strategies_decode_through_the_public_interface() -> None:
    lm = decoding.LocalBackend(tiny_model(), tiny_tokenizer(), eos=[EOS], slots=4, capacity=128)
    params = SamplingParams(max_new_tokens=20)
    expected = decoding.generate("la la la la", lm, params=params).tokens
    for strategy in (
        Jacobi(block_size=4),
        Jacobi(block_size=4, initial="iterate", recycle=False),
        Jacobi(initial="prompt"),
        Jacobi(block_size=8, schedule="gauss-seidel", blocks=2, candidates=2),
        Jacobi(),
    ):
        answer = decoding.generate("la la la la", lm, strategy=str(strategy), params=params)
        assert parse(str(strategy)) == strategy and strategy.lossless
        assert answer.tokens == expected


def test_what_no_sequence_has_room_for_is_refused() -> None:
    lm = decoding.LocalBackend(tiny_model(), tiny_tokenizer(), eos=[EOS], slots=2, capacity=64)
    for text in ("jacobi(block_size=65)", "jacobi(block_size=16, blocks=5, schedule=hybrid)", "lookahead(window=50)"):
        with pytest.raises(InvalidRequest, match=r"a sequence.* 64; choose a smaller"):
            decoding.generate("la", lm, strategy=text)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("jacobi(recycle=sometimes)", "recycle must be true or false"),
        ("jacobi(schedule=gauss)", "did you mean 'gauss-seidel'"),
        ("jacobi(initial=ngram)", "did you mean 'ngrams'"),
        ("jacobi(blocks=2)", "schedule=gauss-seidel"),
        ("jacobi(blocks=0, schedule=hybrid)", "blocks must be an integer of at least 1"),
        ("jacobi(candidates=-1)", "candidates must be an integer of at least 0"),
        ("jacobi(block_size=1)", "block_size must be an integer of at least 2"),
    ],
)
def test_bad_options_are_named(text: str, message: str) -> None:
    with pytest.raises(InvalidRequest, match=message):
        parse(text)
    with pytest.raises(InvalidRequest, match="adapter must be a name or a folder"):
        Jacobi(adapter=3)  # type: ignore[arg-type]
