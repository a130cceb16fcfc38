"""Whether a wide step goes on: an estimate for what must run for a while to show what it brings.

Guesses that can be judged by the text itself are left to `engine.width`. The iterates of a block, or lookahead's
window, exist only while they are run, so they get the benefit of a prior belief, keep their places for as long as
what they bring pays for them, and are tried again after a while. Nothing here reads a clock.
"""

from __future__ import annotations

from typing import Any

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


def price_ratio(latency: Any, wide: int, narrow: int, sequences: int, context: float) -> float:
    """How many times longer a step takes with `wide` tokens for every sequence than with `narrow` ones."""
    seconds = latency.cost(wide * sequences, sequences, context) / latency.cost(narrow * sequences, sequences, context)
    return float(seconds)
