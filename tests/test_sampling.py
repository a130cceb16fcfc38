"""Random numbers, logit processors and warpers, and the draw."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy import stats
from transformers import (
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    LogitsProcessorList,
    MinPLogitsWarper,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from decoding.engine import sampling
from decoding.engine.sampling import (
    SamplingColumns,
    adjust,
    draw,
    draw_distinct,
    probabilities,
    token_logprobs,
    uniforms,
)
from decoding.types import SamplingParams


def column(*values: int) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.long)


def test_uniforms_are_uniform() -> None:
    u = uniforms(column(*range(400)), column(*range(400)), 0, 500).flatten().numpy()
    assert u.min() >= 0 and u.max() < 1
    assert stats.kstest(u, "uniform").pvalue > 1e-4
    counts = np.bincount((u * 256).astype(int), minlength=256)
    assert stats.chisquare(counts).pvalue > 1e-4


def test_the_uniformity_test_notices_an_arithmetic_shift(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sampling, "_shift_right", lambda bits, by: bits >> by)
    u = uniforms(column(*range(400)), column(*range(400)), 0, 500).flatten().numpy()
    assert stats.kstest(u, "uniform").pvalue < 1e-6


def test_every_bit_of_a_uniform_is_fair() -> None:
    u = uniforms(column(*range(2000)), column(*[7] * 2000), 3, 8).flatten()
    bits = (u * 2**53).long()
    for place in range(53):
        ones = int(((bits >> place) & 1).sum())
        assert stats.binomtest(ones, len(bits)).pvalue > 1e-5, place


def _joint_p_value(a: torch.Tensor, b: torch.Tensor) -> float:
    """Chi-square test that pairs (a, b) fill a 16 × 16 grid evenly, as independent uniforms do."""
    cells = (a * 16).long() * 16 + (b * 16).long()
    return float(stats.chisquare(np.bincount(cells.flatten().numpy(), minlength=256)).pvalue)


def test_neighboring_seeds_steps_streams_and_positions_are_independent() -> None:
    count = torch.arange(200)
    zero = torch.zeros_like(count)
    for other in (
        uniforms(count + 1, zero, 0, 200),
        uniforms(count, zero + 1, 0, 200),
        uniforms(count, zero, 1, 200),
        uniforms(count, zero, 0, 201)[:, 1:],
    ):
        assert _joint_p_value(uniforms(count, zero, 0, 200), other) > 1e-4
    along = uniforms(zero + 5, count, 0, 200)
    assert _joint_p_value(along[:-1], along[1:]) > 1e-4
    assert _joint_p_value(along, along * 0.9) < 1e-6


def test_uniforms_depend_on_a_rows_own_seed_and_step_only() -> None:
    seeds, steps = column(5, -3, 2**63 - 1, -(2**63)), column(0, 9, 9, 123456)
    batch = uniforms(seeds, steps, 2, 6)
    for row in range(4):
        assert torch.equal(uniforms(seeds[row : row + 1], steps[row : row + 1], 2, 3)[0], batch[row, :3])
    assert len(set(batch.flatten().tolist())) == batch.numel()


def test_seeds_of_any_size_become_columns() -> None:
    columns = SamplingColumns.of([SamplingParams(seed=s) for s in (0, -1, 2**64 - 1, 2**200 + 3)])
    assert columns.seed.tolist() == [0, -1, -1, 3]


WARPERS = [
    SamplingParams(temperature=0.7),
    SamplingParams(temperature=1.3, top_k=7),
    SamplingParams(temperature=1.0, top_p=0.8),
    SamplingParams(temperature=1.0, top_p=0.05),
    SamplingParams(temperature=2.5, top_p=0.999),
    SamplingParams(temperature=1.0, min_p=0.1),
    SamplingParams(temperature=0.8, top_k=40, top_p=0.9, min_p=0.02),
    SamplingParams(temperature=1.0, top_k=5000),
    SamplingParams(temperature=1.0, top_k=1),
    SamplingParams(temperature=1.0, min_p=1.0),
]


def transformers_probabilities(logits: torch.Tensor, params: SamplingParams) -> torch.Tensor:
    warpers = LogitsProcessorList([TemperatureLogitsWarper(params.temperature)])
    if params.top_k:
        warpers.append(TopKLogitsWarper(params.top_k))
    if params.top_p < 1:
        warpers.append(TopPLogitsWarper(params.top_p))
    if params.min_p:
        warpers.append(MinPLogitsWarper(params.min_p))
    no_tokens = torch.zeros(len(logits), 1, dtype=torch.long)
    scores: torch.Tensor = warpers(no_tokens, logits)  # type: ignore[arg-type]
    return scores.softmax(-1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("vocab", [11, 3000])
@pytest.mark.parametrize("spread", [0.5, 4.0])
def test_filters_agree_with_transformers(dtype: torch.dtype, vocab: int, spread: float) -> None:
    generator = torch.Generator().manual_seed(vocab)
    logits = torch.randn(len(WARPERS), vocab, generator=generator, dtype=dtype) * spread
    ours = probabilities(logits, SamplingColumns.of(WARPERS))
    assert ours.dtype == dtype
    for row, params in enumerate(WARPERS):
        theirs = transformers_probabilities(logits[row : row + 1], params)[0]
        assert torch.equal(ours[row] > 0, theirs > 0), params
        torch.testing.assert_close(ours[row], theirs, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("vocab", [11, 3000])
def test_filters_keep_as_many_tied_tokens_as_transformers_does(vocab: int) -> None:
    """Which of the tied ones it keeps is up to an unstable sort."""
    generator = torch.Generator().manual_seed(1)
    logits = torch.randint(0, 4, (len(WARPERS), vocab), generator=generator).double()
    ours = probabilities(logits, SamplingColumns.of(WARPERS))
    for row, params in enumerate(WARPERS):
        theirs = transformers_probabilities(logits[row : row + 1], params)[0]
        torch.testing.assert_close(ours[row].sort().values, theirs.sort().values, atol=1e-12, rtol=0)


def test_a_nucleus_drops_the_lowest_of_tied_tokens() -> None:
    for vocab in (5, 3000):
        logits = torch.full((2, vocab), -torch.inf)
        logits[:, [0, 2, 3, 4]] = 1.0
        columns = SamplingColumns.of([SamplingParams(temperature=1.0, top_p=p) for p in (0.4, 0.6)])
        assert [row.nonzero()[:, 0].tolist() for row in probabilities(logits, columns)] == [[3, 4], [2, 3, 4]]


def test_processors_and_their_order_agree_with_generate() -> None:
    """All of it at once, against the scores that transformers' own `generate` reports."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=1500, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2
    )
    model = LlamaForCausalLM(config).eval()
    model.lm_head.weight.data *= 300  # peaked enough for the filters to bite
    prompt = torch.tensor([[5, 8, 13, 21, 5]])
    eos = [3, 1400]
    bias = {5: 6.0, 21: -4.0, 3: 9.0, 1400: 9.0}
    params = SamplingParams(
        temperature=0.8,
        top_k=50,
        top_p=0.9,
        min_p=0.01,
        repetition_penalty=1.7,
        logit_bias=bias,
        min_new_tokens=5,
    )
    out = model.generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        generation_config=GenerationConfig(
            do_sample=True,
            temperature=params.temperature,
            top_k=params.top_k,
            top_p=params.top_p,
            min_p=params.min_p,
            repetition_penalty=params.repetition_penalty,
            min_new_tokens=params.min_new_tokens,
            sequence_bias=[[[token], value] for token, value in bias.items()],
            max_new_tokens=8,
            eos_token_id=eos,
            pad_token_id=0,
            output_scores=True,
            output_logits=True,
            return_dict_in_generate=True,
        ),
    )
    steps = len(out.logits)
    assert steps > params.min_new_tokens, "the ban must be seen to end"
    logits = torch.cat(out.logits)
    seen = torch.zeros(steps, config.vocab_size, dtype=torch.bool)
    for step in range(steps):
        seen[step, out.sequences[0, : prompt.shape[1] + step]] = True
    columns = SamplingColumns.of([params]).rows(torch.zeros(steps, dtype=torch.long))
    early = [(row, token) for row in range(params.min_new_tokens) for token in eos]
    ours = probabilities(adjust(logits, columns, seen=seen.nonzero().T, banned=torch.tensor(early).T), columns)
    theirs = torch.cat(out.scores).softmax(-1)
    assert torch.equal(ours > 0, theirs > 0)
    torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=1e-5)


