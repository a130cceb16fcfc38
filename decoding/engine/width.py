"""How many guesses to verify: as many as raise the expected tokens per second.

A guess is worth a place in the step if the chance that it and all guesses above it are right (its survival) pays
for what the place costs. So two things are learnt or measured: how often guesses come true (`Calibration`), and
what a step over so many tokens takes (a latency model). `admit` weighs them for all sequences of a step at once:
survivals are sorted, and as many are admitted as make expected tokens ÷ seconds largest; none, if none pays.

Losslessness. Guesses that were not sampled may be withheld for any reason, see `confirm`. Those that were sampled
must not be withheld for what they turned out to be: `Width.lengths` decides on them before they are drawn, from
what earlier steps taught, and `Width.trim` leaves them alone.

Nothing here looks at a clock: the same requests get the same widths.
"""

from __future__ import annotations

from collections.abc import Hashable
from collections.abc import Sequence as List
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from decoding.engine.block import Block

if TYPE_CHECKING:
    from decoding.drafting import Draft, Drafter
    from decoding.engine.sequence import Sequence

MOST_LEVELS = 24
"""Guesses in a row that are asked of a drafter at most."""

_GAIN = 1.02  # speculation must promise at least this many times plain decoding's tokens per second
_BUCKETS = 12  # of confidence
_DEPTHS = 3  # levels that are told apart where the drafter gives confidences, the last standing for all deeper ones
_LEVELS = 8  # likewise where it does not
_UNKNOWN = 0.6  # the first guess at the chance of a guess about which nobody says anything
_OWN_WEIGHT, _SHARED_WEIGHT = 6.0, 4.0  # of what is known in general, in trials, against what was seen
_MEMORY = 0.97  # what a sequence saw counts this much less with every further trial
_PROBES = (8, 64)  # steps without a draft until one is made to see whether it would pay now: at first, at most
_PROBE_LENGTH = 2
_RESTS = (16, 4)  # after so many steps in which no guess was worth verifying, ask only in every so-manieth
_CONTEXTS = 64  # tokens of context between which costs are not told apart
_NOTHING = (0.0, 0.0)
_LEFT = -2  # no node: the text has left the draft


class LatencyModel(Protocol):
    """What a step costs. `backend.latency` is one."""

    def cost(self, tokens: Any, sequences: Any, context: Any) -> Any:
        """Seconds of a step over `tokens` tokens of `sequences` sequences that have `context` tokens each behind
        them; arrays broadcast."""


class Rates:
    """How often trials of each kind succeed: of one sequence, held against what was seen in all of them."""

    def __init__(self) -> None:
        self._shared: dict[Hashable, list[float]] = {}  # hits, trials
        self._own: dict[int, dict[Hashable, list[float]]] = {}

    def chance(self, sequence: int, kind: Hashable, prior: float) -> float:
        """The estimated rate; `prior` is believed as long as little was seen."""
        hits, trials = self._shared.get(kind, _NOTHING)
        rate = (hits + _SHARED_WEIGHT * prior) / (trials + _SHARED_WEIGHT)
        own = self._own.get(sequence)
        if own is None or kind not in own:
            return rate
        hits, trials = own[kind]
        return (hits + _OWN_WEIGHT * rate) / (trials + _OWN_WEIGHT)

    def learn(self, sequence: int, kind: Hashable, success: bool) -> None:
        """Count a trial."""
        shared = self._shared.setdefault(kind, [0.0, 0.0])
        if shared[1] >= 400:  # half of it is forgotten, so that what is new goes on counting
            shared[0], shared[1] = shared[0] / 2, shared[1] / 2
        shared[0] += success
        shared[1] += 1
        own = self._own.setdefault(sequence, {}).setdefault(kind, [0.0, 0.0])
        own[0] = own[0] * _MEMORY + success
        own[1] = own[1] * _MEMORY + 1

    def forget(self, sequence: int) -> None:
        """The sequence has ended; what it taught about all stays."""
        self._own.pop(sequence, None)


