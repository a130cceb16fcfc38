"""Which drafted tokens to keep: verification of chains, batched over sequences.

A draft is `[S, G]` token ids, rows padded at the end with -1 to the longest (an all-padding row is a
sequence that drafted nothing). `target_probs` `[S, G + 1, V]` holds the target's distribution behind the
committed text (position 0) and behind each draft token; `draft_probs` `[S, G, V]` the distribution that
each draft token was drawn from, or None if the drafter is deterministic. Both have been through the same
temperature and filters. What lies at or behind padding is never looked at.

`u` `[S, G + 1]` are independent uniforms: column 0 draws the final token, column 1 + i tests draft token i.
So a sequence's verdict does not depend on how wide its batch is padded.

`verify_greedy` keeps what plain greedy decoding would have produced; `verify_rejection` and `verify_block`
keep the target's distribution exactly. Nothing here waits for an accelerator, see `rows_worth_visiting`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from decoding.engine.sampling import draw, rows_worth_visiting


@dataclass(frozen=True)
class Verdict:
    """What verification decided, per sequence; int64 tensors.

    accepted: [S] number of draft tokens kept. path: [S, G] their indices in the draft, in order, padded
    with -1. bonus: [S] the token to commit behind them: a step gains accepted + 1 tokens.
    """

    accepted: Tensor
    path: Tensor
    bonus: Tensor


def verify_greedy(draft: Tensor, target_argmax: Tensor) -> Verdict:
    """Keep draft tokens `[S, G]` as long as they are the target's choices `[S, G + 1]`."""
    accepted = (draft == target_argmax[:, :-1]).cumprod(1).sum(1)
    return _prefix(accepted, draft.shape[1], target_argmax.gather(1, accepted[:, None])[:, 0])


def verify_rejection(draft: Tensor, target_probs: Tensor, draft_probs: Tensor | None, u: Tensor) -> Verdict:
    """Token-level speculative sampling (Leviathan et al. 2023, Chen et al. 2023).

    A token x is kept with probability min(1, p(x) / q(x)); the first that is not is replaced by a draw
    from max(p - q, 0), normalized.
    """
    p, q = _drafted(draft, target_probs, draft_probs)
    accepted = (u[:, 1:] * q < p).cumprod(1).sum(1)
    kept = torch.ones_like(u[:, 0], dtype=torch.double)
    return _prefix(accepted, draft.shape[1], _final(draft, target_probs, draft_probs, accepted, kept, u[:, 0]))


def verify_block(draft: Tensor, target_probs: Tensor, draft_probs: Tensor | None, u: Tensor) -> Verdict:
    """Block verification (Sun et al. 2024): as lossless as `verify_rejection`, never shorter on average.

    Whether to stop behind i tokens depends on the whole block: `kept[i]` is the probability with which the
    first i tokens may be kept, and the longest prefix that passes its own test wins, whether or not
    shorter ones pass theirs.
    """
    width = draft.shape[1]
    length = (draft >= 0).sum(1)
    p, q = _drafted(draft, target_probs, draft_probs)
    kept = [torch.ones_like(u[:, 0], dtype=torch.double)]  # per position [S]
    for i in range(width):
        ratio = torch.where(q[:, i] > 0, p[:, i] / q[:, i], (p[:, i] > 0).double())
        kept.append((kept[i] * ratio).clamp(max=1))
    accepted = torch.zeros_like(length)
    is_open = torch.ones_like(length, dtype=torch.bool)
    for i in range(width, 0, -1):
        threshold = torch.where(length == i, kept[i], 0.0)
        if i < width:
            shorter = is_open & (i < length)
            rows = rows_worth_visiting(shorter)
            if draft_probs is None:  # a one-hot q: the overlap with p is p(x) alone
                excess = kept[i][rows] * (1 - p[rows, i])
            else:
                excess = _excess(kept[i][rows], target_probs[rows, i], draft_probs[rows, i]).sum(-1)
            stop = excess + 1 - kept[i][rows]
            test = torch.where(stop > 0, excess / stop, 1.0)  # 0 / 0: p equals q, and more is sure to be kept
            threshold[rows] = torch.where(shorter[rows], test, threshold[rows])
        passed = is_open & (u[:, i] < threshold)
        accepted = torch.where(passed, i, accepted)
        is_open = is_open & ~passed
    reached = torch.stack(kept, dim=1).gather(1, accepted[:, None])[:, 0]
    return _prefix(accepted, width, _final(draft, target_probs, draft_probs, accepted, reached, u[:, 0]))


def _prefix(accepted: Tensor, width: int, bonus: Tensor) -> Verdict:
    index = torch.arange(width, device=accepted.device).expand(len(accepted), width)
    return Verdict(accepted, torch.where(index < accepted[:, None], index, -1), bonus)


def _drafted(draft: Tensor, target_probs: Tensor, draft_probs: Tensor | None) -> tuple[Tensor, Tensor]:
    """p and q of each draft token, float64 `[S, G]`; p is 0 and q is 1 at padding, so it is never kept."""
    token = draft.clamp(min=0)[..., None]
    padding = draft < 0
    p = target_probs[:, :-1].gather(2, token)[..., 0].double().masked_fill(padding, 0.0)
    if draft_probs is None:
        return p, torch.ones_like(p)
    return p, draft_probs.gather(2, token)[..., 0].double().masked_fill(padding, 1.0)


def _excess(kept: Tensor, target: Tensor, drafted: Tensor) -> Tensor:
    """max(kept · p - q, 0), float64: `[R]`, `[R, V]`, `[R, V]` to `[R, V]`; what the draft has not covered."""
    return (kept[:, None] * target - drafted).clamp_(min=0)


def _final(
    draft: Tensor, target_probs: Tensor, draft_probs: Tensor | None, accepted: Tensor, kept: Tensor, u: Tensor
) -> Tensor:
    """Draw the token behind the last accepted one: the bonus, or the replacement of a rejected token.

    kept `[S]`: the probability with which the accepted prefix was kept (1 for token-level verification).
    """
    width = draft.shape[1]
    row = torch.arange(len(draft), device=draft.device)
    target = target_probs[row, accepted].double()  # [S, V]
    if width == 0:
        return draw(target, u)
    stop = accepted.clamp(max=width - 1)
    rejected = draft[row, stop]
    stopped = (accepted < width) & (rejected >= 0)
    if draft_probs is None:
        rest = target.scatter(1, rejected.clamp(min=0)[:, None], 0.0)
    else:
        rest = _excess(kept, target, draft_probs[row, stop].double())
    # Where p equals q nothing is left over: a rejection was a rounding error, and p itself is right.
    stopped = stopped & (rest.sum(-1) > 0)
    return draw(torch.where(stopped[:, None], rest, target), u)
