"""Masked refinement written down plainly, for tests to compare with: one sequence, no cache, no batch, no engine."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from transformers import PreTrainedModel

from decoding.masked import Masking


@torch.inference_mode()
def logits_of(model: PreTrainedModel, tokens: Sequence[int], span: int) -> torch.Tensor:
    """[tokens, vocab] with the attention of `span`, through the model's own forward pass and an explicit mask."""
    place = torch.arange(len(tokens))
    stretch = place // span if span else torch.zeros_like(place)
    visible = (stretch[:, None] >= stretch)[None, None]
    mask = torch.zeros(visible.shape).masked_fill(~visible, torch.finfo(torch.float32).min)
    return model(torch.tensor([list(tokens)]), attention_mask=mask).logits[0]


def refine(
    model: PreTrainedModel,
    masking: Masking,
    prompt: Sequence[int],
    new_tokens: int,
    *,
    block_size: int,
    threshold: float | None = None,
    count: int = 1,
    eos: Sequence[int] = (),
) -> tuple[list[int], int]:
    """New tokens and passes of greedy block diffusion: all places of confidence ≥ `threshold`, or the best `count`.

    Blocks are completed before the answer is cut at its end or at `new_tokens`.
    """
    tokens, passes, limit = list(prompt), 0, len(prompt) + new_tokens
    while True:
        start = len(tokens)
        if masking.span:
            stop = (start // block_size + 1) * block_size
            end = (start // masking.span + 1) * masking.span
        else:
            stop = min(len(prompt) + ((start - len(prompt)) // block_size + 1) * block_size, limit)
            end = limit
        canvas = tokens + [masking.mask] * (end - start)
        while masking.mask in canvas[start : min(stop, limit)]:
            logits = logits_of(model, canvas, masking.span).double()
            passes += 1
            logits[:, masking.mask] = -torch.inf
            rows = logits[start - 1 : stop - 1] if masking.shift else logits[start:stop]
            best, choice = rows.softmax(-1).max(-1)
            open_places = [i for i in range(stop - start) if canvas[start + i] == masking.mask]
            ranked = sorted(open_places, key=lambda i: (-best[i].item(), i))
            chosen = ranked[:count]
            if threshold is not None:
                chosen = [i for i in ranked if best[i] >= threshold] or ranked[:1]
            for i in chosen:
                canvas[start + i] = int(choice[i])
            known = canvas[start:stop]
            known = known[: known.index(masking.mask)] if masking.mask in known else known
            if any(token in eos for token in known):
                stop = start + 1 + next(i for i, token in enumerate(known) if token in eos)
        tokens = canvas[: min(stop, limit)]
        if len(tokens) >= limit or tokens[-1] in eos:
            return tokens[len(prompt) :], passes
