"""Several drafters in one tree."""

from __future__ import annotations

from collections.abc import Sequence as List
from types import SimpleNamespace
from typing import Any

import pytest

import decoding
from decoding import drafting
from decoding.backends.local import LocalBackend
from decoding.drafting import Draft, Drafter
from decoding.engine.block import Block, Commit
from decoding.engine.pace import Live
from decoding.engine.sequence import Sequence
from decoding.engine.width import Width
from decoding.errors import InvalidRequest, UnknownName
from decoding.strategies.speculative import Speculative, SpeculativeDecoder
from decoding.trace import origins, speculation
from decoding.types import SamplingParams
from drafters import Mixed
from drafters.mixed import _Tree
from tests.greedy import prompts, run
from tests.test_drafters import KeepsTheFirstGuess, accepted, chi_square, outcomes, text
from tests.test_width import Table
from tests.tiny import EOS, tiny_model, tiny_tokenizer


class Always(Drafter):
    """Guesses the same chain in every place."""

    def __init__(self, name: str, tokens: List[int], confidence: float) -> None:
        self.name = name  # type: ignore[misc]
        self.tokens, self.confidence = list(tokens), confidence

    def propose(self, sequences: List[Sequence], lengths: List[int]) -> list[Draft]:
        return [Draft(Block(self.tokens[:n]), confidence=[self.confidence] * len(self.tokens[:n])) for n in lengths]


def test_equal_guesses_become_one_node_with_both_names() -> None:
    mixed = Mixed([Always("a", [1, 2, 3], 0.5), Always("b", [1, 2, 4], 0.7), Always("c", [5], 0.2)])
    (draft,) = mixed.propose([text([9])], [3])
    assert (list(draft.block.tokens), draft.block.parents) == ([1, 2, 3, 4, 5], [-1, 0, 1, 1, -1])
    assert draft.sources == ["a+b", "a+b", "a", "b", "c"]
    assert draft.confidence == pytest.approx([0.7, 0.7, 0.5, 0.7, 0.2])
    small = Mixed([Always("a", [1, 2, 3], 0.5), Always("b", [1, 2, 4], 0.7), Always("c", [5], 0.2)], nodes=3)
    (few,) = small.propose([text([9])], [3])
    assert (list(few.block.tokens), few.block.parents, few.sources) == ([1, 2, 4], [-1, 0, 1], ["a+b", "a+b", "b"])


def test_a_request_learns_whom_to_trust() -> None:
    """Of two drafters that say the same of themselves, the one that was right is believed, in this request first."""
    mixed = Mixed([Always("liar", [1], 0.8), Always("honest", [2], 0.8)], nodes=1)
    one, other = text([9]), text([9])
    assert mixed.propose([one], [1])[0].sources == ["liar"], "nothing is known yet; the first comes first"
    for _ in range(12):
        mixed.propose([one], [1])
        one.tokens += [2]
        mixed.observe([one], None, [Commit([2])])  # type: ignore[arg-type]
    assert mixed.propose([one], [1])[0].sources == ["honest"]
    assert mixed.propose([other], [1])[0].sources == ["honest"], "what one request taught, the next one starts from"
    mixed.forget(one)
    mixed.unlearn()
    assert mixed.propose([other], [1])[0].sources == ["liar"]


def test_drafts_are_held_against_the_text_even_if_nobody_was_asked_for_a_while() -> None:
    mixed, sequence = Mixed([Always("a", [2], 0.3)]), text([9])
    for _ in range(20):
        mixed.propose([sequence], [1])
        sequence.tokens += [2, 5, 5]  # the last two in steps of which it was not told
    (draft,) = mixed.propose([sequence], [1])
    assert draft.confidence is not None and draft.confidence[0] > 0.8
    mixed.forget(sequence)
    assert not mixed._read


class Dear(Always):
    """Takes little of a step per level, and keeps what it was asked for."""

    stated = False

    trust = 0.97

    def propose(self, sequences: List[Sequence], lengths: List[int]) -> list[Draft]:
        self.asked = list(lengths)
        return super().propose(sequences, lengths)

    def cost(self, levels: int, sequences: int, context: float) -> float:
        self.stated = True
        return 0.005 * levels


