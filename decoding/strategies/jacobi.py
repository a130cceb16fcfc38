"""Jacobi decoding: guess a block, run it, keep what agrees, and let the model's answers be the next guess.

Santilli et al. 2023, "Accelerating Transformer Inference for Translation via Parallel Decoding" (Jacobi,
Gauss-Seidel-Jacobi and the hybrid of both with plain decoding); with a key/value cache as in consistency LLMs (Kou
et al. 2024); several blocks at once and n-grams recycled from what was rejected as in Jacobi forcing (Hu et al. 2025).

A block's fixed point is plain decoding's text. For sampled requests the map that is iterated draws every token with
the random number of its place in the answer, so there, too, the fixed point is what plain decoding gives.
"""

from __future__ import annotations

from collections.abc import Sequence as List
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar

import numpy as np
import torch

from decoding.drafting import Draft
from decoding.engine.block import Block, Commit, first_branch
from decoding.engine.confirm import PLACE_STREAM, confirm
from decoding.engine.decoder import Decoder
from decoding.engine.sampling import SamplingColumns, draw, probabilities, uniforms
from decoding.engine.width import Width
from decoding.errors import InvalidRequest, UnknownName
from decoding.strategies.base import TokenStrategy
from decoding.strategies.ngrams import LONGEST, Followers, branches
from decoding.strategies.worth import Reach, prices
from decoding.textform import is_count

if TYPE_CHECKING:
    from decoding.backends.local import LocalBackend
    from decoding.engine.output import Output
    from decoding.engine.sequence import Sequence

SCHEDULES = ("sliding", "gauss-seidel", "hybrid")
INITIAL = ("ngrams", "iterate", "prompt")

_UNMEASURED_BLOCK = 4  # tokens, where nothing is known of what a step costs
_LARGEST_BLOCK = 16  # tokens, where it is; a trained adapter's block likewise
_TRAINED = 0.6  # how often a trained model's guess is believed to be right, if those before it are, until it shows
_CONFIDENCE = (0.15, 0.25, 0.4, 0.6)
"""The first guess at how often a guess is right: an iterate, or what followed a run of 1, 2 or 3 tokens. What comes
true corrects it, see `engine.width`."""
_BRANCH = 0.12  # the same for the first token of an alternative to the chain


@dataclass(frozen=True)
class Jacobi(TokenStrategy):
    """Fixed-point iteration on blocks. The tokens are plain decoding's, greedy and sampled.

    block_size: tokens in a block, the last committed one included. None chooses how much of a block is run in every
        step, none of it included, from what came true so far and the measured cost of a step.
    schedule: "sliding" moves the block on with every token that is fixed; "gauss-seidel" iterates a block to its
        fixed point before the next one starts; "hybrid" does, too, but decodes the rest of a block plainly once
        its iterate holds an end of the answer, behind which nothing is worth iterating.
    blocks: how many blocks may be iterated at once. A further one starts when half of the one before it is settled;
        it is guesswork until everything before it is fixed. Not for the sliding schedule, which has one block.
    initial: what a place is guessed from first: "ngrams", what came last after the tokens before it; "iterate", the
        model's answer in the last step, and n-grams where there is none; "prompt", likewise, and tokens of the prompt
        where there is none, as consistency LLMs begin.
    recycle: the n-grams are those of the text and of all iterates, rejected ones included; false: of the text.
    candidates: n-grams that are verified beside the block, as branches; None takes none, or one for a trained adapter,
        whose iterates are worth running behind either.
    adapter: a LoRA adapter trained for this (`experiments/train_jacobi.py`): the name of one that comes with the
        package, or a folder. The tokens are then exactly those of plain decoding *by the adapted model*.
    """

    block_size: int | None = None
    schedule: str = "sliding"
    blocks: int = 1
    initial: str = "ngrams"
    recycle: bool = True
    candidates: int | None = None
    adapter: str | None = None

    name: ClassVar[str] = "jacobi"
    summary: ClassVar[str] = "guess a block, iterate it to the fixed point; no drafter, lossless"

    def __post_init__(self) -> None:
        for option, least in (("block_size", 2), ("blocks", 1), ("candidates", 0)):
            value = getattr(self, option)
            if option in ("block_size", "candidates") and value is None:
                continue
            if not is_count(value, least):
                raise InvalidRequest(f"{option} must be an integer of at least {least}, not {value!r}.")
        if self.schedule not in SCHEDULES:
            raise UnknownName("schedule", str(self.schedule), SCHEDULES)
        if self.initial not in INITIAL:
            raise UnknownName("initial guess", str(self.initial), INITIAL)
        if not isinstance(self.recycle, bool):
            raise InvalidRequest(f"recycle must be true or false, not {self.recycle!r}.")
        if self.blocks > 1 and self.schedule == "sliding":
            raise InvalidRequest("the sliding schedule has one block; choose schedule=gauss-seidel for several.")
        if self.adapter is not None and not isinstance(self.adapter, str):
            raise InvalidRequest(f"adapter must be a name or a folder, not {self.adapter!r}.")

    @property
    def lossless(self) -> bool:
        return self.adapter is None

    def home(self, backend: LocalBackend) -> LocalBackend:
        if self.adapter is None:
            return backend
        from decoding.strategies.adapter import adapted

        return adapted(backend, self.adapter)

    def decoder(self, backend: LocalBackend) -> Decoder:
        capacity = backend.engine.cache.capacity
        if (self.block_size or 0) * self.blocks > capacity:
            raise InvalidRequest(
                f"blocks of {self.block_size} tokens do not fit a sequence of {capacity}; choose a smaller block_size "
                "or load the model with a larger capacity."
            )
        latency = getattr(backend, "live", None) if self.block_size is None else None
        unmeasured = _UNMEASURED_BLOCK if self.adapter is None else _LARGEST_BLOCK
        return JacobiDecoder(
            self.block_size or (unmeasured if latency is None else _LARGEST_BLOCK),
            schedule=self.schedule,
            blocks=self.blocks,
            initial=self.initial,
            recycle=self.recycle,
            candidates=self.candidates if self.candidates is not None else int(self.adapter is not None),
            width=None if latency is None else Width(latency),
            trained=self.adapter is not None,
        )