@dataclass
class _Watched:
    """A draft whose guesses are held against the text as it comes, verified or not.

    children: of each node (-1: the root), the nodes below it. at: the node that the text has reached.
    """

    draft: Draft
    children: dict[int, list[int]]
    at: int = -1
    depth: int = 0


class Calibration:
    """What confidences are worth: how often guesses of each kind turned out to be the text's next token.

    Every draft is kept until the text has left it, and all of its guesses are judged by the text itself. So a
    guess that was withheld teaches as much as one that was verified, and plain decoding is enough to notice
    that speculation would pay again.
    """

    def __init__(self) -> None:
        self.unlearn()

    def unlearn(self) -> None:
        """Start afresh."""
        self._guesses = Rates()
        self._levels = Rates()
        self._watched: dict[int, list[_Watched]] = {}

    def chances(self, sequence: int, draft: Draft) -> list[float]:
        """[guesses] the chance that each guess is right if its parent is."""
        parents = draft.block.parents
        chances: list[float] = []
        depth: list[int] = []
        for node in range(len(draft.block)):
            parent = node - 1 if parents is None else parents[node]
            depth.append(1 if parent < 0 else depth[parent] + 1)
            prior = _UNKNOWN if draft.confidence is None else draft.confidence[node]
            chances.append(self._guesses.chance(sequence, _kind(draft, node, depth[node]), prior))
        return chances

    def survival(self, sequence: int, draft: Draft) -> list[float]:
        """[guesses] the chance that each guess and all above it are right; never above its parent's."""
        survival = self.chances(sequence, draft)
        parents = draft.block.parents
        for node in range(len(survival)):
            parent = node - 1 if parents is None else parents[node]
            if parent >= 0:
                survival[node] *= survival[parent]
        return survival

    def levels(self, sequence: int, count: int) -> list[float]:
        """[count] the chance that a draft's first, first two, … levels hold the text, before there is a draft."""
        survival, product = [], 1.0
        for level in range(1, count + 1):
            product *= self._levels.chance(sequence, min(level, _LEVELS), _UNKNOWN)
            survival.append(product)
        return survival

    def watch(self, sequence: int, draft: Draft) -> None:
        """Judge a draft's guesses when the text behind them is known."""
        if not draft.block:
            return
        children: dict[int, list[int]] = {}
        parents = draft.block.parents
        for node in range(len(draft.block)):
            children.setdefault(node - 1 if parents is None else parents[node], []).append(node)
        self._watched.setdefault(sequence, []).append(_Watched(draft, children))

    def learn(self, sequence: int, tokens: List[int]) -> None:
        """The text goes on with `tokens`."""
        left = []
        for watched in self._watched.get(sequence, ()):
            draft = watched.draft
            for token in tokens:
                guesses = watched.children.get(watched.at, ())
                watched.depth += 1
                watched.at = _LEFT
                for node in guesses:
                    right = watched.at == _LEFT and draft.block.tokens[node] == token
                    self._guesses.learn(sequence, _kind(draft, node, watched.depth), right)
                    if right:
                        watched.at = node
                if guesses:
                    self._levels.learn(sequence, min(watched.depth, _LEVELS), watched.at != _LEFT)
                if watched.at == _LEFT:
                    break
            if watched.at in watched.children:
                left.append(watched)
        self._watched[sequence] = left

    def forget(self, sequence: int) -> None:
        """The sequence has ended."""
        self._watched.pop(sequence, None)
        self._guesses.forget(sequence)
        self._levels.forget(sequence)


def _kind(draft: Draft, node: int, depth: int) -> Hashable:
    """Guesses that are counted together: of the same source, depth and confidence, about."""
    source = "" if draft.sources is None else draft.sources[node]
    if draft.confidence is None:
        return source, min(depth, _LEVELS)
    return source, min(depth, _DEPTHS), min(int(draft.confidence[node] * _BUCKETS), _BUCKETS - 1)