def test_greedy_rows_of_a_mixed_batch_are_one_hot_and_leave_the_others_alone() -> None:
    params = [SamplingParams(), SamplingParams(temperature=1.0, top_k=2), SamplingParams(top_k=3, top_p=0.5, min_p=0.5)]
    logits = torch.tensor([[1.0, 7.0, 7.0, 0.0]] * 3)
    probs = probabilities(logits, SamplingColumns.of(params))
    assert probs.tolist() == [[0, 1, 0, 0], [0, 0.5, 0.5, 0], [0, 1, 0, 0]]
    assert probabilities(logits[:1], SamplingColumns.of(params[:1])).tolist() == [[0, 1, 0, 0]]


def test_a_row_is_the_same_alone_and_in_a_batch() -> None:
    logits = torch.randn(len(WARPERS), 2500, generator=torch.Generator().manual_seed(3)) * 3
    batch = probabilities(logits, SamplingColumns.of(WARPERS))
    for row, params in enumerate(WARPERS):
        alone = probabilities(logits[row : row + 1], SamplingColumns.of([params]))[0]
        torch.testing.assert_close(batch[row], alone, atol=1e-7, rtol=1e-6)
        assert torch.equal(batch[row] > 0, alone > 0)


def test_the_plain_greedy_path_touches_nothing() -> None:
    columns = SamplingColumns.of([SamplingParams(), SamplingParams(max_new_tokens=9)])
    assert columns.all_greedy and not columns.needs_history
    logits = torch.randn(2, 8, dtype=torch.bfloat16)
    assert adjust(logits, columns) is logits


