"""Predictions held against what runs: a machine may be busier or cooler than it was when its steps were measured.

Whether guessing pays is a matter of ratios, and a latency model that is a fifth too high for plain steps alone makes
drafts look a fifth better than they are. So what the engine's steps take is compared with what they should have taken,
for plain and for wider steps apart, and later predictions follow.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from decoding.engine.width import LatencyModel

_RECENT = 31  # observations whose median counts, so that a pause of the machine is one of them
_LEAST = 5  # observations before any count


class Pace:
    """How many times longer than predicted something takes here and now. factor: the median of what was seen lately; 1
    until there is enough of it."""

    def __init__(self) -> None:
        self.factor = 1.0
        self._seen: deque[float] = deque(maxlen=_RECENT)

    def saw(self, seconds: float, predicted: float) -> None:
        """It took so long, and should have taken `predicted`; 0 and infinity are no predictions."""
        if 0 < predicted < math.inf:
            self._seen.append(seconds / predicted)
            if len(self._seen) >= _LEAST:
                self.factor = sorted(self._seen)[len(self._seen) // 2]


class Live:
    """A latency model that follows the machine.

    model: what was measured once; it stays as it is. beside: says how many tokens the next step holds beside those of
        so many sequences, see `Engine.beside`.
    """

    def __init__(self, model: LatencyModel, beside: Callable[[int], int] = lambda sequences: 0) -> None:
        self.model = model
        self.beside = beside
        self._plain, self._wide = Pace(), Pace()

    def cost(self, tokens: Any, sequences: Any, context: Any) -> Any:
        """Seconds of a step, see `LatencyModel.cost`, at the pace of the latest steps."""
        seconds = self.model.cost(tokens, sequences, context) * self.factor(tokens, sequences)
        return seconds if np.ndim(seconds) else float(seconds)

    def factor(self, tokens: Any, sequences: Any) -> Any:
        """By how much steps are longer than the model says: those with guesses in them, and those without."""
        return np.where(np.asarray(tokens) > sequences, self._wide.factor, self._plain.factor)

    def saw(self, tokens: int, sequences: int, context: float, seconds: float) -> None:
        """A step of `tokens` tokens in all, of sequences that decode, took so long."""
        pace = self._wide if tokens > sequences else self._plain
        pace.saw(seconds, float(self.model.cost(tokens, sequences, context)))
