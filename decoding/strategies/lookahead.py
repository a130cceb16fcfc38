"""Lookahead decoding: iterate a window of guesses beside the text, and verify the n-grams it has left behind.

Fu et al. 2024, "Break the Sequential Dependency of LLM Inference Using Lookahead Decoding". No drafter and no
training: the model's own parallel guesses about the near future become candidates once the text comes to the
token they start with.
"""

from __future__ import annotations

from collections.abc import Iterable
from collections.abc import Sequence as List
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar

from decoding.engine.block import Block, Commit
from decoding.engine.confirm import confirm
from decoding.engine.decoder import Decoder
from decoding.errors import InvalidRequest
from decoding.strategies.base import TokenStrategy

if TYPE_CHECKING:
    from decoding.backends.local import LocalBackend
    from decoding.engine.output import Output
    from decoding.engine.sequence import Sequence


@dataclass(frozen=True)
class Lookahead(TokenStrategy):
    """Greedy requests get plain decoding's tokens, sampled ones its distribution: candidates are chosen before
    the random numbers that test them are drawn.

    window: columns that are iterated in parallel (W). ngram: length of the n-grams that they leave behind (N).
    guesses: candidates verified in a step at most (G), and n-grams kept for every token. A step holds up to
    1 + (window + guesses) · (ngram - 1) tokens. The paper's (15, 5, 15) makes that 121, which a large GPU
    computes in the time of one; a small machine is soon limited by arithmetic, so the default is a quarter.
    shared_pool: keep one pool of n-grams for all requests instead of one for each. Greedy answers stay the
    same; a sampled one keeps its distribution, but which answer a seed gives depends on what ran before.
    """

    window: int = 5
    ngram: int = 4
    guesses: int = 5
    shared_pool: bool = False

    name: ClassVar[str] = "lookahead"
    summary: ClassVar[str] = "iterate a window of guesses, verify the n-grams it leaves behind; no drafter, lossless"

    def __post_init__(self) -> None:
        for option, least in (("window", 1), ("ngram", 2), ("guesses", 1)):
            value = getattr(self, option)
            if not isinstance(value, int) or value < least:
                raise InvalidRequest(f"{option} must be an integer of at least {least}, not {value!r}.")
        if not isinstance(self.shared_pool, bool):
            raise InvalidRequest(f"shared_pool must be true or false, not {self.shared_pool!r}.")

    @property
    def lossless(self) -> bool:
        return True

    def decoder(self, backend: LocalBackend) -> Decoder:
        return LookaheadDecoder(self.window, self.ngram, self.guesses, shared_pool=self.shared_pool)


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


def lookahead_block(candidates: Iterable[List[int]], rows: List[List[int]]) -> tuple[Block, int]:
    """The step's block, and how many of its first nodes are candidates.

    candidates: token chains behind the last committed token; common beginnings share nodes. rows: the window,
    oldest row first, all of the same length. Row 0 is a chain behind the last committed token, and each of its
    tokens carries its column as a chain of its own, so that a place of the window sees row 0 up to its column,
    its column up to its row, and no candidate.
    """
    tokens: list[int] = []
    parents: list[int] = []
    nodes: dict[tuple[int, ...], int] = {(): -1}
    for candidate in candidates:
        for end in range(1, len(candidate) + 1):
            path = tuple(candidate[:end])
            if path not in nodes:
                nodes[path] = len(tokens)
                tokens.append(path[-1])
                parents.append(nodes[path[:-1]])
    count = len(tokens)
    for number, row in enumerate(rows):
        for column, token in enumerate(row):
            if number:
                parents.append(len(tokens) - len(row))
            else:
                parents.append(len(tokens) - 1 if column else -1)
            tokens.append(token)
    return Block(tokens, parents), count


@dataclass
class _Search:
    """The state of one sequence.

    rows: the window, oldest row first; it grows to ngram - 1 rows. known: tokens of the text whose n-grams are
    in the pool. candidates: nodes of the current block that are up for verification; the window is behind them.
    """

    pool: NgramPool
    rows: list[list[int]]
    known: int = 0
    candidates: int = 0


class LookaheadDecoder(Decoder):
    """Keeps a window and a pool per sequence. Only candidates are committed, never the window itself."""

    def __init__(self, window: int, ngram: int, guesses: int, *, shared_pool: bool = False) -> None:
        self.window = window
        self.ngram = ngram
        self.guesses = guesses
        self._shared = NgramPool(guesses) if shared_pool else None
        self._searches: dict[int, _Search] = {}

    @property
    def name(self) -> str:
        return "lookahead"

    def unlearn(self) -> None:
        if self._shared is not None:
            self._shared = NgramPool(self.guesses)

    def plan(self, sequences: List[Sequence]) -> list[Block]:
        blocks = []
        for sequence in sequences:
            search = self._search(sequence)
            self._learn(search, sequence.tokens)
            room = sequence.room
            candidates = [tail[:room] for tail in search.pool.after(sequence.tokens[-1])] if room > 0 else []
            # Its deepest place must fit. When it no longer does, the end is near and new n-grams are of little use.
            rows = search.rows if self.window + len(search.rows) - 1 <= room else []
            block, search.candidates = lookahead_block(candidates, rows)
            blocks.append(block)
        return blocks

    def commit(self, sequences: List[Sequence], output: Output) -> list[Commit]:
        searches = [self._search(sequence) for sequence in sequences]
        # A sequence whose prompt has just been read, or for whose block the engine had no room, comes without one.
        commits = confirm(
            replace(
                output,
                blocks=[_first(block, s.candidates) for block, s in zip(output.blocks, searches, strict=True)],
            )
        )
        for i, (block, search) in enumerate(zip(output.blocks, searches, strict=True)):
            if len(block) > search.candidates:
                self._advance(search, output.best(i)[-self.window :].tolist())
        return commits

    def forget(self, sequence: Sequence) -> None:
        self._searches.pop(sequence.id, None)

    def _search(self, sequence: Sequence) -> _Search:
        if sequence.id not in self._searches:
            # Any first row will do. One that is spread over the text starts n-grams at unlike tokens.
            text = sequence.tokens
            first = [text[column * len(text) // self.window] for column in range(self.window)]
            self._searches[sequence.id] = _Search(self._shared or NgramPool(self.guesses), [first])
        return self._searches[sequence.id]

    def _learn(self, search: _Search, text: List[int]) -> None:
        """Add the n-grams of the text itself, which are the best guesses where it repeats itself."""
        for end in range(max(search.known + 1, self.ngram), len(text) + 1):
            search.pool.add(text[end - self.ngram : end])
        search.known = len(text)

    def _advance(self, search: _Search, answers: list[int]) -> None:
        """Take in what the model said behind the newest row: one n-gram per column, and a new newest row."""
        search.rows.append(answers)
        if len(search.rows) == self.ngram:
            for ngram in zip(*search.rows, strict=True):
                search.pool.add(ngram)
            del search.rows[0]


def _first(block: Block, count: int) -> Block:
    """The tree of a block's first `count` nodes; an empty block stays empty."""
    if not count or block.parents is None:
        return Block()
    return Block(block.tokens[:count], block.parents[:count])
