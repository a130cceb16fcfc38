"""Token recycling: the most likely tokens of every verification are kept, and chained into the next guesses.

Luo et al. 2024, "Turning Trash into Treasure: Accelerating Inference of Large Language Models with Token
Recycling".
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence as List
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar

import numpy as np
import torch

from decoding.drafting import Draft, Drafter
from decoding.engine.block import Block
from decoding.errors import InvalidRequest
from decoding.textform import is_count

if TYPE_CHECKING:
    from decoding.engine.block import Commit
    from decoding.engine.output import Output
    from decoding.engine.sequence import Sequence


_DOUBT = 0.75  # what the model found likely behind a token in another context is this much less so in this one
_LEAST = 0.02  # branches that are less likely than this are not worth a node


@dataclass(eq=False)
class TokenRecycling(Drafter):
    """Remembers, for every token, the `width` most likely next tokens when the model last saw it and how likely they
    were, and unfolds these from the last token into a tree, the most likely branches first.

    The table persists as long as the drafter: requests teach each other. What is guessed decides how soon an answer
    comes, not what it says.

    nodes: guesses per step and sequence, at most. width: children per node, at most.
    """

    nodes: int = 16
    width: int = 8

    name: ClassVar[str] = "token-recycling"
    summary: ClassVar[str] = "trees of what the model found likely after each token, the last time it came"

    # [vocab, width] token ids, -1 where nothing is known, the most likely first; and their shares of the probability.
    _table: np.ndarray = field(init=False, repr=False)
    _share: np.ndarray = field(init=False, repr=False)

    def __post_init__(self) -> None:
        for option, value in (("nodes", self.nodes), ("width", self.width)):
            if not is_count(value):
                raise InvalidRequest(f"token-recycling needs {option} to be an integer of at least 1, not {value!r}.")
        self._reset(0)

    def _reset(self, vocab: int) -> None:
        self._table = np.full((vocab, self.width), -1, dtype=np.int32)
        self._share = np.zeros((vocab, self.width), dtype=np.float32)

    def propose(self, sequences: List[Sequence], lengths: List[int]) -> list[Draft]:
        return [self._unfold(s.tokens[-1], length) for s, length in zip(sequences, lengths, strict=True)]

    def _unfold(self, last: int, levels: int) -> Draft:
        """The tree of the most likely branches: best first, a node's next sibling and its first child come after it."""
        tokens: list[int] = []
        parents: list[int] = []
        confidence: list[float] = []
        heap: list[_Branch] = []
        if levels > 0 and last < len(self._table):
            self._push(heap, 1.0, -1, 1, self._table[last].tolist(), self._share[last].tolist(), 0)
        while heap and len(tokens) < self.nodes:
            _, parent, rank, depth, above, following, shares = heapq.heappop(heap)
            node = len(tokens)
            token, chance = following[rank], _DOUBT * shares[rank]
            tokens.append(token)
            parents.append(parent)
            confidence.append(chance)
            self._push(heap, above, parent, depth, following, shares, rank + 1)
            if depth < levels:
                self._push(
                    heap, above * chance, node, depth + 1, self._table[token].tolist(), self._share[token].tolist(), 0
                )
        return Draft(Block(tokens, parents), confidence=confidence) if tokens else Draft()

    def _push(
        self,
        heap: list[_Branch],
        above: float,
        parent: int,
        depth: int,
        following: list[int],
        shares: list[float],
        rank: int,
    ) -> None:
        """Offer the child of this rank, if there is one and its branch is likely enough."""
        if rank < self.width and following[rank] >= 0:
            chance = above * _DOUBT * shares[rank]
            if chance >= _LEAST or (parent < 0 and rank == 0):
                heapq.heappush(heap, (-chance, parent, rank, depth, above, following, shares))

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
        best, share = self._most_likely(output.logits, np.concatenate(rows))
        at = np.array(tokens)
        self._table[at], self._share[at] = best, share
        # Where a token was guessed twice, the confirmed context counts.
        self._table[at[kept]], self._share[at[kept]] = best[kept], share[kept]

    def unlearn(self) -> None:
        self._reset(len(self._table))

    def _most_likely(self, logits: torch.Tensor, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """[rows, width] token ids and their shares of what these together have; -1 and 0 behind the end of a
        vocabulary that is smaller."""
        vocab = logits.shape[1]
        if len(self._table) != vocab:
            self._reset(vocab)
        if len(rows) < len(logits):
            logits = logits[torch.from_numpy(rows).to(logits.device)]
        values, ids = most_likely(logits, min(self.width, vocab))
        best = np.full((len(rows), self.width), -1, dtype=np.int32)
        share = np.zeros((len(rows), self.width), dtype=np.float32)
        best[:, :vocab] = ids.cpu().numpy()
        share[:, :vocab] = values.float().softmax(-1).cpu().numpy()
        return best, share


_Branch = tuple[float, int, int, int, float, list[int], list[float]]
"""(-chance of the branch, parent node, rank among its children, depth, chance of the parent's branch, ids, shares)"""

_GROUP = 64


def most_likely(logits: torch.Tensor, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """`logits.topk(count)` over a vocabulary: [rows, vocab] to values and ids [rows, count].

    The best tokens lie in the groups of tokens that have the best maxima, and maxima are found far faster than an
    order, on a CPU.
    """
    vocab = logits.shape[1]
    groups = vocab // _GROUP
    if groups < 2 * count:
        values, ids = logits.topk(count, dim=-1)
        return values, ids
    best = logits[:, : groups * _GROUP].unflatten(1, (groups, _GROUP)).amax(-1).topk(count, dim=-1).indices
    inside = torch.arange(_GROUP, device=logits.device)
    rest = torch.arange(groups * _GROUP, vocab, device=logits.device).expand(len(logits), -1)
    candidates = torch.cat([(best[..., None] * _GROUP + inside).flatten(1), rest], dim=1)
    values, places = logits.gather(1, candidates).topk(count, dim=-1)
    return values, candidates.gather(1, places)
