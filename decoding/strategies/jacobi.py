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


@dataclass(frozen=True)
class Jacobi(TokenStrategy):
    """Fixed-point iteration on blocks of `block_size` tokens, the last committed one included.

    Greedy requests get plain decoding's tokens; sampled ones its distribution, because a guess that was
    made before the random numbers are drawn is a deterministic draft.
    """

    block_size: int = 8

    name: ClassVar[str] = "jacobi"
    summary: ClassVar[str] = "guess a block, iterate it to the fixed point; no drafter, lossless"

    def __post_init__(self) -> None:
        if not isinstance(self.block_size, int) or self.block_size < 2:
            raise InvalidRequest(f"block_size must be an integer of at least 2, not {self.block_size!r}.")

    @property
    def lossless(self) -> bool:
        return True

    def decoder(self, backend: LocalBackend) -> Decoder:
        return JacobiDecoder(self.block_size)


class JacobiDecoder(Decoder):
    """Keeps one guess per sequence: what the model said last time behind the accepted tokens."""

    def __init__(self, block_size: int) -> None:
        self.block_size = block_size
        self._guesses: dict[int, list[int]] = {}

    @property
    def name(self) -> str:
        return "jacobi"

    def plan(self, sequences: List[Sequence]) -> list[Block]:
        blocks = []
        for sequence in sequences:
            guess = self._guesses.get(sequence.id, [])
            # An empty place gets a token from as far back as the block is long: any guess is allowed,
            # and recent text beats a constant.
            width = min(self.block_size - 1, sequence.room)
            text = sequence.tokens + guess
            while len(text) - len(sequence.tokens) < width:
                text.append(text[-min(self.block_size, len(text))])
            blocks.append(Block(text[len(sequence.tokens) : len(sequence.tokens) + width]))
        return blocks

    def commit(self, sequences: List[Sequence], output: Output) -> list[Commit]:
        commits = confirm(output)
        for i, (sequence, commit) in enumerate(zip(sequences, commits, strict=True)):
            self._guesses[sequence.id] = output.best(i)[len(commit.tokens) :].tolist()
        return commits

    def forget(self, sequence: Sequence) -> None:
        self._guesses.pop(sequence.id, None)
