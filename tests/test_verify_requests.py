"""Verification from end to end: what sampled requests get through the engine, every way to verify, and bad drafts."""

from __future__ import annotations

import itertools
from collections.abc import Sequence as List

import numpy as np
import pytest
import torch

import decoding
from decoding.backends.local import LocalBackend
from decoding.drafting import Draft, Drafter
from decoding.engine.block import Block
from decoding.engine.confirm import LOSSY, VERIFICATIONS
from decoding.engine.engine import Engine
from decoding.engine.runner import Runner
from decoding.engine.sampling import SamplingColumns, draw, probabilities, uniforms
from decoding.engine.sequence import Sequence
from decoding.errors import InvalidRequest, UnknownName
from decoding.strategies.autoregressive import AutoregressiveDecoder
from decoding.strategies.speculative import Speculative, SpeculativeDecoder
from decoding.types import SamplingParams
from tests.greedy import prompts, run
from tests.test_drafters import chi_square, outcomes
from tests.tiny import EOS, VOCABULARY, tiny_model, tiny_tokenizer

VOCAB = 4
CHAIN, TREE = (-1, 0), (-1, -1, 0, 0, 1)


class Bigrams(Drafter):
    """Draws chains or trees from a table of what follows each token, children of a node without replacement.

    honest: what it says it drew from is what it drew from.
    """

    name = "sampled-bigrams"

    def __init__(self, parents: List[int], honest: bool = True) -> None:
        self.parents, self.honest = parents, honest
        self.table = torch.rand(VOCAB, VOCAB, generator=torch.Generator().manual_seed(6)) * 3 - 1.5  # logits

    def propose(self, sequences: List[Sequence], lengths: List[int]) -> list[Draft]:
        return [self._draw(s) if length >= 2 else Draft() for s, length in zip(sequences, lengths, strict=True)]

    def _draw(self, sequence: Sequence) -> Draft:
        columns = SamplingColumns.of([sequence.params])
        u = uniforms(columns.seed, torch.tensor([sequence.draws]), 7, len(self.parents))[0]
        rows = [
            probabilities(self.table[sequence.tokens[-1]][None], columns)[0]
        ]  # of the root's children, then of each
        left = [rows[0].clone()]
        tokens: list[int] = []
        for node, parent in enumerate(self.parents):
            token = int(draw(left[parent + 1][None], u[node : node + 1]))
            left[parent + 1][token] = 0
            tokens.append(token)
            rows.append(probabilities(self.table[token][None], columns)[0])
            left.append(rows[-1].clone())
        chain = self.parents == CHAIN
        told = torch.stack(rows[:-1] if chain else rows)
        return Draft(Block(tokens, None if chain else self.parents), told if self.honest else told.flip(-1))


def through(verification: str) -> type[SpeculativeDecoder]:
    class Verified(SpeculativeDecoder):
        def __init__(self, drafter: Drafter, length: int) -> None:
            super().__init__(drafter, length, verification)

    return Verified


@pytest.mark.parametrize("shape", [CHAIN, TREE], ids=["chain", "tree"])
@pytest.mark.parametrize("verification", [name for name in VERIFICATIONS if name not in LOSSY])
def test_sampled_drafts_keep_the_models_distribution(verification: str, shape: List[int]) -> None:
    assert chi_square(*outcomes(Bigrams(shape), through(verification), 1200)) > 1e-4


@pytest.mark.parametrize("shape", [CHAIN, TREE], ids=["chain", "tree"])
def test_a_drafter_that_misstates_its_distribution_is_caught(shape: List[int]) -> None:
    assert chi_square(*outcomes(Bigrams(shape, honest=False), through("block"), 1200)) < 1e-6


def test_typical_acceptance_changes_the_distribution_and_says_so() -> None:
    assert chi_square(*outcomes(Bigrams(CHAIN), through("typical"), 1200, rejects=False)) < 1e-6
    assert [decoding.resolve(f"speculative(verification={name})").lossless for name in VERIFICATIONS] == [
        name not in LOSSY for name in VERIFICATIONS
    ]
    assert "typical" in str(Speculative(verification="typical"))
    with pytest.raises(UnknownName, match="typical"):
        decoding.resolve("speculative(verification=typcal)")