def admit(
    survival: List[List[float]], latency: LatencyModel, context: float, *, sure: float = 0.0, spent: int = 0
) -> list[list[int]]:
    """The guesses worth verifying: per sequence the indices admitted, in order.

    survival: per sequence and guess the chance that it will be committed, a parent's never below its child's, so
    that what is admitted is always a tree. context: committed tokens per sequence. sure, spent: guesses that are in
    the step anyway: tokens expected of them, and how many they are.
    """
    flat = [(-chance, i, node) for i, chances in enumerate(survival) for node, chance in enumerate(chances)]
    flat.sort()  # ties: parents come before their children
    count = len(survival)
    tokens = count + sure + np.concatenate([[0.0], np.cumsum([-entry[0] for entry in flat])])
    seconds = np.asarray(latency.cost(count + spent + np.arange(len(flat) + 1), count, context), dtype=float)
    rate = tokens / seconds
    best = int(rate.argmax())
    admitted: list[list[int]] = [[] for _ in survival]
    if rate[best] >= _GAIN * rate[0]:
        for _, i, node in flat[:best]:
            admitted[i].append(node)
    return [sorted(nodes) for nodes in admitted]


def lengths(
    survival: List[List[float]], latency: LatencyModel, drafter: Drafter, context: float
) -> tuple[list[int], float]:
    """How far to draft where drafting itself takes time: per sequence the number of levels.

    survival: per sequence and level the chance that the draft holds the text that far. Also returned is the expected
    number of tokens per second, as a multiple of plain decoding's.
    """
    count = len(survival)
    flat = sorted((-chance, level, i) for i, chances in enumerate(survival) for level, chance in enumerate(chances))
    verify = np.asarray(latency.cost(count + np.arange(len(flat) + 1), count, context), dtype=float)
    tokens, chosen, best, best_at = float(count), [0] * count, count / float(verify[0]), 0
    plain = best
    deepest, members = 0, set()
    for at, (chance, level, i) in enumerate(flat, start=1):
        tokens -= chance
        deepest = max(deepest, level + 1)
        members.add(i)
        rate = tokens / (float(verify[at]) + drafter.cost(deepest, len(members), context))
        if rate > best:
            best, best_at = rate, at
    if best >= _GAIN * plain:
        for _, level, i in flat[:best_at]:
            chosen[i] = max(chosen[i], level + 1)
    return chosen, best / plain


