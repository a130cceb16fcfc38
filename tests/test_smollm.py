"""Exactness on a real model: every lossless decoder, alone and in a ragged batch, against plain greedy decoding."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

import decoding
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
        "draft model": Speculative(DraftModel(first_layers(smollm.model, 2)), draft_length=3),
        "jacobi": Jacobi(block_size=8),
    }


@pytest.fixture(scope="module")
def plain_alone(lm: decoding.LocalBackend, prompts: list[str]) -> list[list[int]]:
    return [decoding.generate(prompt, lm, params=PARAMS).tokens for prompt in prompts]


def test_plain_decoding_is_greedy(lm: decoding.LocalBackend, prompts: list[str], plain_alone: list[list[int]]) -> None:
    assert len(prompts) >= 24
    ties = 0
    for prompt, tokens in zip(prompts, plain_alone, strict=True):
        violations, found = greedy_violations(lm.model, lm.encode(prompt), tokens)
        assert not violations, f"{prompt[:40]!r}: wrong tokens at {violations}"
        ties += found
    assert ties <= 1, "true ties are expected once in ten thousand tokens"


def test_plain_decoding_equals_transformers_generate(
    lm: decoding.LocalBackend, prompts: list[str], plain_alone: list[list[int]]
) -> None:
    for prompt, tokens in list(zip(prompts, plain_alone, strict=True))[::5]:
        ids = torch.tensor([lm.encode(prompt)])
        theirs = lm.model.generate(  # type: ignore[operator]
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=64, do_sample=False
        )
        assert theirs[0, ids.shape[1] :].tolist() == tokens


@pytest.mark.parametrize("name", ["prompt lookup", "draft model", "jacobi"])
def test_alone_equals_plain_decoding(
    lm: decoding.LocalBackend,
    prompts: list[str],
    plain_alone: list[list[int]],
    strategies: dict[str, TokenStrategy],
    name: str,
) -> None:
    for prompt, tokens in zip(prompts, plain_alone, strict=True):
        generation = decoding.generate(prompt, lm, strategy=strategies[name], params=PARAMS)
        assert generation.error is None
        _same(lm, prompt, generation.tokens, tokens)


@pytest.mark.parametrize("name", ["plain", "prompt lookup", "draft model", "jacobi"])
def test_a_ragged_batch_equals_plain_decoding(
    lm: decoding.LocalBackend,
    prompts: list[str],
    plain_alone: list[list[int]],
    strategies: dict[str, TokenStrategy],
    name: str,
) -> None:
    for start in range(0, len(prompts), BATCH):
        batch = prompts[start : start + BATCH]
        generations = decoding.generate(batch, lm, strategy=strategies[name], params=PARAMS)
        for prompt, generation, tokens in zip(batch, generations, plain_alone[start:], strict=False):
            assert generation.error is None
            _same(lm, prompt, generation.tokens, tokens)


def _same(lm: decoding.LocalBackend, prompt: str, tokens: list[int], plain: list[int]) -> None:
    """Equal, or different only behind a true tie."""
    if tokens != plain:
        violations, ties = greedy_violations(lm.model, lm.encode(prompt), tokens)
        assert ties and not violations, f"{prompt[:40]!r}: wrong tokens at {violations}"


def test_the_comparison_notices_one_wrong_token(
    lm: decoding.LocalBackend, prompts: list[str], plain_alone: list[list[int]]
) -> None:
    wrong = [*plain_alone[8][:9], plain_alone[8][9] + 1, *plain_alone[8][10:]]
    violations, _ = greedy_violations(lm.model, lm.encode(prompts[8]), wrong)
    assert 9 in violations
    with pytest.raises(AssertionError, match="wrong tokens"):
        _same(lm, prompts[8], wrong, plain_alone[8])


def test_all_strategies_in_one_batch(
    lm: decoding.LocalBackend, prompts: list[str], plain_alone: list[list[int]], strategies: dict[str, TokenStrategy]
) -> None:
    import asyncio

    from decoding.api import run

    async def mixed() -> list[decoding.Generation]:
        jobs = [(prompts[i], strategy) for i, strategy in enumerate([*strategies.values()] * 2)]
        return await asyncio.gather(*(strategy.answer(prompt, PARAMS, lm) for prompt, strategy in jobs))

    generations = run(mixed())
    assert max(step.batch_sequences for step in generations[-1].trace) > 4
    for prompt, generation, tokens in zip(prompts, generations, plain_alone, strict=False):
        _same(lm, prompt, generation.tokens, tokens)


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