def test_a_drafter_that_takes_time_is_not_asked_for_what_others_hold_already() -> None:
    class Sometimes(Always):
        def propose(self, sequences: List[Sequence], lengths: List[int]) -> list[Draft]:
            drafts = super().propose(sequences, lengths)
            return [draft if s.tokens[0] == 1 else Draft() for s, draft in zip(sequences, drafts, strict=True)]

    dear = Dear("dear", [7] * 24, 0.9)
    mixed = Mixed([dear, Sometimes("cheap", [5] * 24, 0.99)])
    mixed.attach(SimpleNamespace(live=Table(1.0, 0.01)))  # type: ignore[arg-type]
    assert dear.stated, "costs may have to be measured, which cannot be done while sequences decode"
    known, unknown = text([1]), text([2])
    mixed._widths[0]._saved_up = 0.0  # no trial is due
    mixed.propose([known, unknown], [24, 24])
    assert dear.asked[0] == 0 < dear.asked[1]
    tree = _Tree()
    tree.graft(Block([1, 2, 3], [-1, -1, 0]), [0.5, 0.3, 0.5], "a")
    assert tree.covered() == pytest.approx([0.8, 0.25])


def test_a_drafter_that_takes_time_is_weighed_against_all_that_is_in_the_step() -> None:
    """The sequences that rest are not passed on, and yet every guess keeps them waiting."""
    others = [0]
    dear = Dear("dear", [7] * 24, 0.9)
    mixed = Mixed([dear])
    mixed.attach(SimpleNamespace(live=Live(Table(1.0, 0.1), lambda sequences: others[0])))  # type: ignore[arg-type]
    mixed._widths[0]._saved_up = 0.0  # no trial is due
    asked = []
    for others[0] in (0, 64):
        mixed.propose([text([1])], [24])
        asked += dear.asked
    assert asked[0] > 0 == asked[1]


def test_mixed_is_named_with_its_members_and_their_options() -> None:
    form = "speculative(drafter=mixed(drafters=suffix(depth=12, factor=2)+token-recycling, nodes=8))"
    strategy = decoding.resolve(form)
    assert isinstance(strategy, Speculative)
    mixed = drafting.find(str(strategy.drafter))
    assert isinstance(mixed, Mixed) and [str(m) for m in mixed._members] == [
        "suffix(depth=12, factor=2)",
        "token-recycling",
    ]
    with pytest.raises(UnknownName, match="suffix"):
        drafting.find("mixed(drafters=sufix+token-recycling)")
    with pytest.raises(InvalidRequest, match="nodes"):
        drafting.find("mixed(nodes=0)")
    with pytest.raises(InvalidRequest, match="at least one"):
        Mixed([])


@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_mixed_answers_are_plain_decodings_and_every_token_has_its_origin(temperature: float) -> None:
    model = tiny_model("llama")
    backend = LocalBackend(model, tiny_tokenizer(), slots=8, capacity=96)
    params = SamplingParams(max_new_tokens=24, ignore_eos=True, temperature=temperature, seed=3)
    inputs = prompts(6, seed=3)
    plain = run(backend.engine, [(p, decoding.Autoregressive().decoder(backend)) for p in inputs], params)
    for width in (4, Width(Table(1.0, 0.1))):
        decoder = SpeculativeDecoder(Mixed(), width)
        results = [run(backend.engine, [(p, decoder) for p in inputs], params) for _ in range(2)][1]
        assert [s.new_tokens for s in results] == [s.new_tokens for s in plain]
        assert accepted(results) > 0
        names = set()
        for sequence in results:
            found = origins(sequence.trace)
            assert len(found) == len(sequence.new_tokens)
            assert [o.step for o in found] == sorted(o.step for o in found)
            names |= {o.drafter for o in found}
            report = speculation(sequence.trace)
            assert sum(n * times for n, times in report.histogram.items()) == report.passes * report.acceptance_length
            assert report.wasted == sum(s.drafted - s.accepted for s in sequence.trace if not s.prefill)
            assert set(report.by_source) <= {"prompt-lookup", "suffix", "token-recycling"}
            assert all(share.accepted <= share.drafted for share in report.by_source.values())
        assert "" in names and any("suffix" in name for name in names)


@pytest.mark.parametrize("name", ["mixed(nodes=2)", "mixed(drafters=suffix)"])
def test_mixed_sampling_keeps_the_models_distribution(name: str) -> None:
    assert chi_square(*outcomes(drafting.find(name), SpeculativeDecoder, 1500)) > 1e-4
    assert chi_square(*outcomes(drafting.find(name), KeepsTheFirstGuess, 800)) < 1e-6


def test_a_backend_answers_with_every_untrained_drafter_by_name() -> None:
    lm: Any = LocalBackend(tiny_model("llama"), tiny_tokenizer(), eos=[EOS], slots=2, capacity=256)
    params = decoding.SamplingParams(max_new_tokens=12, ignore_eos=True)
    plain = decoding.generate("abcabc", lm, params=params).tokens
    for drafter in ("mixed", "layer-skip(layers=1)", "suffix", "token-recycling", "prompt-lookup"):
        strategy = f"speculative(drafter={drafter})"
        assert decoding.generate("abcabc", lm, strategy=strategy, params=params).tokens == plain
