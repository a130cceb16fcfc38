"""Exactness on a real model: every lossless decoder, alone and in a ragged batch, against plain greedy decoding."""

from __future__ import annotations

import asyncio
import copy
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

import decoding
from decoding.api import run
from decoding.models import LoadedModel
from decoding.strategies import Jacobi, Speculative, TokenStrategy
from drafters import DraftModel
from tests.exactness import greedy_violations

pytestmark = pytest.mark.slow
PARAMS = decoding.SamplingParams(max_new_tokens=64)
BATCH = 8


@pytest.fixture(scope="module")
def lm(smollm: LoadedModel) -> decoding.LocalBackend:
    return decoding.LocalBackend(
        smollm.model, smollm.tokenizer, name=smollm.name, eos=smollm.eos_token_ids, slots=BATCH, capacity=1024
    )


def first_layers(model: Any, count: int) -> PreTrainedModel:
    """The same model without its later layers: a draft model that shares the tokenizer, and every weight."""
    config = copy.deepcopy(model.config)
    config.num_hidden_layers = count
    with torch.device("meta"):
        small: Any = type(model)(config)
    small.load_state_dict(model.state_dict(), strict=False, assign=True)
    small.model.rotary_emb = model.model.rotary_emb
    small.lm_head.weight = small.model.embed_tokens.weight
    whole: PreTrainedModel = small.eval()
    return whole


@pytest.fixture(scope="module")
def strategies(smollm: LoadedModel) -> dict[str, TokenStrategy]:
    return {
        "plain": decoding.Autoregressive(),
        "prompt lookup": Speculative("prompt-lookup", draft_length=6),
        "draft model": Speculative(DraftModel(first_layers(smollm.model, 1)), draft_length=2),
        "jacobi": Jacobi(block_size=8),
    }


@pytest.mark.parametrize("first", range(0, 24, 4))
def test_alone_every_decoder_is_greedy(
    lm: decoding.LocalBackend, prompts: list[str], strategies: dict[str, TokenStrategy], first: int
) -> None:
    for prompt in prompts[first : first + 4]:
        plain = decoding.generate(prompt, lm, params=PARAMS).tokens
        _check_greedy(lm, prompt, plain)
        for name in ("prompt lookup", "draft model", "jacobi"):
            generation = decoding.generate(prompt, lm, strategy=strategies[name], params=PARAMS)
            assert generation.error is None
            _same(lm, prompt, generation.tokens, plain)


@pytest.mark.parametrize("first", range(0, 24, BATCH))
def test_in_a_ragged_batch_every_decoder_is_greedy(
    lm: decoding.LocalBackend, prompts: list[str], strategies: dict[str, TokenStrategy], first: int
) -> None:
    batch = prompts[first : first + BATCH]
    plain = decoding.generate(batch, lm, params=PARAMS)
    for prompt, generation in zip(batch, plain, strict=True):
        _check_greedy(lm, prompt, generation.tokens)
    for name in ("prompt lookup", "draft model", "jacobi"):
        for prompt, generation, expected in zip(
            batch, decoding.generate(batch, lm, strategy=strategies[name], params=PARAMS), plain, strict=True
        ):
            assert generation.error is None
            _same(lm, prompt, generation.tokens, expected.tokens)


@pytest.mark.parametrize("number", [2, 9, 16, 22])
def test_plain_decoding_equals_transformers_generate(
    lm: decoding.LocalBackend, prompts: list[str], number: int
) -> None:
    ids = torch.tensor([lm.encode(prompts[number])])
    theirs = lm.model.generate(  # type: ignore[operator]
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=48, do_sample=False
    )
    ours = decoding.generate(prompts[number], lm, params=PARAMS.but(max_new_tokens=48))
    assert theirs[0, ids.shape[1] :].tolist() == ours.tokens


def _check_greedy(lm: decoding.LocalBackend, prompt: str, tokens: list[int]) -> None:
    """Every token is the choice of a plain, unbatched forward pass, but for true ties."""
    violations, ties = greedy_violations(lm.model, lm.encode(prompt), tokens)
    assert not violations, f"{prompt[:40]!r}: wrong tokens at {violations}"
    assert ties <= 1, "true ties are expected once in ten thousand tokens"


def _same(lm: decoding.LocalBackend, prompt: str, tokens: list[int], plain: list[int]) -> None:
    """Equal, or different only behind a true tie."""
    if tokens != plain:
        violations, ties = greedy_violations(lm.model, lm.encode(prompt), tokens)
        assert ties and not violations, f"{prompt[:40]!r}: wrong tokens at {violations}"


def test_the_comparison_notices_one_wrong_token(lm: decoding.LocalBackend, prompts: list[str]) -> None:
    right = decoding.generate(prompts[8], lm, params=PARAMS.but(max_new_tokens=16)).tokens
    wrong = [*right[:9], right[9] + 1, *right[10:]]
    violations, _ = greedy_violations(lm.model, lm.encode(prompts[8]), wrong)
    assert 9 in violations
    with pytest.raises(AssertionError, match="wrong tokens"):
        _check_greedy(lm, prompts[8], wrong)
    with pytest.raises(AssertionError, match="wrong tokens"):
        _same(lm, prompts[8], wrong, right)


def test_all_strategies_in_one_batch(
    lm: decoding.LocalBackend, prompts: list[str], strategies: dict[str, TokenStrategy]
) -> None:
    params = PARAMS.but(max_new_tokens=32)

    async def mixed() -> list[decoding.Generation]:
        jobs = [(prompts[i], strategy) for i, strategy in enumerate([*strategies.values()] * 2)]
        return await asyncio.gather(*(strategy.answer(prompt, params, lm) for prompt, strategy in jobs))

    generations = run(mixed())
    assert max(step.batch_sequences for generation in generations for step in generation.trace) > 4
    for prompt, generation in zip(prompts, generations, strict=False):
        _check_greedy(lm, prompt, generation.tokens)


def test_a_skeleton_answer_reuses_its_prefix(lm: decoding.LocalBackend) -> None:
    generation = decoding.generate(
        "What are good ways to save water at home?", lm, strategy="skeleton", params=PARAMS.but(max_new_tokens=96)
    )
    points = [part for label, part in generation.parts.items() if label.startswith("point")]
    assert len(points) >= 2 and generation.error is None
    assert generation.metrics.tokens_per_forward > 1
    prompt_tokens = sum(part.metrics.prompt_tokens for part in points)
    assert sum(part.metrics.prefill_tokens for part in points) <= 0.4 * prompt_tokens
    for part in points:
        assert part.text.split(".")[0].strip() in generation.text
