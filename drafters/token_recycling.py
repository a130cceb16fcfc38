"""Token recycling: the most likely tokens of every verification are kept, and chained into the next guesses.

Luo et al. 2024, "Turning Trash into Treasure: Accelerating Inference of Large Language Models with Token
Recycling".
"""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Sequence as List
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar

import numpy as np
import torch

from decoding.drafting import Draft, Drafter
from decoding.engine.block import Block
from decoding.errors import InvalidRequest

if TYPE_CHECKING:
    from decoding.engine.block import Commit
    from decoding.engine.output import Output
    from decoding.engine.sequence import Sequence


@dataclass(eq=False)
class TokenRecycling(Drafter):
    """Remembers, for every token, the `width` most likely next tokens when the model last saw it, and unfolds
    these from the last token into a tree of a fixed shape.

    The table persists as long as the drafter: requests teach each other. Greedy answers do not depend on
    that; a sampled answer keeps its distribution, but which one a seed gives depends on what came before.

    nodes: guesses per step and sequence, at most. width: children per node, at most.
    """

    nodes: int = 48
    width: int = 8

    name: ClassVar[str] = "token-recycling"
    summary: ClassVar[str] = "trees of what the model found likely after each token, the last time it came"

    _tree: _Template = field(init=False, repr=False)
    # [vocab + 1, width]; -1 where nothing is known. The last row is what follows an unknown token: nothing.
    _table: np.ndarray = field(init=False, repr=False)

    def __post_init__(self) -> None:
        for option, value in (("nodes", self.nodes), ("width", self.width)):
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise InvalidRequest(f"token-recycling needs {option} to be an integer of at least 1, not {value!r}.")
        self._tree = _Template.best(self.nodes, self.width)
        self._table = np.full((1, self.width), -1, dtype=np.int32)

    def propose(self, sequences: List[Sequence], lengths: List[int]) -> list[Draft]:
        last = np.array([sequence.tokens[-1] for sequence in sequences], dtype=np.int64)
        tree = self._tree
        tokens = np.full((len(sequences), 1 + len(tree.parents)), -1, dtype=np.int64)
        tokens[:, 0] = np.where(last < len(self._table) - 1, last, -1)
        for level in tree.levels:  # every level of all sequences at once
            above = tokens[:, 1 + tree.parents[level]]
            tokens[:, 1 + level.start : 1 + level.stop] = self._table[above, tree.ranks[level]]
        return [self._draft(row[1:], length) for row, length in zip(tokens, lengths, strict=True)]

    def _draft(self, tokens: np.ndarray, length: int) -> Draft:
        """The nodes of at most `length` levels that the table had a token for."""
        count = self._tree.levels[min(length, len(self._tree.levels)) - 1].stop if length > 0 else 0
        known = np.flatnonzero(tokens[:count] >= 0)
        if not len(known):
            return Draft()
        place = np.full(count + 1, -1)  # of each node in the block; the root's, at index -1, stays -1
        place[known] = np.arange(len(known))
        return Draft(Block(tokens[known].tolist(), place[self._tree.parents[known]].tolist()))

    def observe(self, sequences: List[Sequence], output: Output, commits: List[Commit]) -> None:
        """Keep the most likely tokens at the root and behind every guess, whether it was accepted or not."""
        rows: list[np.ndarray] = []
        tokens: list[int] = []
        kept: list[int] = []
        for sequence, block, first, commit in zip(sequences, output.blocks, output.offsets, commits, strict=True):
            path = range(len(commit.tokens) - 1) if commit.path is None else commit.path
            kept += [len(tokens), *(len(tokens) + 1 + node for node in path)]
            rows.append(first + np.arange(1 + len(block)))
            tokens += [sequence.tokens[-1], *block.tokens]
        best = self._most_likely(output.logits, np.concatenate(rows))
        at = np.array(tokens)
        self._table[at] = best
        self._table[at[kept]] = best[kept]  # where a token was guessed twice, the confirmed context counts

    def unlearn(self) -> None:
        self._table[:] = -1

    def _most_likely(self, logits: torch.Tensor, rows: np.ndarray) -> np.ndarray:
        """[rows, width] token ids; -1 behind the end of a vocabulary that is smaller."""
        vocab = logits.shape[1]
        if len(self._table) != vocab + 1:
            self._table = np.full((vocab + 1, self.width), -1, dtype=np.int32)
        if len(rows) < len(logits):
            logits = logits[torch.from_numpy(rows).to(logits.device)]
        best = np.full((len(rows), self.width), -1, dtype=np.int32)
        best[:, :vocab] = logits.topk(min(self.width, vocab), dim=-1).indices.cpu().numpy()
        return best


@dataclass(frozen=True)
class _Template:
    """The shape of a tree, level by level, so that its first levels are a tree too.

    parents: [nodes] index of each node's parent, -1 for the root. ranks: [nodes] its place among the
    parent's most likely tokens. levels: the nodes of each depth.
    """

    parents: np.ndarray
    ranks: np.ndarray
    levels: tuple[slice, ...]

    @classmethod
    def best(cls, nodes: int, width: int) -> _Template:
        """The tree that is accepted furthest if a token of rank r (from 0) is right with `_chance(r)`."""
        chosen: list[tuple[int, ...]] = []  # paths of ranks
        heap: list[tuple[float, tuple[int, ...]]] = [(-_chance(0), (0,))]
        while len(chosen) < nodes:
            weight, path = heapq.heappop(heap)
            chosen.append(path)
            heapq.heappush(heap, (weight * _chance(0), (*path, 0)))
            if path[-1] + 1 < width:
                sibling = weight / _chance(path[-1]) * _chance(path[-1] + 1)
                heapq.heappush(heap, (sibling, (*path[:-1], path[-1] + 1)))
        chosen.sort(key=lambda path: (len(path), path))
        index = {path: node for node, path in enumerate(chosen)}
        depths = np.array([len(path) for path in chosen])
        ends = np.searchsorted(depths, np.arange(depths[-1] + 1), side="right").tolist()
        return cls(
            parents=np.array([index.get(path[:-1], -1) for path in chosen]),
            ranks=np.array([path[-1] for path in chosen]),
            levels=tuple(slice(start, stop) for start, stop in itertools.pairwise(ends)),
        )


def _chance(rank: int) -> float:
    """A guess at how often the token of this rank is the next one; the shape of the tree depends on little else."""
    return float(0.5 * (rank + 1) ** -1.6)
