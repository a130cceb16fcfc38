"""What the target model said about a step's blocks, in the form decoders need it."""

from __future__ import annotations

from collections.abc import Sequence as List
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch

from decoding.engine.block import Block, Commit, layout
from decoding.engine.sampling import SamplingColumns, adjust, probabilities, token_logprobs

if TYPE_CHECKING:
    from decoding.engine.sequence import Sequence


@dataclass(frozen=True)
class Output:
    """Logits of a group of sequences, with their penalties and biases applied.

    sequences, blocks: whom it is about. offsets: [sequences] first row of each; a sequence's rows are
    the last committed token's (the block's root) and then every guess's, in the block's order.
    logits: [rows, vocab]. raw: the model's own, before penalties. greedy: [rows] most likely tokens,
    on the host. broken: sequences whose logits are not finite.
    """

    sequences: List[Sequence]
    blocks: List[Block]
    offsets: np.ndarray
    logits: torch.Tensor
    raw: torch.Tensor
    greedy: np.ndarray
    broken: List[Sequence] = ()

    @classmethod
    def judge(cls, sequences: List[Sequence], blocks: List[Block], raw: torch.Tensor) -> Output:
        """Apply each sequence's logit processors to `raw` [rows, vocab] and find the best tokens.

        The one copy from device to host of a greedy step happens here.
        """
        counts = np.array([1 + len(block) for block in blocks])
        offsets = np.cumsum(counts) - counts
        logits = _processed(sequences, blocks, counts, raw)
        best, tokens = logits.max(dim=-1)
        if logits.device.type == "cpu":
            greedy, bad = tokens.numpy(), ~np.isfinite(best.float().numpy())
        else:
            greedy, finite = torch.stack([tokens, torch.isfinite(best)]).cpu().numpy()
            bad = finite == 0
        broken = [s for i, s in enumerate(sequences) if bad[offsets[i] : offsets[i] + counts[i]].any()]
        return cls(sequences, blocks, offsets, logits, raw, greedy, broken)

    def of(self, sequences: List[Sequence]) -> Output:
        """The part about some of the sequences."""
        index = {id(s): i for i, s in enumerate(self.sequences)}
        picks = [index[id(s)] for s in sequences]
        return Output(
            sequences, [self.blocks[i] for i in picks], self.offsets[picks], self.logits, self.raw, self.greedy
        )

    def best(self, i: int) -> np.ndarray:
        """[1 + guesses] the most likely next token at the root of sequence i's block and at each guess."""
        start = self.offsets[i]
        return self.greedy[start : start + 1 + len(self.blocks[i])]

    def padded_rows(self, picks: List[int]) -> torch.Tensor:
        """[picks, 1 + longest block] row index of the root and every guess; padded with the root's."""
        width = 1 + max(len(self.blocks[i]) for i in picks)
        rows = np.repeat(self.offsets[list(picks), None], width, axis=1)
        for place, i in enumerate(picks):
            rows[place, : 1 + len(self.blocks[i])] += np.arange(1 + len(self.blocks[i]))
        return torch.from_numpy(rows).to(self.logits.device)

    def probabilities(self, picks: List[int]) -> torch.Tensor:
        """[picks, 1 + longest block, vocab] the target's distribution after temperature and filters."""
        rows = self.padded_rows(picks)
        columns = SamplingColumns.of([self.sequences[i].params for i in picks], self.logits.device)
        columns = columns.rows(torch.arange(len(picks), device=rows.device).repeat_interleave(rows.shape[1]))
        return probabilities(self.logits[rows.flatten()], columns).view(*rows.shape, -1)

    def logprobs(self, sequence: Sequence, commit: Commit, count: int) -> list[float]:
        """Natural-log probabilities, under the model itself, of a commit's first `count` tokens."""
        i = next(i for i, s in enumerate(self.sequences) if s is sequence)
        path = range(len(commit.tokens) - 1) if commit.path is None else commit.path
        rows = self.offsets[i] + np.array([0, *(1 + node for node in path)])[:count]
        index = torch.from_numpy(rows).to(self.raw.device)
        tokens = torch.tensor(list(commit.tokens[:count]), device=self.raw.device)
        values: list[float] = token_logprobs(self.raw[index], tokens).tolist()
        return values


def _processed(sequences: List[Sequence], blocks: List[Block], counts: np.ndarray, raw: torch.Tensor) -> torch.Tensor:
    """`raw` with every sequence's bias, repetition penalty and minimum length applied, each row as if the
    guesses above it had been committed. The same tensor if nobody asks for any."""
    params = [s.params for s in sequences]
    if not any(p.logit_bias or p.repetition_penalty != 1 or p.min_new_tokens for p in params):
        return raw
    device = raw.device
    owner = np.repeat(np.arange(len(sequences)), counts)
    columns = SamplingColumns.of(params, device).rows(torch.from_numpy(owner).to(device))
    generated = []
    seen_rows: list[np.ndarray] = []
    seen_tokens: list[np.ndarray] = []
    first = 0
    for sequence, block in zip(sequences, blocks, strict=True):
        above = layout(len(block), 1, None if block.parents is None else tuple(block.parents), block.bidirectional)
        generated.append(len(sequence.tokens) - len(sequence.prompt) + above.depth)
        if sequence.params.repetition_penalty != 1:
            known = np.unique(sequence.tokens)
            rows = np.arange(first, first + 1 + len(block))
            seen_rows.append(np.repeat(rows, len(known)))
            seen_tokens.append(np.tile(known, len(rows)))
            visible = np.tri(len(rows), dtype=bool) if above.visible is None else above.visible
            row, guess = np.nonzero(visible[:, 1:])
            seen_rows.append(rows[row])
            seen_tokens.append(np.asarray(block.tokens, dtype=np.int64)[guess])
        first += 1 + len(block)
    seen = None
    if columns.needs_history:
        seen = torch.from_numpy(np.stack([np.concatenate(seen_rows), np.concatenate(seen_tokens)])).to(device)
    banned = ends_too_early(sequences, counts, np.concatenate(generated))
    return adjust(raw, columns, seen=seen, banned=torch.from_numpy(banned).to(device))


def ends_too_early(sequences: List[Sequence], counts: np.ndarray, generated: np.ndarray) -> np.ndarray:
    """[2, N] pairs of a row and a token that would end its sequence before it has `min_new_tokens`.

    counts: [sequences] rows of each. generated: [rows] new tokens that precede the one to be chosen.
    """
    pairs = [np.empty((2, 0), dtype=np.int64)]
    for sequence, stop, count in zip(sequences, np.cumsum(counts), counts, strict=True):
        rows = np.arange(stop - count, stop)
        rows = rows[generated[rows] < sequence.params.min_new_tokens]
        ends = np.array(sorted(sequence.eos), dtype=np.int64)
        pairs.append(np.stack([np.repeat(rows, len(ends)), np.tile(ends, len(rows))]))
    return np.concatenate(pairs, axis=1)
