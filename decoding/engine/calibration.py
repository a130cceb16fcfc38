"""How often guesses come true, learnt from the text as it comes."""

from __future__ import annotations

from collections.abc import Hashable
from collections.abc import Sequence as List
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from decoding.drafting import Draft

_BUCKETS = 12  # of confidence
_DEPTHS = 3  # levels that are told apart where the drafter gives confidences, the last standing for all deeper ones
_LEVELS = 8  # likewise where it does not
_UNKNOWN = 0.6  # the first guess at the chance of a guess about which nobody says anything
_OWN_WEIGHT, _SHARED_WEIGHT = 6.0, 4.0  # of what is known in general, in trials, against what was seen
_MEMORY = 0.97  # what a sequence saw counts this much less with every further trial
_LEAST = 1e-6  # no chance is ever none: only what is watched can turn out better
_NOTHING = (0.0, 0.0)
_LEFT = -2  # no node: the text has left the draft


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

    def judge(self, sequence: int, draft: Draft, floor: float = 0.0) -> tuple[list[float], list[float]]:
        """[guesses] the chance that each guess is right if its parent is, and its survival: the chance that it and all
        above it are right, never above its parent's. Both are 0 below guesses whose survival is less than `floor`:
        what cannot be worth verifying is not looked at."""
        parents = draft.block.parents
        chances: list[float] = []
        survival: list[float] = []
        depth: list[int] = []
        for node in range(len(draft.block)):
            parent = node - 1 if parents is None else parents[node]
            above, level = (1.0, 1) if parent < 0 else (survival[parent], depth[parent] + 1)
            chance = 0.0
            if above >= floor and above:
                prior = _UNKNOWN if draft.confidence is None else draft.confidence[node]
                chance = max(_LEAST, self._guesses.chance(sequence, _kind(draft, node, level), prior))
            elif parents is None:  # nor is anything behind it
                rest = [0.0] * (len(draft.block) - node)
                return chances + rest, survival + rest
            depth.append(level)
            chances.append(chance)
            survival.append(above * chance)
        return chances, survival

    def survival(self, sequence: int, draft: Draft) -> list[float]:
        """[guesses] the chance that each guess and all above it are right."""
        return self.judge(sequence, draft)[1]

    def levels(self, sequence: int, count: int, trust: float = _UNKNOWN) -> list[float]:
        """[count] the chance that a draft's first, first two, … levels hold the text, before there is a draft. trust:
        the chance of a level of which nothing is known."""
        survival, product, chance = [], 1.0, trust
        for level in range(1, count + 1):
            # A level that was never reached is thought to be like the one above it, or it would never be tried.
            chance = self._levels.chance(sequence, min(level, _LEVELS), chance)
            product *= chance
            survival.append(product)
        return survival

    def watch(self, sequence: int, draft: Draft, chances: List[float] | None = None) -> None:
        """Judge a draft's guesses when the text behind them is known; those whose chance of `chances` is 0 are left
        out."""
        children: dict[int, list[int]] = {}
        parents = draft.block.parents
        nodes = range(len(draft.block)) if chances is None else [i for i, chance in enumerate(chances) if chance]
        for node in nodes:
            children.setdefault(node - 1 if parents is None else parents[node], []).append(node)
        if children:
            self._watched.setdefault(sequence, []).append(_Watched(draft, children))

    def learn(self, sequence: int, tokens: List[int]) -> None:
        """The text goes on with `tokens`."""
        every = self._watched.get(sequence)
        if not every:
            return
        left = []
        for watched in every:
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
