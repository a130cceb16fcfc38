"""From the target's verdict on guesses to the tokens a sequence gains.

Chooses the verification that fits each block, for all sequences of a decoder at once. Greedy requests gain plain
decoding's tokens, sampled ones tokens of the target's distribution.

Guesses that were not sampled (n-grams, a drafter's most likely tokens) need no rejection sampling: the target
draws its own token at the root, and goes on where a guess equals it. A guess x is kept with the same probability
p(x), and since the random number belongs to the place in the answer, a seed gives the very tokens that plain
decoding gives, whatever was guessed and however much of it was withheld.
"""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Sequence as List

import numpy as np
import torch

from decoding.engine.block import Block, Commit, layout
from decoding.engine.output import Output
from decoding.engine.sampling import SamplingColumns, draw, probabilities, uniforms
from decoding.engine.verify import Verdict, verify_block, verify_greedy, verify_rejection
from decoding.engine.verify_tree import (
    typical_acceptance,
    verify_traversal,
    verify_tree_greedy,
    verify_tree_sampled,
    verify_tree_topk,
)
from decoding.errors import ModelError

# Streams of each request's random numbers. Both are keyed by the place in the answer of a step's first token, and
# no step begins where another did; drafters key others by `sequence.draws`.
PLACE_STREAM = 1  # draws the token at a place, in plain decoding too
VERIFY_STREAM = 3  # tests guesses, and draws what replaces them

VERIFICATIONS: dict[str, str] = {
    "block": "block verification of sampled chains, traversal verification of sampled trees",
    "token": "token-level rejection sampling, top down in trees",
    "traversal": "traversal verification of chains and trees, which on a chain is block verification",
    "typical": "typical acceptance: LOSSY at a temperature above 0",
}
"""Ways to verify the guesses of sampled requests, and what they do. Greedy requests are always exact."""

LOSSY = frozenset({"typical"})
"""The names of `VERIFICATIONS` that change the output's distribution."""


def confirm(
    output: Output, draft_probabilities: List[torch.Tensor | None] = (), verification: str = "block"
) -> list[Commit]:
    """Verify every block of `output`.

    draft_probabilities: per sequence, the distributions its guesses were sampled from: [guesses, vocab] for
    a chain, [1 + guesses, vocab] (row 0: the root's children) for a tree whose children were drawn without
    replacement; None, or nothing at all, if the guesses were not sampled. verification: a name of `VERIFICATIONS`.
    """
    given = draft_probabilities or [None] * len(output.blocks)
    commits: list[Commit | None] = [None] * len(output.blocks)
    kinds: dict[tuple[bool, bool, bool], list[int]] = {}
    followed = []
    for i, (sequence, block) in enumerate(zip(output.sequences, output.blocks, strict=True)):
        greedy = sequence.params.temperature == 0
        sampled = given[i] is not None and not greedy
        if greedy and not block:
            commits[i] = Commit((int(output.best(i)[0]),))
        elif not greedy and (not block or (not sampled and verification in ("block", "traversal"))):
            followed.append(i)
        else:
            kinds.setdefault((greedy, block.parents is not None, sampled), []).append(i)
    for i, commit in zip(followed, _follow(output, followed), strict=True):
        commits[i] = commit
    for (greedy, tree, sampled), picks in kinds.items():
        blocks = [output.blocks[i] for i in picks]
        tokens = _padded([block.tokens for block in blocks])
        parents = _padded([block.parents or () for block in blocks]) if tree else tokens
        if greedy:
            best = torch.from_numpy(_stretch([output.best(i) for i in picks], tokens.shape[1] + 1))
            verdict = verify_tree_greedy(tokens, parents, best) if tree else verify_greedy(tokens, best)
        else:
            drafted = [given[i] for i in picks] if sampled else None
            verdict = _verify_sampled(output, picks, tokens, parents if tree else None, drafted, verification)
        for i, commit in zip(picks, _commits(blocks, verdict), strict=True):
            commits[i] = commit
    return [commit for commit in commits if commit is not None]


def _follow(output: Output, picks: list[int]) -> list[Commit]:
    """The target's own draws, for as long as guesses equal them."""
    if not picks:
        return []
    device = output.logits.device
    columns = SamplingColumns.of([output.sequences[i].params for i in picks], device)
    places = np.array([len(output.sequences[i].tokens) - len(output.sequences[i].prompt) for i in picks])
    children = [_children(output.blocks[i]) for i in picks]
    paths: list[list[int]] = [[] for _ in picks]
    tokens: list[list[int]] = [[] for _ in picks]
    if _walks(device):
        walking = np.arange(len(picks))
        while len(walking):
            at = np.array([output.offsets[picks[k]] + (1 + paths[k][-1] if paths[k] else 0) for k in walking])
            drawn = _draw_at(output, columns, at, walking, places[walking] + [len(paths[k]) for k in walking])
            walking = np.array(
                [
                    k
                    for k, token in zip(walking, drawn, strict=True)
                    if _advance(token, children[k], paths[k], tokens[k])
                ],
                dtype=np.int64,
            )
    else:
        counts = np.array([1 + len(output.blocks[i]) for i in picks])
        owner = np.repeat(np.arange(len(picks)), counts)
        at = np.concatenate([output.offsets[i] + np.arange(n) for i, n in zip(picks, counts, strict=True)])
        depth = np.concatenate([_depth(output.blocks[i]) for i in picks])
        drawn = _draw_at(output, columns, at, owner, places[owner] + depth)
        for k, first in enumerate((np.cumsum(counts) - counts).tolist()):
            node = -1
            while _advance(drawn[first + 1 + node], children[k], paths[k], tokens[k]):
                node = paths[k][-1]
    return [
        Commit(new, None if output.blocks[i].parents is None else path)
        for i, new, path in zip(picks, tokens, paths, strict=True)
    ]


