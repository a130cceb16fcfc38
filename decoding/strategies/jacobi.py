"""Jacobi decoding: guess a block, run it, keep what agrees, and let the model's answers be the next guess.

Santilli et al. 2023, "Accelerating Transformer Inference for Translation via Parallel Decoding"; with a
key/value cache as in consistency LLMs (Kou et al. 2024).
"""

from __future__ import annotations

from collections.abc import Sequence as List
from dataclasses import dataclass
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

# Recycled guesses follow the longest run of tokens seen before, up to this many: more rarely come again.
_LONGEST = 3


@dataclass(frozen=True)
class Jacobi(TokenStrategy):
    """Fixed-point iteration on blocks of `block_size` tokens, the last committed one included.

    Greedy requests get plain decoding's tokens; sampled ones its distribution, because a guess that was
    made before the random numbers are drawn is a deterministic draft.

    recycle: fill the block with what came last after its last few tokens, in the text or in an earlier iterate,
    rejected ones included, instead of with the last iterate and a repetition of the recent text.
    """

    block_size: int = 4
    recycle: bool = False

    name: ClassVar[str] = "jacobi"
    summary: ClassVar[str] = "guess a block, iterate it to the fixed point; no drafter, lossless"

    def __post_init__(self) -> None:
        if not isinstance(self.block_size, int) or self.block_size < 2:
            raise InvalidRequest(f"block_size must be an integer of at least 2, not {self.block_size!r}.")
        if not isinstance(self.recycle, bool):
            raise InvalidRequest(f"recycle must be true or false, not {self.recycle!r}.")

    @property
    def lossless(self) -> bool:
        return True

    def decoder(self, backend: LocalBackend) -> Decoder:
        return JacobiDecoder(self.block_size, recycle=self.recycle)


class JacobiDecoder(Decoder):
    """Keeps one guess per sequence: what the model said last time behind the accepted tokens.

    With `recycle` it also keeps what followed what, see `_Followers`, and prefers that.
    """

    def __init__(self, block_size: int, *, recycle: bool = False) -> None:
        self.block_size = block_size
        self.recycle = recycle
        self._guesses: dict[int, list[int]] = {}
        self._followers: dict[int, _Followers] = {}

    @property
    def name(self) -> str:
        return "jacobi"

    def plan(self, sequences: List[Sequence]) -> list[Block]:
        blocks = []
        for sequence in sequences:
            guess = self._guesses.get(sequence.id, [])
            width = min(self.block_size - 1, sequence.room)
            text = list(sequence.tokens)
            followers = self._followers.setdefault(sequence.id, _Followers()) if self.recycle else None
            if followers is not None:
                followers.read(text)
            for place in range(width):
                known = followers.find(text) if followers is not None else None
                if known is not None:
                    text.append(known)
                elif place < len(guess):
                    text.append(guess[place])
                else:
                    # An empty place gets a token from as far back as the block is long: any guess is allowed,
                    # and recent text beats a constant.
                    text.append(text[-min(self.block_size, len(text))])
            blocks.append(Block(text[len(sequence.tokens) :]))
        return blocks

    def commit(self, sequences: List[Sequence], output: Output) -> list[Commit]:
        commits = confirm(output)
        for i, (sequence, commit) in enumerate(zip(sequences, commits, strict=True)):
            answers = output.best(i).tolist()
            self._guesses[sequence.id] = answers[len(commit.tokens) :]
            if sequence.id in self._followers:
                self._followers[sequence.id].learn([*sequence.tokens[-_LONGEST:], *output.blocks[i].tokens], answers)
        return commits

    def forget(self, sequence: Sequence) -> None:
        self._guesses.pop(sequence.id, None)
        self._followers.pop(sequence.id, None)


class _Followers:
    """The token that came last after every run of up to `_LONGEST` tokens, in a text or in the model's answers."""

    def __init__(self) -> None:
        self._next: dict[tuple[int, ...], int] = {}
        self._read = 1  # tokens of the text that are known

    def read(self, text: List[int]) -> None:
        """Learn what a growing text added since the last call."""
        if len(text) > self._read:
            self.learn(text[max(0, self._read - _LONGEST) : -1], text[self._read :])
        self._read = len(text)

    def learn(self, tokens: List[int], answers: List[int]) -> None:
        """Each of the last `len(answers)` tokens, with those before it, was followed by the answer at its place."""
        first = len(tokens) - len(answers) + 1
        for end, answer in enumerate(answers, start=first):
            for size in range(1, min(_LONGEST, end) + 1):
                self._next[tuple(tokens[end - size : end])] = answer

    def find(self, text: List[int]) -> int | None:
        """What followed the longest known run that ends `text`."""
        for size in range(min(_LONGEST, len(text)), 0, -1):
            found = self._next.get(tuple(text[-size:]))
            if found is not None:
                return found
        return None
