"""From logits to tokens: each request's own randomness, its processors and warpers, and the draw.

Everything is a pure function over rows, one row per token that is about to be chosen (a sequence's next
token, a draft position, a tree node). The order and the cuts are those of transformers' `generate`: logit
bias, repetition penalty, end-of-sequence ban (`adjust`), then temperature, top-k, top-p, min-p
(`probabilities`).

Probabilities are float32 (float64 for float64 logits): a step may need `[sequences, positions, vocab]` of
them, and the target and the drafter only have to use the *same* numbers to be lossless. What accumulates
error (sums and cumulative sums over the vocabulary) is carried in float64.

Nothing here waits for an accelerator, see `rows_worth_visiting`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from decoding.types import SamplingParams


def _signed(value: int) -> int:
    """The 64-bit two's complement reading of an integer of any size."""
    return (value + 2**63) % 2**64 - 2**63


_GOLDEN = _signed(0x9E3779B97F4A7C15)
_NUCLEUS_CANDIDATES = 1024


def _shift_right(bits: Tensor, by: int) -> Tensor:
    """Logical shift; torch's `>>` on int64 drags the sign bit along."""
    return (bits >> by) & ((1 << (64 - by)) - 1)


def _mix(bits: Tensor) -> Tensor:
    """The finalizer of splitmix64 (Steele, Lea & Flood 2014): a bijection in which every input bit matters."""
    bits = (bits ^ _shift_right(bits, 30)) * _signed(0xBF58476D1CE4E5B9)
    bits = (bits ^ _shift_right(bits, 27)) * _signed(0x94D049BB133111EB)
    return bits ^ _shift_right(bits, 31)


def uniforms(seed: Tensor, step: Tensor, stream: int, n: int) -> Tensor:
    """`[R, n]` float64 uniform numbers in [0, 1), 53 random bits each, as a function of the arguments alone.

    seed, step: int64 `[R]`, a request's seed and its own count of steps. stream separates uses within a
    step (drafting, verifying). There is no state: a row's numbers do not depend on the other rows, and
    its first k numbers do not depend on n.
    """
    key = _mix(seed + _GOLDEN)
    key = _mix(key + step * _GOLDEN)
    key = _mix(key ^ _signed((stream + 1) * 0xD1B54A32D192ED03))
    counter = torch.arange(1, n + 1, device=seed.device)
    bits = _mix(key[:, None] + counter * _GOLDEN)  # [R, n]
    return _shift_right(bits, 11).double() * 2.0**-53


@dataclass(frozen=True)
class SamplingColumns:
    """Sampling parameters as columns, one row per sequence or, after `rows`, per token to be chosen.

    Tensors are `[R]`; bias_tokens (int64) and bias_values are `[R, B]`, padded with token 0 and value 0.
    temperature 0 is greedy. top_k 0 and top_p 1 are off. The plain fields are known on the host, so that
    what no row asks for costs nothing; they may say yes where a selection of rows would say no.
    """

    temperature: Tensor
    top_k: Tensor
    top_p: Tensor
    min_p: Tensor
    repetition_penalty: Tensor
    seed: Tensor
    bias_tokens: Tensor
    bias_values: Tensor
    all_greedy: bool
    any_greedy: bool
    max_top_k: int
    uses_top_p: bool
    uses_min_p: bool
    uses_bias: bool
    needs_history: bool

    @classmethod
    def of(cls, params: Sequence[SamplingParams], device: torch.device | str = "cpu") -> SamplingColumns:
        """One row per entry of `params`. Seeds of any size are taken modulo 2**64."""

        def column(values: Sequence[float] | list[list[float]], dtype: torch.dtype = torch.double) -> Tensor:
            return torch.tensor(values, dtype=dtype, device=device)

        width = max((len(p.logit_bias) for p in params), default=0)
        missing = [[0.0] * (width - len(p.logit_bias)) for p in params]
        bias_tokens = [[*p.logit_bias, *pad] for p, pad in zip(params, missing, strict=True)]
        bias_values = [[*p.logit_bias.values(), *pad] for p, pad in zip(params, missing, strict=True)]
        return cls(
            temperature=column([p.temperature for p in params]),
            top_k=column([p.top_k for p in params], torch.long),
            top_p=column([p.top_p for p in params]),
            min_p=column([p.min_p for p in params]),
            repetition_penalty=column([p.repetition_penalty for p in params]),
            seed=column([_signed(p.seed) for p in params], torch.long),
            bias_tokens=column(bias_tokens, torch.long).view(len(params), width),
            bias_values=column(bias_values).view(len(params), width),
            all_greedy=all(p.temperature == 0 for p in params),
            any_greedy=any(p.temperature == 0 for p in params),
            max_top_k=max((p.top_k for p in params), default=0),
            uses_top_p=any(p.top_p < 1 for p in params),
            uses_min_p=any(p.min_p > 0 for p in params),
            uses_bias=width > 0,
            needs_history=any(p.repetition_penalty != 1 for p in params),
        )

    def rows(self, index: Tensor) -> SamplingColumns:
        """The columns with row `index[r]` (int64 `[R]`) at row r; rows may be repeated."""
        return replace(
            self,
            temperature=self.temperature[index],
            top_k=self.top_k[index],
            top_p=self.top_p[index],
            min_p=self.min_p[index],
            repetition_penalty=self.repetition_penalty[index],
            seed=self.seed[index],
            bias_tokens=self.bias_tokens[index],
            bias_values=self.bias_values[index],
        )


