"""Speculative decoding: a drafter guesses cheaply, the model checks all guesses in one pass.

Leviathan et al. 2023; Chen et al. 2023. Greedy requests get plain decoding's tokens, sampled ones its
distribution (rejection sampling).
"""

from __future__ import annotations

from collections.abc import Sequence as List
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from decoding import drafting
from decoding.drafting import Draft, Drafter
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
class Speculative(TokenStrategy):
    """drafter: a name such as "prompt-lookup", with options if need be, or a `Drafter` object.

    draft_length: guesses per step and sequence at most.
    """

    drafter: str | Drafter = "prompt-lookup"
    draft_length: int = 5

    name: ClassVar[str] = "speculative"
    summary: ClassVar[str] = "a drafter guesses, the model verifies; lossless"

    def __post_init__(self) -> None:
        if not isinstance(self.draft_length, int) or self.draft_length < 1:
            raise InvalidRequest(f"draft_length must be an integer of at least 1, not {self.draft_length!r}.")
        if isinstance(self.drafter, str):
            drafting.find(self.drafter)  # a wrong name fails here, before anything runs

    @property
    def lossless(self) -> bool:
        return True

    def decoder(self, backend: LocalBackend) -> Decoder:
        drafter = drafting.find(self.drafter) if isinstance(self.drafter, str) else self.drafter
        drafter.attach(backend)
        return SpeculativeDecoder(drafter, self.draft_length)


class SpeculativeDecoder(Decoder):
    """Asks the drafter for guesses and confirms them."""

    def __init__(self, drafter: Drafter, draft_length: int) -> None:
        self.drafter = drafter
        self.draft_length = draft_length
        self._drafts: dict[int, Draft] = {}

    @property
    def name(self) -> str:
        return self.drafter.name

    def plan(self, sequences: List[Sequence]) -> list[Block]:
        lengths = [min(self.draft_length, sequence.room) for sequence in sequences]
        drafts = self.drafter.propose(sequences, lengths)
        self._drafts.update((s.id, draft) for s, draft in zip(sequences, drafts, strict=True))
        return [draft.block for draft in drafts]

    def commit(self, sequences: List[Sequence], output: Output) -> list[Commit]:
        # A sequence without guesses in the output (its prompt has just been read, or the engine had no
        # room for them) was not verified against its draft.
        drafts = [self._drafts.pop(s.id, Draft()) for s in sequences]
        commits = confirm(output, [d.probabilities if b else None for d, b in zip(drafts, output.blocks, strict=True)])
        self.drafter.observe(sequences, output, commits)
        return commits

    def unlearn(self) -> None:
        self.drafter.unlearn()

    def forget(self, sequence: Sequence) -> None:
        self._drafts.pop(sequence.id, None)
        self.drafter.forget(sequence)
