"""Lookahead decoding: iterate a window of guesses beside the text, and verify the n-grams it has left behind.

Fu et al. 2024, "Break the Sequential Dependency of LLM Inference Using Lookahead Decoding". No drafter and no
training: the model's own parallel guesses about the near future become candidates once the text comes to the
token they start with. Unlike there, the window is verified too: its places are guesses like any others, and what
the model confirms of them is kept.
"""

from __future__ import annotations

from collections.abc import Iterable
from collections.abc import Sequence as List
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar

from decoding.drafting import Draft
from decoding.engine.block import Block, Commit
from decoding.engine.confirm import confirm
from decoding.engine.decoder import Decoder
from decoding.engine.width import Width
from decoding.errors import InvalidRequest
from decoding.strategies.base import TokenStrategy
from decoding.strategies.ngrams import NgramPool, branches
from decoding.strategies.worth import Worth, price_ratio
from decoding.textform import is_count

if TYPE_CHECKING:
    from decoding.backends.local import LocalBackend
    from decoding.engine.output import Output
    from decoding.engine.sequence import Sequence

_FIRST, _LATER = (0.4, 0.2, 0.1), 0.6
"""The first guess at how often a candidate is right: its first token, by the candidate's rank, and each later one."""
_WINDOW = 0.3  # tokens per step that the window is believed to bring until it shows otherwise


@dataclass(frozen=True)
class Lookahead(TokenStrategy):
    """The tokens are plain decoding's, greedy and sampled: whatever is guessed, the model's own choice decides.

    window: columns that are iterated in parallel (W). ngram: length of the n-grams that they leave behind (N).
    guesses: candidates verified in a step at most (G), and n-grams kept for every token. A step holds up to
    1 + (window + guesses) · (ngram - 1) tokens. The paper's (15, 5, 15) makes that 121, which a large GPU
    computes in the time of one; a small machine is soon limited by arithmetic, so the default is a quarter.
    shared_pool: keep one pool of n-grams for all requests instead of one for each.
    adaptive: run only what pays, by what came true so far and the measured cost of a step: fewer candidates, no window.
    """

    window: int = 5
    ngram: int = 4
    guesses: int = 5
    shared_pool: bool = False
    adaptive: bool = True

    name: ClassVar[str] = "lookahead"
    summary: ClassVar[str] = "iterate a window of guesses, verify the n-grams it leaves behind; no drafter, lossless"

    def __post_init__(self) -> None:
        for option, least in (("window", 1), ("ngram", 2), ("guesses", 1)):
            value = getattr(self, option)
            if not is_count(value, least):
                raise InvalidRequest(f"{option} must be an integer of at least {least}, not {value!r}.")
        for option in ("shared_pool", "adaptive"):
            if not isinstance(value := getattr(self, option), bool):
                raise InvalidRequest(f"{option} must be true or false, not {value!r}.")

    @property
    def lossless(self) -> bool:
        return True

    def decoder(self, backend: LocalBackend) -> Decoder:
        most, capacity = 1 + (self.window + self.guesses) * (self.ngram - 1), backend.engine.cache.capacity
        if most > capacity:
            raise InvalidRequest(
                f"a step of lookahead may take {most} tokens here, and a sequence {capacity}; choose a smaller window, "
                "ngram or guesses, or load the model with a larger capacity."
            )
        latency = getattr(backend, "live", None) if self.adaptive else None
        width = None if latency is None else Width(latency)
        return LookaheadDecoder(self.window, self.ngram, self.guesses, shared_pool=self.shared_pool, width=width)


def lookahead_block(candidates: Iterable[List[int]], rows: List[List[int]]) -> tuple[Block, int]:
    """The step's block, and how many of its first nodes are candidates.

    candidates: token chains behind the last committed token; common beginnings share nodes. rows: the window,
    oldest row first, all of the same length. Row 0 is a chain behind the last committed token, and each of its
    tokens carries its column as a chain of its own, so that a place of the window sees row 0 up to its column,
    its column up to its row, and no candidate.
    """
    return with_window(branches(candidates), rows)


def with_window(candidates: Block, rows: List[List[int]]) -> tuple[Block, int]:
    """As `lookahead_block`, for candidates that are a tree already."""
    tokens, parents = list(candidates.tokens), list(candidates.parents or ())
    for number, row in enumerate(rows):
        for column, token in enumerate(row):
            if number:
                parents.append(len(tokens) - len(row))
            else:
                parents.append(len(tokens) - 1 if column else -1)
            tokens.append(token)
    return Block(tokens, parents), len(candidates)