def rows_worth_visiting(wanted: Tensor) -> Tensor:
    """The rows that work across the whole vocabulary has to visit: `[R]` bool to `[r]` int64 row numbers.

    On the CPU those that are wanted: the answer is free and every row saved is a pass over the vocabulary
    saved. Elsewhere all of them: the host would have to wait for the answer while the device idles.
    Callers must therefore mask what they write back.
    """
    if wanted.device.type == "cpu":
        return wanted.nonzero().squeeze(-1)
    return torch.arange(len(wanted), device=wanted.device)


def _working(logits: Tensor) -> Tensor:
    return logits if logits.dtype == torch.double else logits.float()


def adjust(
    logits: Tensor,
    columns: SamplingColumns,
    *,
    seen: Tensor | None = None,
    banned: Tensor | None = None,
) -> Tensor:
    """Logits `[R, V]` after logit bias, repetition penalty and the ban on ending too early.

    seen: int64 `[2, N]`, pairs of a row and a token of its prompt, of its answer so far, or of the draft above it; a
        pair may come twice. Needed where `columns.needs_history`.
    banned: int64 `[2, N]`, pairs of a row and a token that must not come there.

    Where no row asks for anything the very same tensor comes back, unconverted. Biased tokens beyond the
    vocabulary are ignored (a draft model's may be smaller than the target's).
    """
    if columns.uses_bias:
        logits = _working(logits)
        inside = columns.bias_tokens < logits.shape[-1]
        values = torch.where(inside, columns.bias_values, 0.0).to(logits.dtype)
        logits = logits.scatter_add(1, torch.where(inside, columns.bias_tokens, 0), values)
    if columns.needs_history:
        assert seen is not None, "a repetition penalty needs the tokens seen so far"
        logits = _working(logits)
        rows, tokens = seen
        found, penalty = logits[rows, tokens], columns.repetition_penalty[rows].to(logits.dtype)
        logits = logits.index_put((rows, tokens), torch.where(found < 0, found * penalty, found / penalty))
    if banned is not None and banned.numel():
        logits = _working(logits)
        logits = logits.index_put((banned[0], banned[1]), logits.new_tensor(-torch.inf))
    return logits


def probabilities(logits: Tensor, columns: SamplingColumns) -> Tensor:
    """The distributions `[R, V]` to sample from, given adjusted logits `[R, V]`.

    Temperature, top-k, top-p, min-p in this order. Greedy rows put everything on their argmax (the lowest
    token at a tie), so that a mixed batch needs no second code path. Apply the same function with the same
    parameters to target and draft logits: verification compares like with like.
    """
    logits = _working(logits)
    if columns.all_greedy:
        return torch.zeros_like(logits).scatter_(1, logits.argmax(-1, keepdim=True), 1.0)
    greedy = (columns.temperature == 0)[:, None]  # [R, 1]
    scores = logits / torch.where(greedy, 1.0, columns.temperature[:, None]).to(logits.dtype)
    if columns.max_top_k:
        k = columns.top_k[:, None].clamp(max=scores.shape[-1])
        best = scores.topk(min(columns.max_top_k, scores.shape[-1])).values
        least = best.gather(1, (k - 1).clamp(min=0)).masked_fill(k == 0, -torch.inf)
        scores = scores.masked_fill(scores < least, -torch.inf)
    probs = scores.softmax(-1)
    if columns.uses_top_p:
        probs = probs.masked_fill(~_nucleus(scores, probs, columns.top_p), 0.0)
    if columns.uses_min_p:
        least = columns.min_p[:, None].to(probs.dtype) * probs.amax(-1, keepdim=True)
        probs = probs.masked_fill(probs < least, 0.0)
    if columns.uses_top_p or columns.uses_min_p:
        probs = probs / probs.sum(-1, keepdim=True, dtype=torch.double).to(probs.dtype)
    if columns.any_greedy:
        probs = probs.masked_fill(greedy, 0.0)
        probs = probs.scatter_add(1, logits.argmax(-1, keepdim=True), greedy.to(probs.dtype))
    return probs


