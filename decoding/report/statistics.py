"""How sure the figures are: paired bootstrap intervals, tests, detectable differences, and drift of the machine.

Pure functions on arrays with one entry per question. Questions are the sampling unit throughout: repeats of one
question are averaged first, because they share its difficulty and are no new evidence about other questions.
Whatever is random takes a seed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

import numpy as np
import numpy.typing as npt
from scipy import stats

Array: TypeAlias = npt.NDArray[np.float64]
Values: TypeAlias = Sequence[float] | Array
Statistic: TypeAlias = Callable[..., Array]
"""Columns `[..., questions]` → one value per leading index `[...]`."""
Method = Literal["bca", "percentile"]

RESAMPLES = 9999
"""Enough that an end of a 95 % interval moves by about a hundredth of its width from seed to seed."""

FEWEST = 5
"""Questions below which no interval is given: resampling so few says more about them than about others."""

_CHUNK = 2_000_000  # entries of one block of resamples: bounds memory at any number of questions


@dataclass(frozen=True)
class Interval:
    """An estimate with its confidence interval; `low` and `high` are nan where the data allow none."""

    estimate: float
    low: float
    high: float
    confidence: float = 0.95

    def contains(self, value: float) -> bool:
        return self.low <= value <= self.high


def mean(values: Array) -> Array:
    """Mean over questions."""
    return np.asarray(np.mean(values, axis=-1))


def ratio_of_sums(numerator: Array, denominator: Array) -> Array:
    """Σ numerator ÷ Σ denominator over questions; nan where the denominator sums to 0. Long answers weigh more."""
    return _divide(np.sum(numerator, axis=-1), np.sum(denominator, axis=-1))


def geometric_mean_ratio(numerator: Array, denominator: Array) -> Array:
    """exp(mean of ln(numerator ÷ denominator)) over questions: every question weighs the same, and swapping the
    two inverts the result. nan where a value is not positive."""
    with np.errstate(divide="ignore", invalid="ignore"):
        logs = np.log(numerator) - np.log(denominator)
        return np.asarray(np.exp(np.where(np.isfinite(logs), logs, np.nan).mean(axis=-1)))


def ratio_of_rates(numerator: Array, counts: Array, denominator: Array, other_counts: Array) -> Array:
    """(Σ numerator ÷ Σ counts) ÷ (Σ denominator ÷ Σ other_counts): a ratio of times per token."""
    return _divide(ratio_of_sums(numerator, counts), ratio_of_sums(denominator, other_counts))


def _divide(above: Array, below: Array) -> Array:
    return np.asarray(np.divide(above, below, out=np.full(np.shape(below), np.nan), where=below > 0))


def bootstrap(
    statistic: Statistic,
    *columns: Values,
    method: Method = "bca",
    confidence: float = 0.95,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> Interval:
    """Bootstrap interval of `statistic(*columns)`; questions are drawn with replacement, all columns together (paired).

    "percentile" takes the quantiles of the resampled statistic; "bca" corrects them for bias and skewness (Efron
    1987), with the acceleration from the jackknife. Below `FEWEST` questions there is no interval; a statistic that no
    resample changes has an interval of width 0.
    """
    data = [np.asarray(column, dtype=np.float64) for column in columns]
    count = data[0].size
    if any(column.shape != (count,) for column in data):
        raise ValueError("columns must be one-dimensional and of one length")
    if not count:
        return Interval(np.nan, np.nan, np.nan, confidence)
    estimate = float(statistic(*data))
    if count < FEWEST or not np.isfinite(estimate):
        return Interval(estimate, np.nan, np.nan, confidence)
    rng = np.random.default_rng(seed)
    drawn = np.concatenate(
        [
            statistic(*(column[picks] for column in data))
            for picks in (rng.integers(0, count, (rows, count)) for rows in _blocks(resamples, count))
        ]
    )
    if not np.isfinite(drawn).all():
        return Interval(estimate, np.nan, np.nan, confidence)
    if np.ptp(drawn) <= 1e-12 * abs(estimate):
        return Interval(estimate, estimate, estimate, confidence)
    tails = np.array([(1 - confidence) / 2, (1 + confidence) / 2])
    if method == "bca":
        tails = _bca_tails(tails, estimate, drawn, _jackknife(statistic, data))
    low, high = np.quantile(drawn, tails)
    return Interval(estimate, float(low), float(high), confidence)


def _blocks(rows: int, width: int) -> Iterator[int]:
    size = max(1, _CHUNK // width)
    while rows > 0:
        yield min(size, rows)
        rows -= size


def _jackknife(statistic: Statistic, data: Sequence[Array]) -> Array:
    """The statistic with each question left out in turn, [questions]."""
    count = data[0].size
    kept = np.arange(count - 1)
    values, start = [], 0
    for rows in _blocks(count, count):
        left_out = np.arange(start, start + rows)[:, None]
        picks = kept + (kept >= left_out)  # [rows, questions - 1]
        values.append(statistic(*(column[picks] for column in data)))
        start += rows
    return np.concatenate(values)


def _bca_tails(tails: Array, estimate: float, drawn: Array, jackknife: Array) -> Array:
    """The quantiles of the resampled statistic that stand for `tails` once bias and skewness are corrected."""
    below = np.mean(drawn < estimate) + np.mean(drawn == estimate) / 2
    bias = stats.norm.ppf(np.clip(below, 1 / (drawn.size + 1), drawn.size / (drawn.size + 1)))
    spread = jackknife.mean() - jackknife
    scale = np.sum(spread**2) ** 1.5
    acceleration = np.sum(spread**3) / (6 * scale) if np.isfinite(scale) and scale > 0 else 0.0
    shifted = bias + stats.norm.ppf(tails)
    corrected: Array = stats.norm.cdf(bias + shifted / (1 - acceleration * shifted))
    return corrected


def sign_flip_p(differences: Values, *, resamples: int = RESAMPLES, seed: int = 0) -> float:
    """Two-sided p-value of "the paired differences are symmetric around 0", by flipping their signs.

    Exact (all 2ⁿ sign patterns) up to 13 pairs, random patterns beyond. For times, pass ln(plain ÷ other).
    """
    values = np.asarray(differences, dtype=np.float64)
    if not values.size or not np.isfinite(values).all():
        return float("nan")
    observed = abs(values.mean())
    tolerance = 1e-12 * max(observed, 1e-300)  # equal sums may differ in the last bit
    if values.size <= 13:
        patterns = (np.arange(2**values.size)[:, None] >> np.arange(values.size)) & 1
        return float(np.mean(np.abs((1 - 2 * patterns) @ values / values.size) >= observed - tolerance))
    rng = np.random.default_rng(seed)
    extreme = 0
    for rows in _blocks(resamples, values.size):
        signs = 1 - 2 * rng.integers(0, 2, (rows, values.size))
        extreme += int(np.sum(np.abs(signs @ values / values.size) >= observed - tolerance))
    return (extreme + 1) / (resamples + 1)


def holm(p_values: Sequence[float]) -> list[float]:
    """p-values adjusted for being read together (Holm 1979): the chance of any false alarm stays below the level.

    nan entries (tests that could not be made) stay nan and do not count.
    """
    adjusted = [float("nan")] * len(p_values)
    ranked = sorted((p, i) for i, p in enumerate(p_values) if np.isfinite(p))
    highest = 0.0
    for rank, (p, i) in enumerate(ranked):
        highest = max(highest, min(1.0, (len(ranked) - rank) * p))
        adjusted[i] = highest
    return adjusted


def minimum_detectable_ratio(log_ratios: Values, *, power: float = 0.8, level: float = 0.05) -> float:
    """The smallest speed-up that a run of this size and scatter would find with probability `power`.

    log_ratios: ln(plain ÷ other) per question. exp((t₁₋level/₂ + t_power)·s/√n), s their standard deviation: the
    two-sided paired t-test's usual approximation. nan below two questions.
    """
    values = np.asarray(log_ratios, dtype=np.float64)
    if values.size < 2:
        return float("nan")
    quantiles = stats.t.ppf(1 - level / 2, values.size - 1) + stats.t.ppf(power, values.size - 1)
    return float(np.exp(quantiles * np.std(values, ddof=1) / np.sqrt(values.size)))


@dataclass(frozen=True)
class Drift:
    """Slow change of the machine's speed. change: relative change of the time per token from start to end of the run
    (0.1 is 10 % slower); p_value: chance of such an ordering without drift; flagged: both are out of the ordinary."""

    change: float
    p_value: float
    flagged: bool


def drift(
    times: Values, per_token: Values, groups: Sequence[object] = (), *, threshold: float = 0.05, level: float = 0.01
) -> Drift:
    """Whether the interleaved baseline got slower or faster while the run went on.

    times: when each answer was made, in any unit; per_token: the baseline's seconds per token there; groups: the
    question of each entry, whose own level is taken out if the repeats of a question lie far apart (close together,
    they would take the drift out with it). The change is the Theil–Sen slope of ln(per_token) times the run's length,
    the p-value Kendall's: neither is moved by a few outliers.
    """
    time, logs = np.asarray(times, dtype=np.float64), np.log(np.asarray(per_token, dtype=np.float64))
    members = _members(groups)
    if members and np.median([np.ptp(time[rows]) for rows in members]) > np.ptp(time) / 4:
        logs = _centered(logs, members)
    if time.size < 8 or np.ptp(time) == 0 or np.ptp(logs) == 0:
        return Drift(0.0, 1.0, False)
    slope = float(stats.theilslopes(logs, time)[0])
    change = float(np.expm1(slope * np.ptp(time)))
    p_value = float(stats.kendalltau(time, logs).pvalue)
    return Drift(change, p_value, abs(change) > threshold and p_value < level)


def outliers(values: Values, groups: Sequence[object] = (), *, cutoff: float = 5.0, least: float = 0.15) -> list[int]:
    """Positions of measurements far from the rest: more than `cutoff` robust standard deviations (1.4826 × the median
    absolute deviation) of ln(value) from the median, and by at least the factor 1 + `least`, so that a quiet run is
    not blamed for its quietness. groups: the question of each entry, whose own level is taken
    out where it was repeated.
    """
    logs = np.log(np.asarray(values, dtype=np.float64))
    if logs.size < 8:
        return []
    members = _members(groups)
    distance = np.abs(_centered(logs, members) if members else logs - np.median(logs))
    limit = max(cutoff * 1.4826 * float(np.median(distance)), float(np.log1p(least)))
    return [int(i) for i in np.flatnonzero(distance > limit)]


def _members(groups: Sequence[object]) -> list[list[int]]:
    """The positions of each group; none at all unless every group has at least two."""
    members: dict[object, list[int]] = {}
    for i, group in enumerate(groups):
        members.setdefault(group, []).append(i)
    return list(members.values()) if members and min(map(len, members.values())) > 1 else []


def _centered(logs: Array, members: Sequence[Sequence[int]]) -> Array:
    """Each entry minus its group's median."""
    centered: Array = logs.copy()
    for rows in members:
        centered[rows] -= np.median(logs[rows])
    return centered
