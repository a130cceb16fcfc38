"""The contract between the engine and a decoding method."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence as List
from typing import TYPE_CHECKING

from decoding.engine.block import Block, Commit

if TYPE_CHECKING:
    from decoding.engine.output import Output
    from decoding.engine.sequence import Sequence


class Decoder(ABC):
    """Decides which blocks to run and which tokens to keep, for all its sequences at once.

    Every step the engine calls `plan` with the decoder's sequences whose prompt has been read, runs one
    forward pass over everybody's blocks, and calls `commit` with what the model said. A sequence that has
    just finished its prompt comes to `commit` with an empty block. Neither call changes a sequence; state
    of a decoder's own is keyed by `sequence.id` and dropped in `forget`.

    span: how far attention looks ahead. 1: not at all, every token sees those before it. n: tokens see all of the
    stretch of n positions that they are in, counted from position 0 (block-causal). 0: everything sees everything.
    Anything but 1 is for masked refinement: `commit` may then commit nothing yet, and is first called with a block.
    """

    span: int = 1

    def plan(self, sequences: List[Sequence]) -> list[Block]:
        """One block per sequence, of at most `sequence.room` levels. The default guesses nothing."""
        return [Block() for _ in sequences]

    @abstractmethod
    def commit(self, sequences: List[Sequence], output: Output) -> list[Commit]:
        """The tokens each sequence gains, at least one unless the span allows for less. `output` holds the model's
        verdict on the blocks."""

    def forget(self, sequence: Sequence) -> None:  # noqa: B027 - most decoders keep nothing
        """The sequence has ended, for whatever reason."""

    def unlearn(self) -> None:  # noqa: B027 - most decoders learn nothing
        """Drop whatever earlier requests taught, so that the next one starts afresh."""

    @property
    def name(self) -> str:
        """Who guessed, as the trace shows it."""
        return ""
