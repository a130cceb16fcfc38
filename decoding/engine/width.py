"""How many guesses to verify: as many as raise the expected tokens per second.

A guess is worth a place in the step if the chance that it and all guesses above it are right (its survival) pays
for what the place costs. So two things are learnt or measured: how often guesses come true (`engine.calibration`),
and what a step over so many tokens takes (a latency model). `admit` weighs them for all sequences of a step at once:
survivals are sorted, and as many are admitted as make expected tokens ÷ seconds largest; none, if none pays.

Making guesses costs time as well. A drafter that states its cost is asked only as far as that pays too. One that
does not is timed (`engine.payoff`), and a sequence whose drafts save less than they take rests: nobody is asked for
it. Whoever rests is tried again now and then, for a hundredth of the time.

Losslessness. Guesses that were not sampled may be withheld for any reason, see `confirm`. Those that were sampled
must not be withheld for what they turned out to be: `Width.lengths` decides on them before they are drawn, from
what earlier steps taught, and `Width.trim` leaves them alone. Nor does the clock decide on them, so that a seed gives
the same answer again: drafters that sample state their cost, which is then taken as stated, and those that do not are
asked every time. What else is in the batch does decide, since a guess keeps it waiting: the tokens of a seed may differ
from batch to batch where guesses are sampled, their distribution does not.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from collections.abc import Sequence as List
from contextlib import AbstractContextManager, contextmanager
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from decoding.engine.block import Block
from decoding.engine.calibration import Calibration
from decoding.engine.pace import Live, Pace
from decoding.engine.payoff import Payoff

if TYPE_CHECKING:
    from decoding.drafting import Draft, Drafter
    from decoding.engine.sequence import Sequence

MOST_LEVELS = 24
"""Guesses in a row that are asked of a drafter at most."""

LEAST_SURVIVAL = 0.02
"""Guesses that are less likely than this are worth no verification, whatever it costs."""

_GAIN = 1.02  # verification must promise at least this many times plain decoding's tokens per second
_DRAFTING_GAIN = 1.1  # and drafting that takes passes of its own, of which two costs are predicted, so many times
_TRIALS = 0.01  # of the time goes into finding out whether sequences that rest should be drafted for again
_TRIAL_LENGTH = 2
_CONTEXTS = 64  # tokens of context between which costs are not told apart


class LatencyModel(Protocol):
    """What a step costs. `backend.latency` is one, and `backend.live`, which follows the machine."""

    def cost(self, tokens: Any, sequences: Any, context: Any) -> Any:
        """Seconds of a step over `tokens` tokens of `sequences` sequences that have `context` tokens each behind
        them; arrays broadcast."""


class DraftCost(Protocol):
    """What guessing costs. Every `Drafter` is one."""

    def cost(self, levels: int, sequences: int, context: float) -> float:
        """Seconds of so many levels of guesses for so many sequences, see `Drafter.cost`."""


def admit(
    survival: List[List[float]], latency: LatencyModel, context: float, *, sure: float = 0.0, spent: int = 0
) -> list[list[int]]:
    """The guesses worth verifying: per sequence the indices admitted, in order.

    survival: per sequence and guess the chance that it will be committed, a parent's never below its child's, so
    that what is admitted is always a tree; 0 is never admitted. context: committed tokens per sequence. sure, spent:
    guesses that are in the step anyway: tokens expected of them, and how many they are.
    """
    flat = [
        (-chance, i, node) for i, chances in enumerate(survival) for node, chance in enumerate(chances) if chance > 0
    ]
    admitted: list[list[int]] = [[] for _ in survival]
    if not flat:
        return admitted
    flat.sort()  # ties: parents come before their children
    count = len(survival)
    tokens = count + sure + np.concatenate([[0.0], np.cumsum([-entry[0] for entry in flat])])
    seconds = np.asarray(latency.cost(count + spent + np.arange(len(flat) + 1), count, context), dtype=float)
    rate = tokens / seconds
    best = int(rate.argmax())
    if rate[best] >= _GAIN * rate[0]:
        for _, i, node in flat[:best]:
            admitted[i].append(node)
    return [sorted(nodes) for nodes in admitted]


def lengths(
    survival: List[List[float]],
    latency: LatencyModel,
    drafter: DraftCost,
    context: float,
    *,
    sure: float = 0.0,
    spent: int = 0,
) -> tuple[list[int], float]:
    """How far to draft where drafting itself takes time: per sequence the number of levels.

    survival: per sequence and level the chance that the draft holds the text that far. sure, spent: guesses that are
    in the step anyway: tokens expected of them, and how many they are. Also returned is the expected number of tokens
    per second, as a multiple of what it is without this draft.
    """
    count = len(survival)
    flat = sorted((-chance, level, i) for i, chances in enumerate(survival) for level, chance in enumerate(chances))
    verify = np.asarray(latency.cost(count + spent + np.arange(len(flat) + 1), count, context), dtype=float).tolist()
    tokens, chosen, best, best_at = count + sure, [0] * count, (count + sure) / verify[0], 0
    without = best
    deepest, members = 0, set()
    for at, (chance, level, i) in enumerate(flat, start=1):
        tokens -= chance
        deepest = max(deepest, level + 1)
        members.add(i)
        rate = tokens / (verify[at] + drafter.cost(deepest, len(members), context))
        if rate > best:
            best, best_at = rate, at
    if best >= _DRAFTING_GAIN * without:
        for _, level, i in flat[:best_at]:
            chosen[i] = max(chosen[i], level + 1)
    return chosen, best / without


class Remembered:
    """A latency model's answers for steps that differ in their tokens, asked for once per batch size and context.

    fixed: the same, whatever a model that follows the machine has seen of it.
    """

    def __init__(self, latency: LatencyModel) -> None:
        self._live = latency if isinstance(latency, Live) else None
        self._latency = latency.model if isinstance(latency, Live) else latency
        self._known: dict[tuple[int, int], np.ndarray] = {}
        self.fixed = self if self._live is None else Remembered(self._latency)

    def beside(self, sequences: int) -> int:
        """Tokens of prompts and of other sequences that are in the next step. They count as what it brings: where
        arithmetic is what takes the time, a guess keeps them waiting."""
        return 0 if self._live is None else self._live.beside(sequences)

    def cost(self, tokens: Any, sequences: Any, context: Any) -> Any:
        key = int(sequences), int(context) // _CONTEXTS
        tokens = np.asarray(tokens)
        known = self._known.get(key)
        if known is None or len(known) <= tokens.max():
            count = np.arange(1, (int(tokens.max()) // 64 + 1) * 64 + 1)
            seconds = self._latency.cost(count, key[0], (key[1] + 0.5) * _CONTEXTS)
            known = np.concatenate([[0.0], np.asarray(seconds, dtype=float)])
            self._known[key] = known
        return known[tokens] if self._live is None else known[tokens] * self._live.factor(tokens, sequences)


class RememberedDrafts:
    """Likewise a drafter's. factor: by how much they take longer than the drafter says."""

    def __init__(self, drafter: DraftCost) -> None:
        self.drafter = drafter
        self.factor = 1.0
        self._known: dict[tuple[int, int, int], float] = {}

    def cost(self, levels: int, sequences: int, context: float) -> float:
        key = levels, sequences, int(context) // _CONTEXTS
        known = self._known.get(key)
        if known is None:
            known = self._known[key] = self.drafter.cost(levels, sequences, (key[2] + 0.5) * _CONTEXTS)
        return known * self.factor