def _nucleus(scores: Tensor, probs: Tensor, top_p: Tensor) -> Tensor:
    """Which tokens `[R, V]` are kept: the fewest, most likely first, whose probability reaches top_p.

    Sorting a whole vocabulary costs a CPU several milliseconds a row and a nucleus is nearly always small,
    so there the most likely tokens are tried first and only rows that they do not settle are sorted.
    """
    vocab = scores.shape[-1]
    asking = scores.device.type == "cpu"
    keep = _nucleus_among(scores, probs, top_p, min(vocab, _NUCLEUS_CANDIDATES) if asking else vocab)
    if asking and vocab > _NUCLEUS_CANDIDATES:
        rows = rows_worth_visiting((keep.sum(-1) >= _NUCLEUS_CANDIDATES) & (top_p < 1))
        keep[rows] = _nucleus_among(scores[rows], probs[rows], top_p[rows], vocab)
    return keep | (top_p >= 1)[:, None]


def _nucleus_among(scores: Tensor, probs: Tensor, top_p: Tensor, candidates: int) -> Tensor:
    """`_nucleus` if it has fewer than `candidates` tokens, else at least that many tokens."""
    ranked, tokens = scores.topk(candidates)  # [R, candidates], descending
    mass = probs.gather(1, tokens).double()
    size = ((mass.cumsum(-1) - mass) < top_p[:, None]).sum(-1, keepdim=True).clamp(min=1)
    floor = ranked.gather(1, size - 1)  # [R, 1], the score of the last token kept
    keep = scores >= floor
    surplus = keep.sum(-1, keepdim=True) - size  # tokens that tie with the last one but come too late
    rows = rows_worth_visiting(surplus[:, 0] > 0)
    if len(rows):
        tied = scores[rows] == floor[rows]
        keep[rows] &= ~tied | (tied.cumsum(-1) > surplus[rows])  # the lowest tokens go first
    return keep


def draw(probs: Tensor, u: Tensor) -> Tensor:
    """One token per row, by inverse cumulative distribution: `[R, V]` and `[R]` in [0, 1) to `[R]` int64.

    Rows need not sum to 1. A token of probability zero is never returned, however the sums round; if
    rounding leaves no token, the most likely one is.
    """
    mass = probs.cumsum(-1, dtype=torch.double)
    # A parallel scan may round a cumulative sum up at a token of probability 0, hence the second condition.
    reached = (mass > u[:, None] * mass[:, -1:]) & (probs > 0)
    token = reached.to(torch.uint8).argmax(-1)
    found = reached.gather(1, token[:, None])[:, 0]
    return torch.where(found, token, probs.argmax(-1))


def draw_distinct(probs: Tensor, u: Tensor) -> Tensor:
    """k tokens per row, drawn one after the other without replacement: `[R, V]` and `[R, k]` to `[R, k]`.

    A row with fewer than k possible tokens is filled up with -1.
    """
    tokens = []
    for draw_number in range(u.shape[1]):
        token = draw(probs, u[:, draw_number])[:, None]
        tokens.append(torch.where(probs.gather(1, token) > 0, token, -1))
        probs = probs.scatter(1, token, 0.0)
    return torch.cat(tokens, dim=1)


def token_logprobs(logits: Tensor, tokens: Tensor) -> Tensor:
    """Natural log of the softmax of the raw logits `[R, V]` at one token per row `[R]`; nats, `[R]`."""
    return _working(logits).log_softmax(-1).gather(1, tokens[:, None])[:, 0]