@pytest.mark.parametrize("verification", VERIFICATIONS)
def test_greedy_requests_are_exact_however_others_are_verified(verification: str) -> None:
    backend = LocalBackend(tiny_model("llama"), tiny_tokenizer(), eos=[EOS], slots=2, capacity=256)
    params = SamplingParams(max_new_tokens=16, ignore_eos=True)
    plain = decoding.generate("abcabc", backend, params=params).tokens
    for drafter in ("prompt-lookup", "token-recycling"):
        strategy = Speculative(drafter=drafter, draft_length=4, verification=verification)
        assert decoding.generate("abcabc", backend, strategy=strategy, params=params).tokens == plain


def test_unsampled_guesses_give_plain_decodings_answer_where_work_cannot_be_skipped(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """On an accelerator the draws at all guesses are made at once; the answer is the same."""
    from decoding.engine import confirm as module
    from drafters import TokenRecycling

    model = tiny_model("llama")
    params = SamplingParams(max_new_tokens=20, ignore_eos=True, temperature=0.8, top_k=20, seed=9)
    work = prompts(4, seed=3)

    def answers() -> list[list[int]]:
        engine = Engine(Runner(model, slots=4, capacity=96))
        decoder = SpeculativeDecoder(TokenRecycling(), 4)
        return [s.new_tokens for s in run(engine, [(p, decoder) for p in work], params)]

    lazily = answers()
    calls: list[int] = []
    draw_at = module._draw_at

    def counted(*arguments: object) -> list[int]:
        drawn = draw_at(*arguments)  # type: ignore[arg-type]
        calls.append(len(drawn))
        return drawn

    monkeypatch.setattr(module, "_draw_at", counted)
    monkeypatch.setattr(module, "_walks", lambda device: False)
    assert answers() == lazily
    assert max(calls) > 4, "no step drew more than one token per sequence, so nothing was drawn at once"


class Bad(Drafter):
    """Proposes what cannot be, for one of the requests."""

    name = "bad"

    def __init__(self, victim: List[int], draft: Draft | Exception) -> None:
        self.victim, self.draft = list(victim), draft

    def propose(self, sequences: List[Sequence], lengths: List[int]) -> list[Draft]:
        drafts = []
        for sequence in sequences:
            if sequence.prompt != self.victim:
                drafts.append(Draft(Block([sequence.tokens[-1]])))
            elif isinstance(self.draft, Exception):
                raise self.draft
            else:
                drafts.append(self.draft)
        return drafts


FAILURES: dict[str, tuple[Draft | Exception, str]] = {
    "an id outside the vocabulary": (Draft(Block([5, VOCABULARY])), "outside the model's vocabulary"),
    "a negative id": (Draft(Block([-1])), "outside the model's vocabulary"),
    "a parent that comes later": (Draft(Block([1, 2], [1, -1])), "does not come before it"),
    "too few parents": (Draft(Block([1, 2], [-1])), "one parent for every token"),
    "too few confidences": (Draft(Block([1, 2]), confidence=[0.5]), "confidence"),
    "too few sources": (Draft(Block([1, 2]), sources=["a"]), "sources"),
    "an exception": (RuntimeError("the drafter broke"), "the drafter broke"),
}


@pytest.mark.parametrize("what", FAILURES)
def test_a_bad_draft_fails_its_own_request_with_its_cause(what: str) -> None:
    draft, cause = FAILURES[what]
    model = tiny_model("llama")
    engine = Engine(Runner(model, slots=4, capacity=96))
    inputs = prompts(4, seed=1)
    params = SamplingParams(max_new_tokens=8, ignore_eos=True)
    plain = [s.new_tokens for s in run(engine, [(p, AutoregressiveDecoder()) for p in inputs], params)]
    decoder = SpeculativeDecoder(Bad(inputs[1], draft), 4)
    results = run(engine, [(p, decoder) for p in inputs], params)
    assert [s.finish_reason for s in results] == ["length", "error", "length", "length"]
    assert cause in str(results[1].error)
    assert [s.new_tokens for i, s in enumerate(results) if i != 1] == [t for i, t in enumerate(plain) if i != 1]
    assert [s.new_tokens for s in run(engine, [(inputs[1], AutoregressiveDecoder())], params)] == [plain[1]]


@pytest.mark.parametrize("draft", [Block([7] * 300), Block([7] * 300, [-1] * 300)], ids=["chain", "tree"])
def test_a_draft_larger_than_the_cache_is_not_verified(draft: Block) -> None:
    model = tiny_model("llama")
    engine = Engine(Runner(model, slots=4, capacity=96))
    inputs = prompts(3, seed=1)
    params = SamplingParams(max_new_tokens=8, ignore_eos=True)
    plain = [s.new_tokens for s in run(engine, [(p, AutoregressiveDecoder()) for p in inputs], params)]
    results = run(engine, [(p, SpeculativeDecoder(Bad(inputs[1], Draft(draft)), 4)) for p in inputs], params)
    assert [s.new_tokens for s in results] == plain
    assert sum(step.drafted for step in results[1].trace) == 0


@pytest.mark.parametrize(
    ("parents", "shape"),
    [
        (None, (2, 3)),
        (None, (2, 1)),
        (None, (1, VOCABULARY)),
        (None, (3, VOCABULARY)),
        ([-1, 0], (2, VOCABULARY)),
        ([-1, 0], (4, VOCABULARY)),
    ],
)
def test_distributions_of_the_wrong_shape_fail_their_own_request(
    parents: list[int] | None, shape: tuple[int, int]
) -> None:
    model = tiny_model("llama")
    engine = Engine(Runner(model, slots=4, capacity=96))
    inputs = prompts(3, seed=1)
    params = SamplingParams(max_new_tokens=6, ignore_eos=True, temperature=1.0)
    bad = Draft(Block([1, 2], parents), probabilities=torch.ones(shape) / shape[1])
    results = run(engine, [(p, SpeculativeDecoder(Bad(inputs[1], bad), 4)) for p in inputs], params)
    assert [s.finish_reason for s in results] == ["length", "error", "length"]
    assert f"give ({2 if parents is None else 3}, {VOCABULARY})" in str(results[1].error)
    assert len(results[1].new_tokens) == 1, "its first draft was not what failed it"


@pytest.mark.parametrize("verification", [name for name in VERIFICATIONS if name not in LOSSY])
@pytest.mark.parametrize("parents", [None, [-1, 0]], ids=["chain", "tree"])
def test_distributions_that_are_not_finite_fail_their_own_request(parents: list[int] | None, verification: str) -> None:
    inputs = prompts(3, seed=1)
    chances = torch.full((2 if parents is None else 3, VOCABULARY), 1 / VOCABULARY)
    chances[1] = torch.nan
    params = SamplingParams(max_new_tokens=6, ignore_eos=True, temperature=1.0)
    engine = Engine(Runner(tiny_model("llama"), slots=4, capacity=96))
    decoder = SpeculativeDecoder(Bad(inputs[1], Draft(Block([1, 2], parents), chances)), 4, verification)
    results = run(engine, [(p, decoder) for p in inputs], params)
    assert [s.finish_reason for s in results] == ["length", "error", "length"]
    assert "NaN or infinite" in str(results[1].error)
    assert len(results[1].new_tokens) == 1, "its first draft was not what failed it"


def test_draft_length_is_a_positive_integer_or_left_to_measurement() -> None:
    for bad in (0, -1, 2.5, True, "many"):
        with pytest.raises(InvalidRequest, match="draft_length"):
            Speculative(draft_length=bad)  # type: ignore[arg-type]
    assert decoding.resolve("speculative(draft_length=none)") == Speculative()


def test_the_seed_of_a_place_is_used_once() -> None:
    """Two places of an answer, and a place's draw and test, must not share random numbers."""
    from decoding.engine.confirm import PLACE_STREAM, VERIFY_STREAM
    from drafters.draft_model import _STREAM

    assert len({PLACE_STREAM, VERIFY_STREAM, _STREAM}) == 3
    seed = torch.zeros(3, dtype=torch.long)
    numbers = [uniforms(seed, torch.arange(3), stream, 4) for stream in (PLACE_STREAM, VERIFY_STREAM, _STREAM)]
    flat = torch.cat(numbers).flatten().tolist()
    assert len(set(flat)) == len(flat)
    assert np.isfinite(flat).all() and len(list(itertools.chain(flat))) == 36
