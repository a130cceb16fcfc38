"""What followed what, in a text and in the model's answers to guesses: where refiners take their guesses from."""

from __future__ import annotations

from collections.abc import Iterable
from collections.abc import Sequence as List
from dataclasses import dataclass, field

from decoding.engine.block import Block

LONGEST = 3
"""Tokens of context that a follower is looked up by at most: longer runs come again more rarely."""


class NgramPool:
    """For every token the n-grams that started with it last, `size` of them at most."""

    def __init__(self, size: int) -> None:
        self.size = size
        self._tails: dict[int, dict[tuple[int, ...], None]] = {}  # a dict remembers the order

    def add(self, ngram: List[int]) -> None:
        """Remember an n-gram, or that it was seen again."""
        tails = self._tails.setdefault(ngram[0], {})
        tail = tuple(ngram[1:])
        tails.pop(tail, None)
        tails[tail] = None
        if len(tails) > self.size:
            del tails[next(iter(tails))]

    def after(self, token: int) -> list[tuple[int, ...]]:
        """What may follow a token: n-grams without it, the latest first."""
        return list(reversed(self._tails.get(token, {})))


@dataclass
class Followers:
    """The tokens that came last after every run of up to `LONGEST` tokens, `kept` of them at most, the latest first."""

    kept: int = 1
    _next: dict[tuple[int, ...], list[int]] = field(default_factory=dict)
    _read: int = 1  # tokens of the text that are known

    def read(self, text: List[int]) -> None:
        """Learn what a growing text added since the last call."""
        if len(text) > self._read:
            self.learn(text[max(0, self._read - LONGEST) : -1], text[self._read :])
        self._read = len(text)

    def learn(self, tokens: List[int], answers: List[int]) -> None:
        """Each of the last `len(answers)` tokens, with those before it, was followed by the answer at its place."""
        first = len(tokens) - len(answers) + 1
        for end, answer in enumerate(answers, start=first):
            for size in range(1, min(LONGEST, end) + 1):
                known = self._next.setdefault(tuple(tokens[end - size : end]), [])
                if answer in known:
                    known.remove(answer)
                known.insert(0, answer)
                del known[self.kept :]

    def find(self, text: List[int]) -> tuple[list[int], int]:
        """What followed the longest known run that ends `text`, the latest first, and how long that run is."""
        for size in range(min(LONGEST, len(text)), 0, -1):
            found = self._next.get(tuple(text[-size:]))
            if found:
                return found, size
        return [], 0


def branches(chains: Iterable[List[int]]) -> Block:
    """One tree of several continuations of the text: common beginnings share nodes, the first chain's come first."""
    tokens: list[int] = []
    parents: list[int] = []
    nodes: dict[tuple[int, ...], int] = {(): -1}
    for chain in chains:
        for end in range(1, len(chain) + 1):
            path = tuple(chain[:end])
            if path not in nodes:
                nodes[path] = len(tokens)
                tokens.append(path[-1])
                parents.append(nodes[path[:-1]])
    return Block(tokens, parents)