@dataclass
class _Iteration:
    """The state of one sequence. Places are indices of its text.

    ends: of the blocks under way, the place behind each. iterate: the model's last answer for places that are not
    fixed. settled: those for which it was the answer before, too. plain_until: places before it are not guessed.
    wide: the step runs all places of a block, whatever they are guessed from.
    """

    followers: Followers
    reach: Reach
    ends: list[int] = field(default_factory=list)
    iterate: dict[int, int] = field(default_factory=dict)
    settled: set[int] = field(default_factory=set)
    plain_until: int = 0
    wide: bool = True


class JacobiDecoder(Decoder):
    """Iterates blocks of `block_size` tokens; the options are those of `Jacobi`.

    width: chooses how many of the guesses are run; without it, all of them. trained: with `width`, the block is made as
    long as iterating it pays, and only where no length does, good guesses are all that is run.
    """

    def __init__(
        self,
        block_size: int,
        *,
        schedule: str = "sliding",
        blocks: int = 1,
        initial: str = "ngrams",
        recycle: bool = True,
        candidates: int = 0,
        width: Width | None = None,
        trained: bool = False,
    ) -> None:
        self.block_size = block_size
        self.schedule = schedule
        self.blocks = blocks
        self.initial = initial
        self.recycle = recycle
        self.candidates = candidates
        self.width = width
        self.trained = trained
        self._iterations: dict[int, _Iteration] = {}

    @property
    def name(self) -> str:
        return "jacobi"

    def plan(self, sequences: List[Sequence]) -> list[Block]:
        drafts = [self._draft(sequence, len(sequences)) for sequence in sequences]
        if self.width is not None:
            narrow = [i for i, s in enumerate(sequences) if not self._iterations[s.id].wide]
            trimmed = self.width.trim([sequences[i] for i in narrow], [drafts[i] for i in narrow])[0] if narrow else []
            for i, draft in zip(narrow, trimmed, strict=True):
                drafts[i] = draft
        return [draft.block for draft in drafts]

    def commit(self, sequences: List[Sequence], output: Output) -> list[Commit]:
        commits = confirm(output)
        for i, (sequence, commit) in enumerate(zip(sequences, commits, strict=True)):
            state = self._iteration(sequence)
            block = output.blocks[i]
            chain = first_branch(block.tokens, block.parents)
            # What the model says at every place is wanted even behind guesses that were wrong: that is the iteration.
            answers = best_answers(output, i, 1 + len(chain)) if chain else [commit.tokens[0]]
            if self.recycle:
                state.followers.learn([*sequence.tokens[-LONGEST:], *chain], answers)
            here, gained = len(sequence.tokens), len(commit.tokens)
            state.settled = {here + j for j, guess in enumerate(chain) if guess == answers[j]}
            state.iterate = {here + j: answers[j] for j in range(gained, len(answers))}
            if self.width is not None:
                self.width.learn(sequence, commit.tokens)
                state.reach.saw(len(chain) if state.wide else 0, gained - 1)
        return commits

    def forget(self, sequence: Sequence) -> None:
        self._iterations.pop(sequence.id, None)
        if self.width is not None:
            self.width.forget(sequence)

    def unlearn(self) -> None:
        if self.width is not None:
            self.width.unlearn()

    def _iteration(self, sequence: Sequence) -> _Iteration:
        if sequence.id not in self._iterations:
            self._iterations[sequence.id] = _Iteration(
                Followers(1 + self.candidates), Reach(_TRAINED, self.block_size * self.blocks)
            )
        return self._iterations[sequence.id]

    def _draft(self, sequence: Sequence, companions: int) -> Draft:
        """This step's guesses: the block's places as a chain, and other n-grams as branches."""
        state = self._iteration(sequence)
        state.followers.read(sequence.tokens)
        places = max(0, min(self._places(sequence, state), sequence.room))
        state.wide = self.width is None
        if self.width is not None and self.trained:
            most = self.block_size * self.blocks
            paying = state.reach.width(prices(self.width.latency, most, companions, float(len(sequence.tokens))))
            state.wide = paying > 0
            places = min(places, paying) if state.wide else places
        chain, confidence = self._guesses(sequence, state, places)
        others = self._others(sequence, state, chain, places)
        if not others:
            return Draft(Block(chain), confidence=confidence)
        block = branches([chain, *others])
        more = len(block) - len(chain)
        return Draft(block, confidence=[*confidence, *[_BRANCH] * more])

    def _places(self, sequence: Sequence, state: _Iteration) -> int:
        """How many places behind the text the schedule iterates now."""
        here, size = len(sequence.tokens), self.block_size - 1
        if self.schedule == "sliding":
            return size
        if here < state.plain_until:
            return 0
        state.ends = [end for end in state.ends if end > here] or [here + size]
        last = range(state.ends[-1] - size, state.ends[-1])
        if len(state.ends) < self.blocks and 2 * sum(p < here or p in state.settled for p in last) >= size:
            state.ends.append(state.ends[-1] + size)
        if self.schedule == "hybrid" and any(token in sequence.eos for token in state.iterate.values()):
            state.plain_until = state.ends[-1]
            return 0
        return state.ends[-1] - here

    def _guesses(self, sequence: Sequence, state: _Iteration, places: int) -> tuple[list[int], list[float]]:
        """A guess for every place, and how often such guesses are right; fewer where only good ones are run."""
        text, confidence = list(sequence.tokens), []
        for place in range(len(text), len(text) + places):
            iterate = state.iterate.get(place)
            found, length = ([], 0) if self.initial == "prompt" else state.followers.find(text)
            if found and not (self.initial == "iterate" and iterate is not None):
                text.append(found[0])
                confidence.append(_CONFIDENCE[length])
            elif iterate is not None:
                text.append(iterate)
                confidence.append(_CONFIDENCE[0])
            elif self.initial == "prompt":
                text.append(sequence.prompt[place % len(sequence.prompt)])
                confidence.append(_CONFIDENCE[0])
            elif state.wide:
                # An empty place gets a token from as far back as the block is long: any guess is allowed, and recent
                # text beats a constant.
                text.append(text[-min(self.block_size, len(text))])
                confidence.append(_CONFIDENCE[0])
            else:
                break
        return text[len(sequence.tokens) :], confidence

    def _others(self, sequence: Sequence, state: _Iteration, chain: list[int], places: int) -> list[list[int]]:
        """Other continuations: each starts with another follower of the text, and goes on with the likeliest."""
        if not self.candidates or not places:
            return []
        firsts = [token for token in state.followers.find(sequence.tokens)[0] if token not in chain[:1]]
        others = []
        for first in firsts[: self.candidates]:
            text = [*sequence.tokens[-LONGEST:], first]
            start = len(text) - 1
            while len(text) - start < min(places, 1 + LONGEST) and (found := state.followers.find(text)[0]):
                text.append(found[0])
            others.append(text[start:])
        return others


def best_answers(output: Output, i: int, count: int) -> list[int]:
    """What sequence i's request would choose next at the root of its block and at its first `count - 1` guesses.

    The most likely token, or for a sampled request the one drawn with the random number of its place in the answer.
    """
    sequence = output.sequences[i]
    if sequence.params.temperature == 0:
        greedy: list[int] = output.best(i)[:count].tolist()
        return greedy
    device = output.logits.device
    start = int(output.offsets[i])
    places = torch.from_numpy(len(sequence.tokens) - len(sequence.prompt) + np.arange(count)).to(device)
    columns = SamplingColumns.of([sequence.params], device).rows(torch.zeros_like(places))
    u = uniforms(columns.seed, places, PLACE_STREAM, 1)[:, 0]
    drawn: list[int] = draw(probabilities(output.logits[start : start + count], columns), u).tolist()
    return drawn
