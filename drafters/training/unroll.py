"""Training-time test: the head is unrolled over several draft steps, each fed with its own output of the one before.

Li et al. 2025, "EAGLE-3". At step i position t has seen the target's features up to t, and the text's tokens up to
t + 1 + i; it foresees the token after those. Its attention reads the keys of step 0 up to t, which come from true
features, and its own of steps 1 to i: exactly what the head sees when it drafts.
"""

from __future__ import annotations

from collections.abc import Sequence as List
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from drafters.heads.eagle import Eagle3Head, Rotation
from drafters.training.batches import Batch


@dataclass(frozen=True)
class Outcome:
    """What a batch gave. loss: scalar. hits: [steps, B, R] whether the head's first choice was the target's."""

    loss: Tensor
    hits: Tensor


class Unrolled(nn.Module):
    """The head with its loss: Σ decay^i · cross entropy with the target's distribution over the draft vocabulary.

    Positions where the target's choice lies outside the draft vocabulary teach nothing.

    embeddings: [vocab, hidden] the target's. output: [vocab, target hidden] the target's language-model head.
    positions: longest document, in tokens.
    """

    embeddings: Tensor
    output: Tensor

    def __init__(
        self, head: Eagle3Head, embeddings: Tensor, output: Tensor, *, steps: int, decay: float, positions: int
    ) -> None:
        super().__init__()
        self.head = head
        self.steps, self.decay, self._positions = steps, decay, positions
        self.register_buffer("embeddings", embeddings.detach(), persistent=False)
        self.register_buffer("output", output.detach()[head.tokens.to(output.device)], persistent=False)
        self._rotation: Rotation | None = None

    def forward(self, batch: Batch, steps: int | None = None) -> Outcome:
        """Unroll over a batch, by `steps` steps instead of as many as usual (for validation)."""
        head, layer = self.head, self.head.layer
        steps = steps or self.steps
        valid = batch.valid  # [B, R]
        device, width = valid.device, valid.shape[1]
        rotate = self._rotate(device, steps)
        place = torch.full(valid.shape, -1, device=device)  # [B, R] row of `final` and `greedy`
        place[valid] = torch.arange(int(valid.sum()), device=device)
        with torch.no_grad():
            wanted = F.linear(batch.final, self.output).softmax(-1)  # [M, draft vocab]
            known = head.t2d[batch.greedy]  # [M]

        keys_at = torch.arange(batch.features.shape[1], device=device)  # [T]
        asked_at = (batch.starts[:, None] + torch.arange(width, device=device)).clamp(max=len(keys_at) - 1)  # [B, R]
        rows = torch.arange(len(valid), device=device)[:, None]
        fused = head.fuse(batch.features)
        joined, residual = layer.enter(self._embed(batch.tokens[:, 1:]), fused)
        key, value = layer.self_attn.key_value(joined)  # [B, T, kv heads, dim]
        past = _Past(rotate(key, keys_at.expand(len(valid), -1)), value, keys_at <= asked_at[:, :, None])
        joined, residual, hidden = joined[rows, asked_at], residual[rows, asked_at], fused

        loss = fused.new_zeros(())
        hits = torch.zeros(steps, *valid.shape, dtype=torch.bool, device=device)
        for step in range(steps):
            if step:
                text_at = (asked_at + 1 + step).clamp(max=batch.tokens.shape[1] - 1)
                joined, residual = layer.enter(self._embed(batch.tokens[rows, text_at]), hidden)
                key, value = layer.self_attn.key_value(joined)
                past.append(rotate(key, asked_at + step), value)
            query = rotate(layer.self_attn.query(joined), asked_at + step)
            out = layer.leave(residual, past.attend(query))
            hidden = head.feedback(out)

            target = F.pad(place[:, step:], (0, step), value=-1)  # [B, R] what step foresees at each position
            exists = target >= 0
            logits = head.predict(out[exists])  # [m, draft vocab]
            rows_wanted = target[exists]
            hits[step, exists] = head.tokens[logits.argmax(-1)] == batch.greedy[rows_wanted]
            teaches = known[rows_wanted]
            entropy = logits.logsumexp(-1) - (wanted[rows_wanted] * logits).sum(-1)
            loss = loss + self.decay**step * (entropy * teaches).sum() / teaches.sum().clamp(min=1)
        return Outcome(loss, hits)

    def _embed(self, tokens: Tensor) -> Tensor:
        own = self.head.embed_tokens
        return F.embedding(tokens, self.embeddings) if own is None else own(tokens)

    def _rotate(self, device: torch.device, steps: int) -> Rotation:
        if self._rotation is None:
            self._rotation = Rotation(self.head.config, self._positions + max(steps, 32), device)
        return self._rotation


class _Past:
    """Keys and values of step 0, of which every position sees those up to itself, and of the later steps, of
    which it sees its own."""

    def __init__(self, key: Tensor, value: Tensor, visible: Tensor) -> None:
        self._key, self._value = key, value  # [B, T, kv heads, dim]
        self._hidden = ~visible[:, None, None]  # [B, 1, 1, R, T]
        self._own: list[tuple[Tensor, Tensor]] = []  # [B, R, kv heads, dim] each

    def append(self, key: Tensor, value: Tensor) -> None:
        self._own.append((key, value))

    def attend(self, query: Tensor) -> Tensor:
        """[B, R, heads, dim] to the same."""
        kv_heads, dim = self._key.shape[2:]
        query = query.unflatten(2, (kv_heads, -1)) * dim**-0.5  # [B, R, kv heads, group, dim]
        scores = torch.einsum("brkgd,btkd->bkgrt", query, self._key).masked_fill(self._hidden, -torch.inf)
        own = [torch.einsum("brkgd,brkd->bkgr", query, key)[..., None] for key, _ in self._own]
        weights = torch.cat([scores, *own], dim=-1).softmax(-1)
        width = self._key.shape[1]
        out = torch.einsum("bkgrt,btkd->brkgd", weights[..., :width], self._value)
        for i, (_, value) in enumerate(self._own):
            out = out + torch.einsum("bkgr,brkd->brkgd", weights[..., width + i], value)
        return out.flatten(2, 3)


def acceptance_lengths(hits: Tensor, counts: List[int]) -> list[int]:
    """Tokens per verification if the text were decoded greedily with these drafts: [steps, B, R] to one per pass.

    Walks through every document: all leading hits at a position are accepted, and the target adds one token.
    """
    leading = hits.long().cumprod(0).sum(0).tolist()  # [B][R]
    lengths = []
    for row, count in zip(leading, counts, strict=True):
        at = 0
        while at < count:
            lengths.append(row[at] + 1)
            at += lengths[-1]
    return lengths
