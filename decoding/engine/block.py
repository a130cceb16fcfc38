"""Blocks: the tokens one sequence puts through the model in one step, after those already committed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from operator import index

import numpy as np


@dataclass(frozen=True, slots=True)
class Block:
    """A tree of guesses behind the last committed token.

    tokens: guessed token ids, parents before children; empty for plain decoding. Any sequence of integers, arrays too.
    parents: index in `tokens` of each guess's parent, -1 for the last committed token; None for a
        chain, in which every guess follows the one before it. A guess sees the committed tokens, its
        ancestors and itself; its position is its depth below the last committed token.
    bidirectional: every guess sees every other one instead, at positions in order (masked refinement).
    suffix: how many entries right behind the block, left in the cache by an earlier pass, are seen as well, by every
        token that sees the block's last one.
    """

    tokens: Sequence[int] = ()
    parents: Sequence[int] | None = None
    bidirectional: bool = False
    suffix: int = 0

    def __post_init__(self) -> None:
        for name in ("tokens", "parents"):  # arrays add up where lists are joined
            values = getattr(self, name)
            if values is not None and not isinstance(values, (list, tuple)):
                object.__setattr__(self, name, tuple(map(index, values)))

    def __len__(self) -> int:
        return len(self.tokens)

    def check(self, vocab: int) -> None:
        """Raise ValueError unless this is a well-formed tree over token ids below `vocab`, TypeError for a float."""
        for token in self.tokens:
            if not 0 <= index(token) < vocab:
                raise ValueError(f"a guessed token id, {token}, lies outside the model's vocabulary of {vocab}.")
        if self.parents is None:
            return
        if self.bidirectional or len(self.parents) != len(self.tokens):
            raise ValueError("a tree block needs one parent for every token, and cannot be bidirectional.")
        for node, parent in enumerate(self.parents):
            if not -1 <= parent < node:
                raise ValueError(f"node {node} of a tree block names parent {parent}, which does not come before it.")


def first_branch(tokens: Sequence[int], parents: Sequence[int] | None) -> list[int]:
    """The path that the first nodes of a block make: a chain is all of it, and a tree's alternatives lie behind it."""
    if parents is None:
        return list(tokens)
    length = 0
    while length < len(tokens) and parents[length] == length - 1:
        length += 1
    return list(tokens[:length])


def settled(length: int, span: int) -> int:
    """Of `length` committed tokens, how many have cache entries that no later token changes.

    span: how far attention looks ahead, see `Decoder.span`. The last token is left out, even if its entry could
    stay: it is run again in every step, for its logits.
    """
    return min(length // span * span, length - 1) if span else 0


@lru_cache(maxsize=4096)
def layout(
    count: int, pending: int, parents: tuple[int, ...] | None, bidirectional: bool, span: int = 1, base: int = 0
) -> Layout:
    """Depths and visibility of `pending` committed tokens followed by `count` guesses.

    span: see `Decoder.span`. base: position of the first of them, modulo `span`.
    """
    total = pending + count
    depth = np.arange(total)
    if span != 1:
        stretch = (base + depth) // span if span else np.zeros(total, dtype=np.int64)
        return Layout(depth, stretch[:, None] >= stretch)
    if parents is None and not bidirectional:
        return Layout(depth, None)
    visible = np.tril(np.ones((total, total), dtype=bool))
    if bidirectional:
        visible[pending:, pending:] = True
    elif parents is not None:
        for node, parent in enumerate(parents):
            row = pending + node
            above = pending + parent  # a parent of -1 is the last committed token
            visible[row] = visible[above]
            visible[row, row] = True
            depth[row] = depth[above] + 1
    return Layout(depth, visible)


@dataclass(frozen=True, slots=True)
class Layout:
    """Where a block's tokens stand, and what they see of each other.

    depth: [tokens] position below the first token of the block.
    visible: [tokens, tokens] whether row sees column; None if every token sees all before it.
    """

    depth: np.ndarray
    visible: np.ndarray | None


@dataclass(frozen=True, slots=True)
class Commit:
    """What a forward pass confirmed for one sequence.

    tokens: new tokens in order; all but the last (the bonus token) are guesses that were accepted. In masked
        refinement: none while the block is being refined, then the finished block.
    path: indices of the accepted guesses in the block; None if they are its first `len(tokens) - 1`.
    written, revised: places of the block that got a token, and that lost or changed theirs (masked refinement).
    reuse: masked refinement: how many committed tokens' cache entries the next pass takes as they are, even if they
        would come out differently (an approximation); None for those that are final, see `settled`.
    logprobs: of `tokens`, natural log; None if the block's logits tell them as those of a chain.
    expected: how many tokens were expected, bonus token included; 0 if nobody estimated.
    sources: who made each guess of the block, where several drafters did.
    """

    tokens: Sequence[int]
    path: Sequence[int] | None = None
    expected: float = 0.0
    sources: Sequence[str] = ()
    written: int = 0
    revised: int = 0
    reuse: int | None = None
    logprobs: Sequence[float] | None = None