def test_adjustments_belong_to_their_row() -> None:
    params = [
        SamplingParams(logit_bias={1: 5.0, 3: -2.0, 999: 1.0}),
        SamplingParams(repetition_penalty=2.0),
        SamplingParams(),
        SamplingParams(),
    ]
    logits = torch.tensor([[1.0, -1.0, 2.0, -4.0]] * 4)
    seen = torch.tensor([[True, True, False, False]] * 4)
    banned = torch.tensor([[2], [2]])
    adjusted = adjust(logits, SamplingColumns.of(params), seen=seen.nonzero().T, banned=banned).tolist()
    assert adjusted == [
        [1.0, 4.0, 2.0, -6.0],
        [0.5, -2.0, 2.0, -4.0],
        [1.0, -1.0, -math.inf, -4.0],
        [1.0, -1.0, 2.0, -4.0],
    ]


def test_columns_expand_to_rows() -> None:
    columns = SamplingColumns.of([SamplingParams(temperature=0.5, logit_bias={4: 1.0}), SamplingParams(seed=9)])
    rows = columns.rows(column(1, 0, 0))
    assert rows.temperature.tolist() == [0, 0.5, 0.5]
    assert rows.bias_values.tolist() == [[0.0], [1.0], [1.0]]
    assert rows.seed.tolist() == [9, 0, 0]
    assert not rows.all_greedy and rows.uses_bias


