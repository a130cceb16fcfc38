"""Whether a wide step goes on: an estimate for what must run for a while to show what it brings.

Guesses that can be judged by the text itself are left to `engine.width`. The iterates of a block, or lookahead's
window, exist only while they are run, so they get the benefit of a prior belief, keep their places for as long as
what they bring pays for them, and are tried again after a while. Nothing here reads a clock; prices may follow one, see
`engine.pace`.
"""

from __future__ import annotations

from typing import Any

import numpy as np

_NEW = 0.1  # weight of the latest step
_FORGETS = 0.005  # how far a step without it moves the estimate back to the belief: a new trial in some 200 steps


class Worth:
    """A fading mean of the tokens that a step brings, starting from a belief."""

    def __init__(self, belief: float) -> None:
        self.belief = belief
        self.mean = belief

    def saw(self, tokens: float) -> None:
        """A step with it brought so many tokens."""
        self.mean += _NEW * (tokens - self.mean)

    def rested(self) -> None:
        """A step went without it."""
        self.mean += _FORGETS * (self.belief - self.mean)


class Reach:
    """Fading means of how far a block's guesses held: the chance that its first, first two … guesses are right.

    belief: the chance of each guess, if those before it are right, until something was seen. most: guesses in a block.
    """

    def __init__(self, belief: float, most: int) -> None:
        self._belief = belief ** np.arange(1, most + 1)
        self._mean = self._belief.copy()

    def saw(self, ran: int, right: int) -> None:
        """Of the `ran` guesses of a step, so many were right before the first wrong one."""
        self._mean[:ran] += _NEW * ((np.arange(ran) < right) - self._mean[:ran])
        self._mean[ran:] += _FORGETS * (self._belief[ran:] - self._mean[ran:])

    def width(self, prices: np.ndarray) -> int:
        """How many guesses make tokens cheapest, by the prices [1 + most] of a step with 0, 1, 2 … of them."""
        chances = np.minimum.accumulate(self._mean)
        return int(np.argmax((1 + np.concatenate([[0.0], np.cumsum(chances)])) / prices))


def prices(latency: Any, most: int, sequences: int, context: float) -> np.ndarray:
    """[1 + most] what a step costs with 0, 1, 2 … guesses for each of so many sequences, in any unit."""
    return np.asarray(latency.cost(np.arange(1, most + 2) * sequences, sequences, context), dtype=float)


def price_ratio(latency: Any, wide: int, narrow: int, sequences: int, context: float) -> float:
    """How many times longer a step takes with `wide` tokens for every sequence than with `narrow` ones."""
    seconds = latency.cost(wide * sequences, sequences, context) / latency.cost(narrow * sequences, sequences, context)
    return float(seconds)
