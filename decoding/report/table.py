"""The headline table as text cells: terminal, Markdown and page show the same columns in the same words."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from decoding.report.compared import RunComparison
from decoding.report.statistics import Interval
from decoding.report.summary import Comparison, StrategySummary, Summary

NOTHING = "–"
"""Shown where a figure does not exist: plain decoding has no speed-up over itself."""


@dataclass(frozen=True)
class Column:
    """One column: `key` names its definition, `title` heads it, `weight` says how soon a narrow table drops it (the
    highest first, 0 never), `cell` is the text of one row and `value` what to sort by."""

    key: str
    title: str
    weight: int
    cell: Callable[[StrategySummary], str]
    value: Callable[[StrategySummary], float]


def number(value: float | None, digits: int = 2) -> str:
    """`value` with `digits` decimals; a dash for nan and None."""
    return NOTHING if value is None or not math.isfinite(value) else f"{value:.{digits}f}"


def significant(value: float | None) -> str:
    """`value` with three significant digits, never in exponent form."""
    if value is None or not math.isfinite(value):
        return NOTHING
    if value == 0:
        return "0"
    return f"{value:.{max(0, 2 - math.floor(math.log10(abs(value))))}f}"


def ratio(interval: Interval | None) -> str:
    """`1.52× [1.31, 1.77]`; without brackets where there is no interval."""
    if interval is None or not math.isfinite(interval.estimate):
        return NOTHING
    if not math.isfinite(interval.low):
        return f"{interval.estimate:.2f}×"
    return f"{interval.estimate:.2f}× [{interval.low:.2f}, {interval.high:.2f}]"


def signed(interval: Interval) -> str:
    """`+0.12 [-0.05, +0.30]`; without brackets where there is no interval."""
    if not math.isfinite(interval.estimate):
        return NOTHING
    if not math.isfinite(interval.low):
        return f"{interval.estimate:+.2f}"
    return f"{interval.estimate:+.2f} [{interval.low:+.2f}, {interval.high:+.2f}]"


def mebibytes(value: int | None) -> str:
    return NOTHING if value is None else f"{value / 2**20:,.0f} MiB"


def _compared(get: Callable[[Comparison], float]) -> Callable[[StrategySummary], float]:
    return lambda row: get(row.comparison) if row.comparison else math.nan


def _positive(value: float) -> float:
    """A backend that reports no passes has none to divide by: a dash, not a zero."""
    return value if value > 0 else math.nan


COLUMNS: tuple[Column, ...] = (
    Column("seconds", "s per answer", 0, lambda r: significant(r.seconds), lambda r: r.seconds),
    Column(
        "speedup",
        "speed-up",
        0,
        lambda r: ratio(r.comparison.speedup if r.comparison else None),
        _compared(lambda c: c.speedup.estimate),
    ),
    Column(
        "speedup_geometric",
        "geometric mean",
        4,
        lambda r: ratio(r.comparison.speedup_geometric if r.comparison else None),
        _compared(lambda c: c.speedup_geometric.estimate),
    ),
    Column(
        "speedup_per_token",
        "speed-up per token",
        6,
        lambda r: ratio(r.comparison.speedup_per_token if r.comparison else None),
        _compared(lambda c: c.speedup_per_token.estimate),
    ),
    Column(
        "p_value",
        "p",
        9,
        lambda r: number(r.comparison.p_value if r.comparison else None, 4),
        _compared(lambda c: c.p_value),
    ),
    Column("tokens", "tokens", 1, lambda r: number(r.tokens, 0), lambda r: r.tokens),
    Column("forwards", "forwards", 5, lambda r: number(_positive(r.forwards), 0), lambda r: _positive(r.forwards)),
    Column(
        "tokens_per_forward",
        "tokens per forward",
        2,
        lambda r: number(_positive(r.acceptance.tokens_per_forward)),
        lambda r: _positive(r.acceptance.tokens_per_forward),
    ),
    Column(
        "acceptance_length",
        "acceptance length",
        3,
        lambda r: number(_positive(r.acceptance.length)),
        lambda r: _positive(r.acceptance.length),
    ),
    Column("revised", "revised", 7, lambda r: number(_positive(r.revised), 1), lambda r: _positive(r.revised)),
    Column(
        "identical",
        "same as plain",
        1,
        lambda r: f"{r.comparison.identical}/{r.comparison.compared}" if r.comparison else NOTHING,
        _compared(lambda c: c.identical / c.compared),
    ),
    Column(
        "similarity",
        "similarity",
        7,
        lambda r: number(r.comparison.similarity if r.comparison else None),
        _compared(lambda c: c.similarity),
    ),
    Column(
        "quality",
        "quality",
        1,
        lambda r: number(r.quality.estimate if r.quality else None),
        lambda r: r.quality.estimate if r.quality else math.nan,
    ),
    Column(
        "net_win_rate",
        "net win rate",
        1,
        lambda r: f"{r.judged[0].strict.net.estimate:+.2f}" if r.judged else NOTHING,
        lambda r: r.judged[0].strict.net.estimate if r.judged else math.nan,
    ),
    Column(
        "peak_memory",
        "peak memory",
        8,
        lambda r: mebibytes(r.peak_memory),
        lambda r: math.nan if r.peak_memory is None else r.peak_memory,
    ),
    Column("failures", "failures", 0, lambda r: f"{r.failures}/{r.answers}", lambda r: r.failures),
)


def columns(summary: Summary) -> tuple[Column, ...]:
    """The columns that say something about this run: some row has a value there, or a failure to report."""

    def tells(column: Column) -> bool:
        values = [column.value(row) for row in summary.strategies]
        return any(values) if column.key == "failures" else any(math.isfinite(value) for value in values)

    return tuple(column for column in COLUMNS if tells(column))


def comparison_cells(comparison: RunComparison) -> tuple[list[str], list[list[str]]]:
    """Two runs as a heading and one row of cells per strategy that both have."""
    first, second = comparison.names
    head = ["strategy", f"speed-up in {first}", f"in {second}", "agree", f"{second} is faster by", "same tokens"]
    rows = [
        [
            change.strategy,
            *(ratio(speedup) for speedup in change.speedups),
            NOTHING if change.agree is None else "yes" if change.agree else "no",
            ratio(change.faster),
            f"{change.identical}/{change.compared}",
        ]
        for change in comparison.changes
    ]
    return head, rows


def headline(summary: Summary) -> str:
    """The run in one sentence: what was fastest, by how much, and whether it wrote the same."""
    compared = [(row, row.comparison) for row in summary.strategies if row.comparison]
    if not compared:
        return f"{_count(summary.questions, 'question')}, {_count(len(summary.strategies), 'strategy')}."
    row, comparison = max(compared, key=lambda pair: pair[1].speedup.estimate)
    speedup = comparison.speedup
    interval = f" (95 % interval {speedup.low:.2f} to {speedup.high:.2f})" if math.isfinite(speedup.low) else ""
    on = f"on {_count(comparison.questions, 'question')}"
    if speedup.estimate <= 1:
        reached = f"the nearest, {row.strategy}, reached {speedup.estimate:.2f}×{interval}"
        return f"No strategy was faster than plain decoding {on}; {reached}."
    sure = "" if not speedup.low <= 1 else ", which this run cannot tell from no gain"
    if comparison.identical == comparison.compared:
        same = "with exactly the same answers"
    elif row.lossless:
        same = f"with the same answer {comparison.identical} times of {comparison.compared}"
    else:
        same = f"with other answers (similarity {comparison.similarity:.2f})"
    return f"{row.strategy} was {speedup.estimate:.2f}× as fast as plain decoding{interval} {on}, {same}{sure}."


def _count(count: int, noun: str) -> str:
    plural = noun[:-1] + "ies" if noun.endswith("y") else noun + "s"
    return f"{count} {noun if count == 1 else plural}"
