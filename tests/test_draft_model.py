"""A smaller model that drafts: with its guesses the target still says what it would say alone."""

from __future__ import annotations

from collections.abc import Sequence as List
from functools import partial

import pytest
import torch
from transformers import PreTrainedModel

from decoding.api import generate
from decoding.backends.local import LocalBackend
from decoding.drafting import Draft
from decoding.engine.sequence import Sequence
from decoding.errors import InvalidRequest, ModelError
from decoding.strategies.autoregressive import AutoregressiveDecoder
from decoding.strategies.speculative import Speculative, SpeculativeDecoder
from decoding.types import SamplingParams
from drafters import DraftModel
from drafters.draft_model import guess_ahead
from tests.greedy import greedy_reference, prompts, run
from tests.test_drafters import _SMALL, accepted, chi_square, outcomes
from tests.tiny import tiny_model, tiny_tokenizer


def test_draft_model_equals_plain_decoding_and_is_accepted_sometimes() -> None:
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


def test_a_seed_gives_the_same_sampled_answer_again() -> None:
    """Whatever the draft model's cache holds by then."""
    backend = LocalBackend(tiny_model("llama"), tiny_tokenizer(), slots=4, capacity=96)
    strategy = Speculative(drafter=DraftModel(tiny_model("llama", seed=3)), draft_length=4)
    params = [SamplingParams(max_new_tokens=24, temperature=1.0, seed=seed, ignore_eos=True) for seed in range(4)]
    together = [a.tokens for a in generate(prompts(4), backend, strategy=strategy, params=params)]
    for _ in range(2):
        alone = [
            generate(p, backend, strategy=strategy, params=q).tokens for p, q in zip(prompts(4), params, strict=True)
        ]
        assert alone == together
    other = generate(prompts(4), backend, strategy=strategy, params=[q.but(seed=9 + q.seed) for q in params])
    assert [a.tokens for a in other] != together


@pytest.mark.parametrize("temperature", [0.0, 0.8])
@pytest.mark.parametrize("length", [3, None])
def test_a_draft_model_that_says_nan_leaves_plain_decoding(length: int | None, temperature: float) -> None:
    draft = tiny_model("llama")
    backend = LocalBackend(tiny_model("llama"), tiny_tokenizer(), slots=4, capacity=96)
    params = SamplingParams(max_new_tokens=12, temperature=temperature, seed=4, ignore_eos=True)
    strategy = Speculative(drafter=DraftModel(draft), draft_length=length)
    backend.decoder(strategy)  # a model that is broken from the start is refused here
    draft.model.norm.weight.data.fill_(torch.nan)
    answers = generate(prompts(3), backend, strategy=strategy, params=params)
    assert [a.error for a in answers] == [None] * 3
    assert [a.tokens for a in answers] == [a.tokens for a in generate(prompts(3), backend, params=params)]


@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_a_draft_ends_before_the_level_that_is_not_finite(temperature: float) -> None:
    model = tiny_model("llama")
    backend = LocalBackend(model, tiny_tokenizer(), slots=4, capacity=96)
    params = SamplingParams(temperature=temperature, seed=4)
    sequences = [backend.engine.submit(p, params, AutoregressiveDecoder()) for p in prompts(3)]

    def ahead(active: list[int], guesses: list[list[int]]) -> torch.Tensor:
        logits = torch.zeros(len(active), 9)
        for row, i in enumerate(active):
            if len(guesses[row]) == i:
                logits[row, 4] = torch.nan if i < 2 else torch.inf
        return logits

    drafts = guess_ahead(sequences, [4, 4, 4], ahead)
    assert [len(draft.block) for draft in drafts] == [0, 1, 2]
    if temperature:
        assert [0 if d.probabilities is None else len(d.probabilities) for d in drafts] == [0, 1, 2]
    else:
        assert [len(draft.confidence or ()) for draft in drafts] == [0, 1, 2]


def test_a_draft_model_with_another_vocabulary_is_refused() -> None:
    backend = LocalBackend(tiny_model("llama"), tiny_tokenizer(), slots=2, capacity=64)
    with pytest.raises(ModelError, match="same tokenizer"):
        DraftModel(tiny_model("llama", vocab_size=200, bos_token_id=None, eos_token_id=None, pad_token_id=None)).attach(
            backend
        )


def small_draft(branches: int) -> DraftModel:
    """For the target of `outcomes`."""
    drafter = DraftModel(tiny_model("llama", seed=3, **_SMALL), branches=branches)
    drafter.attach(LocalBackend(tiny_model("llama", **_SMALL), tiny_tokenizer(), slots=64, capacity=16))
    return drafter


class DrawsAgain(SpeculativeDecoder):
    """The negative control: takes siblings that were drawn without replacement for one draw after the other."""

    def _propose(self, sequences: List[Sequence], lengths: list[int]) -> list[Draft]:
        drafts = super()._propose(sequences, lengths)
        for draft in drafts:
            if draft.probabilities is not None:
                draft.probabilities[0] = 0.25
        return drafts


@pytest.mark.parametrize("verification", ["traversal", "token"])
def test_siblings_that_were_drawn_keep_the_models_distribution(verification: str) -> None:
    decoder = partial(SpeculativeDecoder, verification=verification)
    assert chi_square(*outcomes(small_draft(2), decoder, 2500)) > 1e-4
    assert chi_square(*outcomes(small_draft(2), partial(DrawsAgain, verification=verification), 2500)) < 1e-6


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_branches_are_accepted_where_the_first_guess_is_not(temperature: float) -> None:
    model = tiny_model("llama")
    gained = []
    for branches in (1, 3):
        backend = LocalBackend(model, tiny_tokenizer(), slots=4, capacity=96)
        drafter = DraftModel(tiny_model("llama", seed=2, initializer_range=0.32), branches=branches)
        drafter.attach(backend)
        params = SamplingParams(max_new_tokens=24, temperature=temperature, top_k=8, seed=5, ignore_eos=True)
        results = run(backend.engine, [(p, SpeculativeDecoder(drafter, 3)) for p in prompts(4)], params)
        assert [s.error for s in results] == [None] * 4
        if not temperature:
            assert [s.new_tokens for s in results] == [greedy_reference(model, p, 24) for p in prompts(4)]
        gained.append(accepted(results))
    assert gained[1] > gained[0]
    with pytest.raises(InvalidRequest, match="branches"):
        DraftModel(model, branches=0)
