"""Speculative decoding: a drafter guesses cheaply, the model checks all guesses in one pass.

Leviathan et al. 2023; Chen et al. 2023. Greedy requests get plain decoding's tokens, sampled ones its
distribution.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence as List
from contextlib import nullcontext
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
from decoding.textform import is_count

if TYPE_CHECKING:
    from decoding.backends.local import LocalBackend
    from decoding.engine.output import Output
    from decoding.engine.sequence import Sequence


@dataclass(frozen=True)
class Speculative(TokenStrategy):
    """drafter: a name such as "suffix", with options if need be, or a `Drafter` object. The default needs no training
    and no other model, and finds most for the time it takes, wherever answers repeat their prompt or each other.

    draft_length: guesses in a row per step and sequence at most; None chooses what is drafted and verified in every
    step, none at all included, from what came true so far and the measured cost of a step. A seed's answer
    is the same in any batch, unless that choice is about guesses that are sampled as well.
    verification: how the guesses of sampled requests are verified, one of `VERIFICATIONS`; "typical" changes the
    distribution of what is sampled.
    """

    drafter: str | Drafter = "suffix"
    draft_length: int | None = None
    verification: str = "block"

    name: ClassVar[str] = "speculative"
    summary: ClassVar[str] = "a drafter guesses, the model verifies; lossless"

    def __post_init__(self) -> None:
        length = self.draft_length
        if length is not None and not is_count(length):
            raise InvalidRequest(
                f"draft_length must be an integer of at least 1, or None to choose it by measurement, not {length!r}."
            )
        if self.verification not in VERIFICATIONS:
            raise UnknownName("verification", str(self.verification), VERIFICATIONS)
        if isinstance(self.drafter, str):
            drafting.find(self.drafter)  # a wrong name fails here, before anything runs
        elif not isinstance(self.drafter, Drafter):
            raise InvalidRequest(f"drafter must be a drafter's name or a Drafter object, not {self.drafter!r}.")

    @property
    def lossless(self) -> bool:
        return self.verification not in LOSSY

    def decoder(self, backend: LocalBackend) -> Decoder:
        drafter = drafting.find(self.drafter) if isinstance(self.drafter, str) else self.drafter
        drafter.attach(backend)
        if self.draft_length is not None:
            return SpeculativeDecoder(drafter, self.draft_length, self.verification)
        drafter.cost(1, 1, 0.0)  # what has to be measured is measured now, not within a request
        return SpeculativeDecoder(drafter, Width(backend.live), self.verification)


class SpeculativeDecoder(Decoder):
    """Asks the drafter for guesses and confirms them.

    width: how many guesses in a row at most, or what chooses it. verification: see `confirm`.
    """

    def __init__(self, drafter: Drafter, width: int | Width, verification: str = "block") -> None:
        self.drafter = drafter
        self.width = width
        self.verification = verification
        self._drafts: dict[int, tuple[Draft, float]] = {}  # and the tokens expected of it
        self._resting: set[int] = set()  # sequences that do without the drafter in this step

    @property
    def name(self) -> str:
        return self.drafter.name

    def plan(self, sequences: List[Sequence]) -> list[Block]:
        if isinstance(self.width, Width):
            with self.width.timing():
                lengths = self.width.lengths(self.drafter, sequences)
                with self.width.drafting():
                    drafts = self._propose(sequences, lengths)
                drafts, expected = self.width.trim(sequences, drafts)
            self._resting.difference_update(sequence.id for sequence in sequences)
            self._resting.update(s.id for s, length in zip(sequences, lengths, strict=True) if not length)
        else:
            drafts = self._propose(sequences, [max(0, min(self.width, sequence.room)) for sequence in sequences])
            expected = [0.0] * len(drafts)
        for sequence, draft, tokens in zip(sequences, drafts, expected, strict=True):
            self._drafts[sequence.id] = draft, tokens
        return [draft.block for draft in drafts]

    def _propose(self, sequences: List[Sequence], lengths: list[int]) -> list[Draft]:
        drafts = [Draft()] * len(sequences)
        asked = [i for i, length in enumerate(lengths) if length > 0]
        if not asked:
            return drafts
        made = self.drafter.propose([sequences[i] for i in asked], [lengths[i] for i in asked])
        for i, draft in zip(asked, made, strict=True):
            drafts[i] = draft
            if draft.block.parents is not None:
                draft.block.check(sys.maxsize)  # the engine knows the vocabulary, and looks at what is left of it
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
        pairs = [self._drafts.get(s.id, (Draft(), 0.0)) for s in sequences]
        drafts = [draft if block else Draft() for (draft, _), block in zip(pairs, output.blocks, strict=True)]
        with self.width.timing() if isinstance(self.width, Width) else nullcontext():
            commits = confirm(output, [draft.probabilities for draft in drafts], self.verification)
            self._observe(sequences, output, commits)
            if isinstance(self.width, Width):
                for sequence, commit in zip(sequences, commits, strict=True):
                    self.width.learn(sequence, commit.tokens)
        return [
            replace(commit, expected=expected, sources=draft.sources or ())
            for commit, draft, (_, expected) in zip(commits, drafts, pairs, strict=True)
        ]

    def _observe(self, sequences: List[Sequence], output: Output, commits: list[Commit]) -> None:
        """Let the drafter learn, but for what rests."""
        awake = [i for i, sequence in enumerate(sequences) if sequence.id not in self._resting]
        if len(awake) == len(sequences):
            self.drafter.observe(sequences, output, commits)
        elif awake:
            members = [sequences[i] for i in awake]
            self.drafter.observe(members, output.of(members), [commits[i] for i in awake])

    def unlearn(self) -> None:
        self.drafter.unlearn()
        if isinstance(self.width, Width):
            self.width.unlearn()

    def forget(self, sequence: Sequence) -> None:
        self._drafts.pop(sequence.id, None)
        self._resting.discard(sequence.id)
        self.drafter.forget(sequence)
        if isinstance(self.width, Width):
            self.width.forget(sequence)