@dataclass
class _Search:
    """The state of one sequence.

    rows: the window, oldest row first; it grows to ngram - 1 rows. known: tokens of the text whose n-grams are
    in the pool. candidates: nodes of the current block that come from the pool; the window is behind them.
    made: n-grams that the window left behind and the text has not shown. worth: tokens per step that the window
    brings, itself or by what it left behind.
    """

    pool: NgramPool
    rows: list[list[int]]
    known: int = 0
    candidates: int = 0
    made: set[tuple[int, ...]] = field(default_factory=set)
    worth: Worth = field(default_factory=lambda: Worth(_WINDOW))


class LookaheadDecoder(Decoder):
    """Keeps a window and a pool per sequence. width: chooses what is run of them; without it, everything."""

    def __init__(
        self, window: int, ngram: int, guesses: int, *, shared_pool: bool = False, width: Width | None = None
    ) -> None:
        self.window = window
        self.ngram = ngram
        self.guesses = guesses
        self.width = width
        self._shared = NgramPool(guesses) if shared_pool else None
        self._searches: dict[int, _Search] = {}

    @property
    def name(self) -> str:
        return "lookahead"

    def unlearn(self) -> None:
        if self._shared is not None:
            self._shared = NgramPool(self.guesses)
        if self.width is not None:
            self.width.unlearn()

    def plan(self, sequences: List[Sequence]) -> list[Block]:
        drafts = []
        for sequence in sequences:
            search = self._search(sequence)
            self._learn(search, sequence.tokens)
            room = max(0, sequence.room)
            drafts.append(_candidates([tail[:room] for tail in search.pool.after(sequence.tokens[-1])]))
        expected = [1.0] * len(drafts)
        if self.width is not None:
            drafts, expected = self.width.trim(sequences, drafts)
        blocks = []
        for sequence, draft, tokens in zip(sequences, drafts, expected, strict=True):
            search = self._search(sequence)
            rows = search.rows if self._window_pays(sequence, len(draft.block), tokens, len(sequences)) else []
            block, search.candidates = with_window(draft.block, rows)
            blocks.append(block)
        return blocks

    def _window_pays(self, sequence: Sequence, candidates: int, expected: float, companions: int) -> bool:
        """Whether to run the window beside so many candidates, from which so many tokens are expected."""
        search = self._search(sequence)
        # Its deepest place must fit. When it no longer does, the end is near and new n-grams are of little use.
        if self.window + len(search.rows) - 1 > sequence.room:
            return False
        if self.width is None:
            return True
        wide, narrow = 1 + candidates + self.window * len(search.rows), 1 + candidates
        ratio = price_ratio(self.width.latency, wide, narrow, companions, float(len(sequence.tokens)))
        return expected + search.worth.mean >= ratio * expected

    def commit(self, sequences: List[Sequence], output: Output) -> list[Commit]:
        # A sequence whose prompt has just been read, or for whose block the engine had no room, comes without one.
        commits = confirm(output)
        for i, (sequence, block, commit) in enumerate(zip(sequences, output.blocks, commits, strict=True)):
            search = self._search(sequence)
            brought = self._window_brought(sequence, search, commit)
            if len(block) > search.candidates:
                search.worth.saw(brought)
                self._advance(search, output.best(i)[-self.window :].tolist())
            else:
                search.worth.rested()
            if self.width is not None:
                self.width.learn(sequence, commit.tokens)
        return commits

    def forget(self, sequence: Sequence) -> None:
        self._searches.pop(sequence.id, None)
        if self.width is not None:
            self.width.forget(sequence)

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
            ngram = text[end - self.ngram : end]
            search.pool.add(ngram)
            search.made.discard(tuple(ngram))
        search.known = len(text)

    def _advance(self, search: _Search, answers: list[int]) -> None:
        """Take in what the model said behind the newest row: one n-gram per column, and a new newest row."""
        search.rows.append(answers)
        if len(search.rows) == self.ngram:
            for ngram in zip(*search.rows, strict=True):
                if ngram[1:] not in search.pool.after(ngram[0]):
                    search.made.add(ngram)
                search.pool.add(ngram)
            del search.rows[0]

    def _window_brought(self, sequence: Sequence, search: _Search, commit: Commit) -> int:
        """How many of the accepted guesses are owed to the window: its own places, or n-grams that only it has seen."""
        path = commit.path or ()
        if not path or path[0] >= search.candidates:
            return len(path)
        last, found = sequence.tokens[-1], tuple(commit.tokens[: len(path)])
        tails = [tail for tail in search.pool.after(last) if tail[: len(found)] == found]
        return len(path) if all((last, *tail) in search.made for tail in tails) else 0


def _candidates(tails: List[tuple[int, ...]]) -> Draft:
    """N-grams as a tree, the latest first, with the first guess at how often each node is right."""
    block = branches(tails)
    ranks = iter(range(len(block)))
    confidence = [_FIRST[min(next(ranks), len(_FIRST) - 1)] if parent < 0 else _LATER for parent in block.parents or ()]
    return Draft(block, confidence=confidence)