def _walks(device: torch.device) -> bool:
    """Whether to look at each draw before the next is made.

    Where looking is free, work across the vocabulary is then done for the tokens gained alone. Elsewhere the draws
    behind all guesses are made at once, for one copy to the host.
    """
    return device.type == "cpu"


def _draw_at(
    output: Output, columns: SamplingColumns, rows: np.ndarray, owners: np.ndarray, places: np.ndarray
) -> list[int]:
    """The target's draw at each row of the logits, for the answer's place it stands at; owners: rows of `columns`."""
    device = output.logits.device
    index, owner, place = (torch.from_numpy(np.asarray(a, dtype=np.int64)).to(device) for a in (rows, owners, places))
    columns = columns.rows(owner)
    u = uniforms(columns.seed, place, PLACE_STREAM, 1)[:, 0]
    drawn: list[int] = draw(probabilities(output.logits[index], columns), u).tolist()
    return drawn


def _advance(token: int, children: dict[int, dict[int, int]], path: list[int], tokens: list[int]) -> bool:
    """Take in a drawn token; whether a guess equals it, and the walk goes on there."""
    tokens.append(token)
    guess = children.get(path[-1] if path else -1, {}).get(token)
    if guess is not None:
        path.append(guess)
    return guess is not None


def _children(block: Block) -> dict[int, dict[int, int]]:
    """Of every node that has any, the root being -1: the first child of each token."""
    children: dict[int, dict[int, int]] = {}
    for node, token in enumerate(block.tokens):
        parent = node - 1 if block.parents is None else block.parents[node]
        children.setdefault(parent, {}).setdefault(token, node)
    return children


def _depth(block: Block) -> np.ndarray:
    return layout(len(block), 1, None if block.parents is None else tuple(block.parents), False).depth


def _verify_sampled(
    output: Output,
    picks: list[int],
    tokens: torch.Tensor,
    parents: torch.Tensor | None,
    drafted: list[torch.Tensor | None] | None,
    verification: str,
) -> Verdict:
    device = output.logits.device
    tokens = tokens.to(device)
    target = output.probabilities(picks)
    sequences = [output.sequences[i] for i in picks]
    seeds = SamplingColumns.of([s.params for s in sequences], device).seed
    places = torch.tensor([len(s.tokens) - len(s.prompt) for s in sequences], device=device)
    u = uniforms(seeds, places, VERIFY_STREAM, tokens.shape[1] + 1)
    chain = parents is None
    parents = _chain(tokens) if parents is None else parents.to(device)
    if verification == "typical":
        return typical_acceptance(tokens, parents, target, u)
    if drafted is None:
        return verify_rejection(tokens, target, None, u) if chain else verify_tree_topk(tokens, parents, target, u)
    q = torch.zeros_like(target)
    for row, (i, chance) in enumerate(zip(picks, drafted, strict=True)):
        assert chance is not None
        block = output.blocks[i]
        shape = (len(block) + (block.parents is not None), q.shape[-1])
        if tuple(chance.shape) != shape:
            raise ValueError(
                f"the drafter gave probabilities of shape {tuple(chance.shape)} for a "
                f"{'chain' if block.parents is None else 'tree'} of {len(block)} guesses; give {shape}."
            )
        q[row, : len(chance)] = chance
    if not q.sum(-1).gather(1, parents + 1).isfinite().all():  # of the rows that guesses were drawn from
        raise ModelError(
            "the drafter gave probabilities that are NaN or infinite; it has to end its draft before such guesses."
        )
    if chain and verification != "traversal":
        verify = verify_block if verification == "block" else verify_rejection
        return verify(tokens, target, q[:, :-1], u)
    tree: Callable[..., Verdict] = verify_tree_sampled if verification == "token" else verify_traversal
    return tree(tokens, parents, target, q, u, replacement=False)


def _chain(tokens: torch.Tensor) -> torch.Tensor:
    """The parents of chains [rows, guesses], as trees have them."""
    above = torch.arange(-1, tokens.shape[1] - 1, device=tokens.device)
    return torch.where(tokens >= 0, above, -1)


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