class Remembered:
    """A latency model's answers for steps that differ in their tokens, asked for once per batch size and context."""

    def __init__(self, latency: LatencyModel) -> None:
        self._latency = latency
        self._known: dict[tuple[int, int], np.ndarray] = {}

    def cost(self, tokens: Any, sequences: Any, context: Any) -> Any:
        key = int(sequences), int(context) // _CONTEXTS
        tokens = np.asarray(tokens)
        known = self._known.get(key)
        if known is None or len(known) <= tokens.max():
            count = np.arange(1, (int(tokens.max()) // 64 + 1) * 64 + 1)
            seconds = self._latency.cost(count, key[0], (key[1] + 0.5) * _CONTEXTS)
            known = np.concatenate([[0.0], np.asarray(seconds, dtype=float)])
            self._known[key] = known
        return known[tokens]


@dataclass
class Width:
    """Chooses, step by step, how much each sequence drafts and verifies; keeps what it takes to choose."""

    latency: LatencyModel
    calibration: Calibration = field(default_factory=Calibration)
    _waits: dict[int, tuple[int, int]] = field(default_factory=dict)  # steps to the next probe, and the wait after it
    _idle: dict[int, int] = field(default_factory=dict)  # steps since a guess was last verified

    def __post_init__(self) -> None:
        self.latency = Remembered(self.latency)

    def lengths(self, drafter: Drafter, sequences: List[Sequence]) -> list[int]:
        """How many levels to ask of the drafter for each sequence."""
        rooms = [max(0, min(MOST_LEVELS, sequence.room)) for sequence in sequences]
        context = _context(sequences)
        if drafter.cost(1, len(sequences), context) <= 0:
            return [0 if self._rests(sequence.id) else room for sequence, room in zip(sequences, rooms, strict=True)]
        survival = [self.calibration.levels(s.id, room) for s, room in zip(sequences, rooms, strict=True)]
        chosen, _ = lengths(survival, self.latency, drafter, context)
        return [self._probe(s.id, n, room) for s, n, room in zip(sequences, chosen, rooms, strict=True)]

    def _rests(self, sequence: int) -> bool:
        """Whether to do without a draft: even a cheap one takes some of the host's time."""
        idle = self._idle.get(sequence, 0)
        return idle >= _RESTS[0] and idle % _RESTS[1] != 0

    def _probe(self, sequence: int, length: int, room: int) -> int:
        """The length, or a short one now and then if there has been none for a while."""
        left, wait = self._waits.get(sequence, (_PROBES[0], _PROBES[0]))
        if length:
            self._waits.pop(sequence, None)
        elif left <= 1:
            wait = min(2 * wait, _PROBES[1])
            self._waits[sequence] = (wait, wait)
            return min(_PROBE_LENGTH, room)
        else:
            self._waits[sequence] = (left - 1, wait)
        return length

    def trim(self, sequences: List[Sequence], drafts: List[Draft]) -> tuple[list[Draft], list[float]]:
        """The drafts without the guesses that do not pay, and the tokens expected of each sequence's step."""
        survival = [self.calibration.survival(s.id, draft) for s, draft in zip(sequences, drafts, strict=True)]
        fixed = [draft.probabilities is not None for draft in drafts]
        admitted = admit(
            [[] if whole else chances for whole, chances in zip(fixed, survival, strict=True)],
            self.latency,
            _context(sequences),
            sure=sum(sum(chances) for whole, chances in zip(fixed, survival, strict=True) if whole),
            spent=sum(len(draft.block) for whole, draft in zip(fixed, drafts, strict=True) if whole),
        )
        kept, expected = [], []
        for whole, sequence, draft, nodes, chances in zip(fixed, sequences, drafts, admitted, survival, strict=True):
            self.calibration.watch(sequence.id, draft)
            kept.append(draft if whole or len(nodes) == len(draft.block) else pruned(draft, nodes))
            self._idle[sequence.id] = 0 if kept[-1].block else self._idle.get(sequence.id, 0) + 1
            expected.append(1 + sum(chances if whole else (chances[node] for node in nodes)))
        return kept, expected

    def learn(self, sequence: Sequence, tokens: List[int]) -> None:
        """The sequence gains `tokens`."""
        self.calibration.learn(sequence.id, tokens)

    def forget(self, sequence: Sequence) -> None:
        """The sequence has ended."""
        self.calibration.forget(sequence.id)
        self._waits.pop(sequence.id, None)
        self._idle.pop(sequence.id, None)

    def unlearn(self) -> None:
        """Start afresh."""
        self.calibration.unlearn()
        self._waits.clear()
        self._idle.clear()


def pruned(draft: Draft, nodes: List[int]) -> Draft:
    """The part of an unsampled draft that has these nodes; with every node comes its parent."""
    block = draft.block
    tokens = [block.tokens[node] for node in nodes]
    parents = None
    if block.parents is not None:
        place = {node: new for new, node in enumerate(nodes)} | {-1: -1}
        parents = [place[block.parents[node]] for node in nodes]
    return type(draft)(
        Block(tokens, parents if tokens else None),
        confidence=None if draft.confidence is None else [draft.confidence[node] for node in nodes],
        sources=None if draft.sources is None else [draft.sources[node] for node in nodes],
    )


def _context(sequences: List[Sequence]) -> float:
    """Committed tokens per sequence, on average."""
    return sum(len(sequence.tokens) for sequence in sequences) / max(1, len(sequences))