class Width:
    """Chooses, step by step, how much each sequence drafts and verifies; keeps what it takes to choose.

    clock: what tells the time, in seconds. drafted: seconds that passed inside `drafting`.
    """

    def __init__(
        self,
        latency: LatencyModel,
        calibration: Calibration | None = None,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self.latency = Remembered(latency)
        self.calibration = Calibration() if calibration is None else calibration
        self.clock = clock
        self._payoff = Payoff(clock)
        self._drafts: RememberedDrafts | None = None
        self._pace = Pace()  # of a drafter that states its cost
        self._predicted = 0.0  # seconds that the drafts asked for should take
        self._weighed = 0.0  # what the drafter has weighed itself up to the last step
        self.drafted = 0.0
        self._saved_up = np.inf  # seconds put by for trials; the first one is made at once

    def lengths(self, drafter: Drafter, sequences: List[Sequence], covered: List[List[float]] = ()) -> list[int]:
        """How many levels to ask of the drafter for each sequence; 0 leaves it alone in this step.

        covered: per sequence the chances that guesses of others hold the text's next one, two, … tokens, where there
        are any: what these hold anyway, this drafter is not needed for.
        """
        if not sequences:
            return []
        if self._drafts is None or self._drafts.drafter is not drafter:
            self._drafts = RememberedDrafts(drafter)
        count, context = len(sequences), _context(sequences)
        rooms = [max(0, min(MOST_LEVELS, sequence.room)) for sequence in sequences]
        self._predicted = 0.0
        if self._drafts.cost(1, count, context) <= 0:
            return self._timed(drafter, sequences, rooms, float(self.latency.cost(count, count, context)))
        # Draws may depend on what was drawn before, but not on the clock.
        drawn = any(sequence.params.temperature > 0 for sequence in sequences)
        latency = self.latency.fixed if drawn else self.latency
        self._drafts.factor = 1.0 if drawn else self._pace.factor
        beside = self.latency.beside(count)
        step = float(latency.cost(count + beside, count, context))
        floor = max(LEAST_SURVIVAL, _floor(latency, count, sum(rooms), context, sure=beside, spent=beside))
        survival = [
            self.calibration.levels(s.id, room, drafter.trust) for s, room in zip(sequences, rooms, strict=True)
        ]
        # What others hold is worth this draft only where it is not verified anyway.
        verified = admit(covered, latency, context, sure=beside, spent=beside)
        held = [chances[: len(kept)] for chances, kept in zip(covered, verified, strict=True)]
        for levels, others in zip(survival, held, strict=False):
            levels[: len(others)] = [chance * (1 - other) for chance, other in zip(levels, others, strict=False)]
        for levels in survival:
            while levels and levels[-1] < floor:
                levels.pop()
        sure, spent = beside + sum(map(sum, held)), beside + sum(map(len, held))
        chosen, _ = lengths(survival, latency, self._drafts, context, sure=sure, spent=spent)
        resting = [i for i, length in enumerate(chosen) if not length and rooms[i]]
        if resting:
            trial = _TRIAL_LENGTH
            while trial > 1 and self._drafts.cost(trial, len(resting), context) == np.inf:
                trial -= 1  # the drafter cannot guess so far
            more = float(latency.cost(count + beside + trial * len(resting), count, context)) - step
            if self._trial(self._drafts.cost(trial, len(resting), context) + more, step):
                for i in resting:
                    chosen[i] = min(trial, rooms[i])
        if asked := [length for length in chosen if length]:
            self._predicted = self._drafts.cost(max(asked), len(asked), context) / self._drafts.factor
        return chosen

    @contextmanager
    def drafting(self) -> Iterator[None]:
        """To be put around the making of the drafts that `lengths` asked for: what they take is held against what they
        were predicted to take."""
        began = self.clock()
        yield
        seconds = self.clock() - began
        self.drafted += seconds
        self._pace.saw(seconds, self._predicted)

    def _timed(self, drafter: Drafter, sequences: List[Sequence], rooms: list[int], step: float) -> list[int]:
        """Lengths where the drafter states no cost: all that there is room for, or nothing while it does not pay."""
        price = self._payoff.settle(drafter.weighed - self._weighed)
        self._weighed = drafter.weighed
        resting = {sequence.id for sequence in sequences if not self._payoff.pays(sequence.id)}
        if resting and self._trial(price * len(resting), step):
            resting.clear()
        chosen = [0 if s.id in resting else room for s, room in zip(sequences, rooms, strict=True)]
        self._payoff.asked([s.id for s, length in zip(sequences, chosen, strict=True) if length])
        return chosen

    def _trial(self, price: float, step: float) -> bool:
        """Whether a trial that takes `price` seconds is due, given that a plain step takes `step`."""
        self._saved_up = min(self._saved_up + _TRIALS * step, price)
        if self._saved_up < price:
            return False
        self._saved_up = 0.0
        return True

    def timing(self) -> AbstractContextManager[None]:
        """Counts the time inside as drafting: to be put around everything that a step without drafts is spared."""
        return self._payoff.timing()

    def trim(self, sequences: List[Sequence], drafts: List[Draft]) -> tuple[list[Draft], list[float]]:
        """The drafts without the guesses that do not pay, and the tokens expected of each sequence's step."""
        total = sum(len(draft.block) for draft in drafts)
        if not total:
            for sequence in sequences:
                self._payoff.saved(sequence.id, 0.0)
            return list(drafts), [1.0] * len(drafts)
        count, context = len(drafts), _context(sequences)
        fixed = [draft.probabilities is not None for draft in drafts]
        survival: list[List[float]] = [[] for _ in drafts]
        for i, whole in enumerate(fixed):
            if whole:
                survival[i] = self._judge(sequences[i], drafts[i], 0.0)
        beside = self.latency.beside(count)
        sure = beside + sum(sum(survival[i]) for i, whole in enumerate(fixed) if whole)
        spent = beside + sum(len(drafts[i].block) for i, whole in enumerate(fixed) if whole)
        most = total + beside - spent
        floor = max(LEAST_SURVIVAL, _floor(self.latency, count, most, context, sure=sure, spent=spent))
        for i, whole in enumerate(fixed):
            if not whole and drafts[i].block:
                survival[i] = self._judge(sequences[i], drafts[i], floor)
        open_ = [[] if whole else chances for whole, chances in zip(fixed, survival, strict=True)]
        admitted = admit(open_, self.latency, context, sure=sure, spent=spent)
        places = sum(map(len, admitted))
        first, last = self.latency.cost(np.array([count + spent, count + spent + places]), count, context).tolist()
        kept, expected = [], []
        for i, (sequence, draft, nodes) in enumerate(zip(sequences, drafts, admitted, strict=True)):
            gain = sum(survival[i] if fixed[i] else (survival[i][node] for node in nodes))
            kept.append(draft if fixed[i] or len(nodes) == len(draft.block) else pruned(draft, nodes))
            expected.append(1 + gain)
            if not fixed[i]:  # what its guesses save, at the pace of a step without guesses, less what they take
                taken = (last - first) * len(nodes) / places if places else 0.0
                self._payoff.saved(sequence.id, gain * first / (count + sure) - taken)
        return kept, expected

    def _judge(self, sequence: Sequence, draft: Draft, floor: float) -> list[float]:
        chances, survival = self.calibration.judge(sequence.id, draft, floor)
        self.calibration.watch(sequence.id, draft, chances)
        return survival

    def learn(self, sequence: Sequence, tokens: List[int]) -> None:
        """The sequence gains `tokens`."""
        self.calibration.learn(sequence.id, tokens)

    def forget(self, sequence: Sequence) -> None:
        """The sequence has ended."""
        self.calibration.forget(sequence.id)
        self._payoff.forget(sequence.id)

    def unlearn(self) -> None:
        """Start afresh."""
        self.calibration.unlearn()
        self._payoff.unlearn()
        self._saved_up = np.inf


def pruned(draft: Draft, nodes: List[int]) -> Draft:
    """The part of an unsampled draft that has these nodes; with every node comes its parent."""
    if not nodes:
        return type(draft)()
    block = draft.block
    tokens = [block.tokens[node] for node in nodes]
    parents = None
    if block.parents is not None:
        place = {node: new for new, node in enumerate(nodes)} | {-1: -1}
        parents = [place[block.parents[node]] for node in nodes]
    return type(draft)(
        Block(tokens, parents),
        confidence=None if draft.confidence is None else [draft.confidence[node] for node in nodes],
        sources=None if draft.sources is None else [draft.sources[node] for node in nodes],
    )


def _floor(
    latency: LatencyModel, count: int, guesses: int, context: float, *, sure: float = 0.0, spent: int = 0
) -> float:
    """A survival below which no guess can pay: less than the pace of a step without any, times what the cheapest
    place takes."""
    seconds = latency.cost(count + spent + np.arange(guesses + 1), count, context)
    cheapest = float(np.diff(seconds).min(initial=np.inf))
    return cheapest * (count + sure) / float(seconds[0]) if guesses else 0.0


def _context(sequences: List[Sequence]) -> float:
    """Committed tokens per sequence, on average."""
    return sum(len(sequence.tokens) for sequence in sequences) / max(1, len(sequences))
