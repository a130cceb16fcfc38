"""From the target's verdict on guesses to the tokens a sequence gains.

Chooses the verification of `verify` and `verify_tree` that fits each block, for all sequences of a decoder at
once. Greedy requests gain plain decoding's tokens, sampled ones tokens of the target's distribution.
"""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Sequence as List

import numpy as np
import torch

from decoding.engine.block import Block, Commit
from decoding.engine.output import Output
from decoding.engine.sampling import SamplingColumns, uniforms
from decoding.engine.verify import Verdict, verify_block, verify_greedy, verify_rejection
from decoding.engine.verify_tree import verify_traversal, verify_tree_greedy, verify_tree_topk

STREAM = 1  # of each request's random numbers; drafters use others

CHAIN_VERIFIERS: dict[str, Callable[[torch.Tensor, torch.Tensor, torch.Tensor | None, torch.Tensor], Verdict]] = {
    "block": verify_block,
    "token": verify_rejection,
}
"""Ways to verify a sampled chain; both keep the target's distribution."""


def confirm(output: Output, draft_probabilities: List[torch.Tensor | None] = (), chain: str = "block") -> list[Commit]:
    """Verify every block of `output`.

    draft_probabilities: per sequence, the distributions its guesses were sampled from: [guesses, vocab] for
    a chain, [1 + guesses, vocab] (row 0: the root's children) for a tree whose children were drawn without
    replacement; None, or nothing at all, if the guesses were not sampled. chain: a name of `CHAIN_VERIFIERS`.
    """
    given = draft_probabilities or [None] * len(output.blocks)
    commits: list[Commit | None] = [None] * len(output.blocks)
    kinds: dict[tuple[bool, bool, bool], list[int]] = {}
    for i, (sequence, block) in enumerate(zip(output.sequences, output.blocks, strict=True)):
        greedy = sequence.params.temperature == 0
        if greedy and not block:
            commits[i] = Commit((int(output.best(i)[0]),))
        else:
            kinds.setdefault((greedy, block.parents is not None, given[i] is not None and not greedy), []).append(i)
    for (greedy, tree, sampled), picks in kinds.items():
        blocks = [output.blocks[i] for i in picks]
        tokens = _padded([block.tokens for block in blocks])
        parents = _padded([block.parents or () for block in blocks]) if tree else tokens
        if greedy:
            best = torch.from_numpy(_stretch([output.best(i) for i in picks], tokens.shape[1] + 1))
            verdict = verify_tree_greedy(tokens, parents, best) if tree else verify_greedy(tokens, best)
        else:
            drafted = [given[i] for i in picks] if sampled else None
            verdict = _verify_sampled(output, picks, tokens, parents if tree else None, drafted, chain)
        for i, commit in zip(picks, _commits(blocks, verdict), strict=True):
            commits[i] = commit
    return [commit for commit in commits if commit is not None]


def _verify_sampled(
    output: Output,
    picks: list[int],
    tokens: torch.Tensor,
    parents: torch.Tensor | None,
    drafted: list[torch.Tensor | None] | None,
    chain: str,
) -> Verdict:
    device = output.logits.device
    tokens = tokens.to(device)
    target = output.probabilities(picks)
    sequences = [output.sequences[i] for i in picks]
    seeds = SamplingColumns.of([s.params for s in sequences], device).seed
    draws = torch.tensor([s.draws for s in sequences], device=device)
    u = uniforms(seeds, draws, STREAM, tokens.shape[1] + 1)
    q = None
    if drafted is not None:
        q = torch.zeros_like(target[:, : tokens.shape[1] + (parents is not None)])
        for row, chance in enumerate(drafted):
            assert chance is not None
            q[row, : len(chance)] = chance
    if parents is None:
        return CHAIN_VERIFIERS[chain](tokens, target, q, u)
    parents = parents.to(device)
    if q is None:
        return verify_tree_topk(tokens, parents, target, u)
    return verify_traversal(tokens, parents, target, q, u, replacement=False)


def _commits(blocks: list[Block], verdict: Verdict) -> list[Commit]:
    """One copy to the host for all sequences."""
    flat = torch.cat([verdict.accepted[:, None], verdict.bonus[:, None], verdict.path], dim=1).tolist()
    commits = []
    for block, (accepted, bonus, *path) in zip(blocks, flat, strict=True):
        kept = path[:accepted]
        tokens = (*(block.tokens[node] for node in kept), bonus)
        commits.append(Commit(tokens, None if block.parents is None else kept))
    return commits


def _padded(rows: List[List[int]]) -> torch.Tensor:
    """[rows, longest] on the host, padded with -1."""
    out = np.full((len(rows), max(map(len, rows))), -1, dtype=np.int64)
    for i, row in enumerate(rows):
        out[i, : len(row)] = row
    return torch.from_numpy(out)


def _stretch(rows: List[np.ndarray], width: int) -> np.ndarray:
    """[rows, width]; what lies behind the end of a row is never looked at."""
    out = np.zeros((len(rows), width), dtype=np.int64)
    for i, row in enumerate(rows):
        out[i, : len(row)] = row
    return out
