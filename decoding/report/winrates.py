"""What a judge's verdicts add up to: win rates under both conventions for ties, and with length taken out.

Judges prefer whatever they read first, and longer answers; so every pair is judged in both orders, and the
figures come in three kinds:

    lenient   +1, 0 or −1 for each order, and the sign of the sum: a win and a tie are a win (Skeleton-of-Thought,
              Ning et al. 2024)
    strict    a win only if both orders agree, a tie otherwise (FastChat; Zheng et al. 2023)
    length    the strict figure where both answers would be equally long, by logistic regression (after
              Length-Controlled AlpacaEval, Dubois et al. 2024)

None of them says whether an answer is right: a judge sees how it reads.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from scipy.special import expit

from decoding.report import statistics
from decoding.report.judgments import Judgment, Winner
from decoding.report.statistics import Array, Interval

RIDGE = 0.1
"""Weight of the penalty on both coefficients of the regression: less than half a question's worth of evidence for "no
difference", and enough that a judge who always prefers one side does not send them to infinity."""

Convention = Literal["lenient", "strict"]


@dataclass(frozen=True)
class WinRate:
    """Wins, ties and losses of pairs; net: (wins − losses) ÷ pairs, from −1 to 1."""

    wins: int
    ties: int
    losses: int
    net: Interval


@dataclass(frozen=True)
class Judged:
    """A strategy's answers against plain decoding's in the eyes of one judge.

    judge: its name and prompt. errors: pairs without a verdict, which count nowhere else. length_controlled: net
    win rate at equal length. agreement: share of pairs in which both orders gave the same verdict. first: share of
    the games that had a winner in which it was the answer shown first; far from one half, the judge
    looks at the order more than at the answers. longer: mean length of the answer ÷ mean length of plain
    decoding's, in characters. categories: strict net win rate by category.
    """

    judge: str
    errors: int
    lenient: WinRate
    strict: WinRate
    length_controlled: Interval
    agreement: float
    first: float
    longer: float
    categories: Mapping[str, float]

    @property
    def pairs(self) -> int:
        return self.strict.wins + self.strict.ties + self.strict.losses


@dataclass(frozen=True)
class JudgedPair:
    """One judgment, with what it takes to weigh it. lengths: of both answers, in characters."""

    judgment: Judgment
    category: str
    lengths: tuple[int, int]


def outcome(judgment: Judgment, convention: Convention) -> int:
    """1 if model_1 wins the pair, −1 if model_2 does, 0 for a tie."""
    first, second = _points(judgment.g1_winner), _points(judgment.g2_winner)
    if convention == "strict":
        return first if first == second else 0
    return (first + second > 0) - (first + second < 0)


def judged(judge: str, pairs: Sequence[JudgedPair], estimate: Callable[..., Interval] = statistics.bootstrap) -> Judged:
    """All figures of one strategy and one judge. `estimate` makes the intervals, see `statistics.bootstrap`."""
    sound = [pair for pair in pairs if not pair.judgment.failed]
    strict = np.array([outcome(pair.judgment, "strict") for pair in sound], dtype=np.float64)
    lenient = np.array([outcome(pair.judgment, "lenient") for pair in sound], dtype=np.float64)
    lengths = np.array([pair.lengths for pair in sound], dtype=np.float64).reshape(-1, 2)
    games = [game for pair in sound for game in _shown_first(pair.judgment)]
    return Judged(
        judge=judge,
        errors=len(pairs) - len(sound),
        lenient=_win_rate(lenient, estimate),
        strict=_win_rate(strict, estimate),
        length_controlled=estimate(length_controlled, strict, length_difference(lengths[:, 0], lengths[:, 1])),
        agreement=_share(pair.judgment.g1_winner == pair.judgment.g2_winner for pair in sound),
        first=_share(games),
        longer=float(statistics.ratio_of_sums(lengths[:, 0], lengths[:, 1])),
        categories=_by_category(sound),
    )


def length_difference(ours: Array, theirs: Array) -> Array:
    """How much longer our answers are, [questions]: tanh of the difference in standard deviations, so that a few very
    long answers do not decide the slope."""
    difference = ours - theirs
    scale = float(np.std(difference)) if difference.size else 0.0
    scaled: Array = np.tanh(difference / scale) if scale > 0 else np.zeros_like(difference)
    return scaled


def length_controlled(outcomes: Array, longer: Array) -> Array:
    """Net win rate at equal length: outcomes (−1, 0, 1) and `length_difference`, `[..., questions]` → `[...]`.

    Fits P(win) = σ(a + b·longer), a tie being half a win, by Newton's method with a weak ridge penalty, and returns
    2σ(a) − 1. If all answers were longer by as much, a and b cannot be told apart, and the penalty decides: with
    length differences that hardly vary, believe the interval and not the estimate.
    """
    wins = (outcomes + 1) / 2
    a, b = np.zeros(outcomes.shape[:-1]), np.zeros(outcomes.shape[:-1])
    for _ in range(40):
        p = expit(a[..., None] + b[..., None] * longer)
        weight = p * (1 - p)
        slope_a = np.sum(wins - p, axis=-1) - RIDGE * a
        slope_b = np.sum((wins - p) * longer, axis=-1) - RIDGE * b
        aa = np.sum(weight, axis=-1) + RIDGE
        ab = np.sum(weight * longer, axis=-1)
        bb = np.sum(weight * longer**2, axis=-1) + RIDGE
        determinant = aa * bb - ab**2
        # Steps are bounded: far from the solution the curve is flat, and a full step would leave it behind.
        step_a = np.clip((bb * slope_a - ab * slope_b) / determinant, -2, 2)
        step_b = np.clip((aa * slope_b - ab * slope_a) / determinant, -2, 2)
        a, b = a + step_a, b + step_b
        if max(np.max(np.abs(step_a), initial=0), np.max(np.abs(step_b), initial=0)) < 1e-8:
            break
    net: Array = np.asarray(2 * expit(a) - 1)
    return net


def _win_rate(outcomes: Array, estimate: Callable[..., Interval]) -> WinRate:
    wins, losses = int(np.sum(outcomes > 0)), int(np.sum(outcomes < 0))
    return WinRate(wins, outcomes.size - wins - losses, losses, estimate(statistics.mean, outcomes))


def _points(winner: Winner) -> int:
    return {"model_1": 1, "model_2": -1}.get(winner, 0)


def _shown_first(judgment: Judgment) -> list[bool]:
    """For each game that had a winner: whether that was the answer shown first."""
    games = ((judgment.g1_winner, "model_1"), (judgment.g2_winner, "model_2"))
    return [winner == first for winner, first in games if winner in ("model_1", "model_2")]


def _by_category(pairs: Iterable[JudgedPair]) -> dict[str, float]:
    outcomes: dict[str, list[int]] = {}
    for pair in pairs:
        outcomes.setdefault(pair.category, []).append(outcome(pair.judgment, "strict"))
    return {category: float(np.mean(values)) for category, values in outcomes.items()}


def _share(values: Iterable[bool]) -> float:
    found = list(values)
    return sum(found) / len(found) if found else float("nan")