def test_draw_inverts_the_cumulative_distribution() -> None:
    weights = torch.tensor([0.0, 1.0, 0.0, 2.0, 5.0, 0.0], dtype=torch.double)
    u = torch.tensor([0.0, 0.1249999, 0.125, 0.3749999, 0.375, 0.9999999], dtype=torch.double)
    assert draw(weights.expand(len(u), -1), u).tolist() == [1, 1, 3, 3, 4, 4]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_draw_never_returns_an_impossible_token(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    probs = torch.rand(500, 4000, generator=generator, dtype=dtype) ** 20
    probs[torch.rand(500, 4000, generator=generator) < 0.9] = 0
    probs[:, -100:] = 0
    probs[:, :100] = 0
    probs /= probs.sum(-1, keepdim=True)
    edge = 1 - 2.0**-53
    for value in (0.0, 2.0**-53, 0.5, edge, 1.0):
        tokens = draw(probs, torch.full((500,), value, dtype=torch.double))
        assert (probs.gather(1, tokens[:, None]) > 0).all(), value


def test_drawn_tokens_follow_the_distribution() -> None:
    probs = torch.tensor([0.5, 0.0, 0.3, 0.15, 0.05])
    u = uniforms(torch.arange(20000), torch.zeros(20000, dtype=torch.long), 0, 1)[:, 0]
    counts = np.bincount(draw(probs.expand(20000, -1), u).numpy(), minlength=5)
    assert counts[1] == 0
    kept = probs.double().numpy()[[0, 2, 3, 4]]
    assert stats.chisquare(counts[[0, 2, 3, 4]], kept / kept.sum() * 20000).pvalue > 1e-4


def test_distinct_tokens_are_drawn_in_order_from_what_is_left() -> None:
    probs = torch.tensor([0.6, 0.3, 0.1, 0.0], dtype=torch.double)
    u = uniforms(torch.arange(20000), torch.zeros(20000, dtype=torch.long), 0, 4)
    pairs = draw_distinct(probs.expand(20000, -1), u)
    assert (pairs[:, 3] == -1).all()
    assert (pairs[:, :3].sort(dim=1).values == torch.arange(3)).all()
    outcomes = [(a, b) for a in range(3) for b in range(3) if a != b]
    observed = [int(((pairs[:, 0] == a) & (pairs[:, 1] == b)).sum()) for a, b in outcomes]
    expected = [20000 * float(probs[a] * probs[b] / (1 - probs[a])) for a, b in outcomes]
    assert stats.chisquare(observed, expected).pvalue > 1e-4


def test_log_probabilities_are_those_of_the_raw_logits() -> None:
    logits = torch.tensor([[0.0, math.log(3.0)], [5.0, 5.0]], dtype=torch.bfloat16)
    values = token_logprobs(logits, column(1, 0))
    assert values.dtype == torch.float32
    torch.testing.assert_close(values, torch.tensor([0.75, 0.5]).log(), atol=3e-3, rtol=0)


def test_sampling_never_waits_for_the_device() -> None:
    """Meta tensors have no values, so anything that asks for one raises."""
    columns = SamplingColumns.of(
        [SamplingParams(temperature=0.5, top_k=3, top_p=0.5, min_p=0.1, repetition_penalty=2)], "meta"
    )
    logits = torch.empty(1, 5000, device="meta")
    ids = torch.zeros(1, dtype=torch.long, device="meta")
    logits = adjust(logits, columns, seen=ids.expand(2, 1), banned=ids.expand(2, 1))
    token = draw(probabilities(logits, columns), uniforms(columns.seed, ids, 0, 1)[:, 0])
    assert token.shape == token_logprobs(logits, token).shape == (1,)


def test_filters_are_the_same_where_no_row_may_be_skipped(monkeypatch: pytest.MonkeyPatch) -> None:
    logits = torch.randint(0, 9, (len(WARPERS), 2000), generator=torch.Generator().manual_seed(0)).float()
    skipping = probabilities(logits, SamplingColumns.of(WARPERS))
    monkeypatch.setattr(sampling, "rows_worth_visiting", lambda wanted: torch.arange(len(wanted)))
    assert torch.equal(probabilities(logits, SamplingColumns.of(WARPERS)), skipping)
