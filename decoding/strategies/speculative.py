"""Speculative decoding: a drafter guesses cheaply, the model checks all guesses in one pass.

Leviathan et al. 2023; Chen et al. 2023. Greedy requests get plain decoding's tokens, sampled ones its
distribution.
"""

from __future__ import annotations

from collections.abc import Sequence as List
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar

from decoding import drafting
from decoding.drafting import Draft, Drafter
from decoding.engine.block import Block, Commit
from decoding.engine.confirm import LOSSY, VERIFICATIONS, confirm
from decoding.engine.decoder import Decoder
from decoding.engine.width import Width
from decoding.errors import InvalidRequest, UnknownName
from decoding.strategies.base import TokenStrategy

if TYPE_CHECKING:
    from decoding.backends.local import LocalBackend
    from decoding.engine.output import Output
    from decoding.engine.sequence import Sequence


@dataclass(frozen=True)
class Speculative(TokenStrategy):
    """drafter: a name such as "prompt-lookup", with options if need be, or a `Drafter` object.

    draft_length: guesses in a row per step and sequence at most; None chooses what is drafted and verified in every
    step, none at all included, from what came true so far and the measured cost of a step.
    verification: how the guesses of sampled requests are verified, one of `VERIFICATIONS`; "typical" changes the
    distribution of what is sampled.
    """

    drafter: str | Drafter = "prompt-lookup"
    draft_length: int | None = None
    verification: str = "block"

    name: ClassVar[str] = "speculative"
    summary: ClassVar[str] = "a drafter guesses, the model verifies; lossless"

    def __post_init__(self) -> None:
        length = self.draft_length
        if length is not None and (not isinstance(length, int) or isinstance(length, bool) or length < 1):
            raise InvalidRequest(
                f"draft_length must be an integer of at least 1, or None to choose it by measurement, not {length!r}."
            )
        if self.verification not in VERIFICATIONS:
            raise UnknownName("verification", str(self.verification), VERIFICATIONS)
        if isinstance(self.drafter, str):
            drafting.find(self.drafter)  # a wrong name fails here, before anything runs

    @property
    def lossless(self) -> bool:
        return self.verification not in LOSSY

    def decoder(self, backend: LocalBackend) -> Decoder:
        drafter = drafting.find(self.drafter) if isinstance(self.drafter, str) else self.drafter
        drafter.attach(backend)
        if self.draft_length is not None:
            return SpeculativeDecoder(drafter, self.draft_length, self.verification)
        drafter.cost(1, 1, 0.0)  # what has to be measured is measured now, not within a request
        return SpeculativeDecoder(drafter, Width(backend.latency), self.verification)


class SpeculativeDecoder(Decoder):
    """Asks the drafter for guesses and confirms them.

    width: how many guesses in a row at most, or what chooses it. verification: see `confirm`.
    """

    def __init__(self, drafter: Drafter, width: int | Width, verification: str = "block") -> None:
        self.drafter = drafter
        self.width = width
        self.verification = verification
        self._drafts: dict[int, tuple[Draft, float]] = {}  # and the tokens expected of it

    @property
    def name(self) -> str:
        return self.drafter.name

    def plan(self, sequences: List[Sequence]) -> list[Block]:
        if isinstance(self.width, Width):
            drafts = self._propose(sequences, self.width.lengths(self.drafter, sequences))
            drafts, expected = self.width.trim(sequences, drafts)
        else:
            drafts = self._propose(sequences, [max(0, min(self.width, sequence.room)) for sequence in sequences])
            expected = [0.0] * len(drafts)
        for sequence, draft, tokens in zip(sequences, drafts, expected, strict=True):
            self._drafts[sequence.id] = draft, tokens
        return [draft.block for draft in drafts]

    def _propose(self, sequences: List[Sequence], lengths: list[int]) -> list[Draft]:
        drafts = self.drafter.propose(sequences, lengths)
        for draft in drafts:
            for what, values in (("confidence", draft.confidence), ("sources", draft.sources)):
                if values is not None and len(values) != len(draft.block):
                    raise ValueError(
                        f"the drafter {self.drafter.name} gave {len(values)} entries of {what} for "
                        f"{len(draft.block)} guesses; give one for each."
                    )
        return drafts

    def commit(self, sequences: List[Sequence], output: Output) -> list[Commit]:
        # A sequence without guesses in the output (its prompt has just been read, or the engine had no
        # room for them) was not verified against its draft.
        pairs = [self._drafts.pop(s.id, (Draft(), 0.0)) for s in sequences]
        drafts = [draft if block else Draft() for (draft, _), block in zip(pairs, output.blocks, strict=True)]
        commits = confirm(output, [draft.probabilities for draft in drafts], self.verification)
        self.drafter.observe(sequences, output, commits)
        if isinstance(self.width, Width):
            for sequence, commit in zip(sequences, commits, strict=True):
                self.width.learn(sequence, commit.tokens)
        return [
            replace(commit, expected=expected, sources=draft.sources or ())
            for commit, draft, (_, expected) in zip(commits, drafts, pairs, strict=True)
        ]

    def unlearn(self) -> None:
        self.drafter.unlearn()
        if isinstance(self.width, Width):
            self.width.unlearn()

    def forget(self, sequence: Sequence) -> None:
        self._drafts.pop(sequence.id, None)
        self.drafter.forget(sequence)
        if isinstance(self.width, Width):
            self.width.forget(sequence)
