"""Two runs side by side: did anything change between them, and is the difference more than chance?"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from decoding.report import statistics
from decoding.report.measures import difference
from decoding.report.redaction import Json
from decoding.report.runfile import Run
from decoding.report.statistics import Interval
from decoding.report.summary import first_answers, per_question_seconds, summarize


@dataclass(frozen=True)
class StrategyChange:
    """One strategy in both runs, on the questions that it answered in both.

    faster: Σ seconds of the first run ÷ Σ seconds of the second, paired by question; above 1 the second is faster.
    speedups: over plain decoding in each run. agree: each run's speed-up lies in the other's interval; None where
    one of them has none. identical of compared answers have the same tokens in both runs.
    """

    strategy: str
    questions: int
    faster: Interval
    speedups: tuple[Interval | None, Interval | None]
    agree: bool | None
    identical: int
    compared: int


@dataclass(frozen=True)
class RunComparison:
    """The second run against the first. missing: strategies that only one of them has; settings: (name, value in
    the first, value in the second) of everything in configuration and environment that differs."""

    names: tuple[str, str]
    changes: tuple[StrategyChange, ...]
    missing: tuple[str, ...]
    settings: tuple[tuple[str, str, str], ...]


def compare_runs(first: Run, second: Run, *, seed: int = 0) -> RunComparison:
    """Compare two runs strategy by strategy; either may hold strategies and questions that the other lacks."""
    summaries = summarize(first, seed=seed), summarize(second, seed=seed)
    changes = []
    for strategy in first.strategies:
        if strategy not in second.strategies:
            continue
        times = [per_question_seconds(run, strategy) for run in (first, second)]
        both = [question for question in times[0] if question in times[1]]
        before, after = (np.array([seconds[question] for question in both]) for seconds in times)
        answers = [first_answers(run, strategy) for run in (first, second)]
        found = [summary.row(strategy).comparison for summary in summaries]
        one, other = (comparison.speedup if comparison else None for comparison in found)
        changes.append(
            StrategyChange(
                strategy=strategy,
                questions=len(both),
                faster=statistics.bootstrap(statistics.ratio_of_sums, before, after, seed=seed),
                speedups=(one, other),
                agree=one.contains(other.estimate) and other.contains(one.estimate) if one and other else None,
                identical=sum(difference(answers[0][q], answers[1][q]) is None for q in both),
                compared=len(both),
            )
        )
    return RunComparison(
        names=(first.name or "first", second.name or "second"),
        changes=tuple(changes),
        missing=tuple(sorted(set(first.strategies) ^ set(second.strategies))),
        settings=tuple(_settings(first, second)),
    )


def verdict(comparison: RunComparison) -> str:
    """What changed, in two sentences: the times, then the tokens."""
    first, second = comparison.names
    if not comparison.changes:
        return f"{first} and {second} have no strategy in common."
    same, compared = (sum(getattr(change, name) for change in comparison.changes) for name in ("identical", "compared"))
    if not compared:
        return "No question was answered in both."
    changed = [
        f"{change.strategy} took {1 / change.faster.estimate:.2f} times as long"
        for change in comparison.changes
        if change.faster.low > 1 or change.faster.high < 1
    ]
    moved = [change.strategy for change in comparison.changes if change.agree is False]
    untold = [change for change in comparison.changes if not math.isfinite(change.faster.low)]
    times = f"No strategy's time differs from {first}'s by more than chance"
    if changed:
        times = f"In {second}, {'; '.join(changed)}"
    elif len(untold) == len(comparison.changes):
        times = f"Too few questions ({max(change.questions for change in untold)}) to tell whether times differ"
    elif untold:
        times += f", as far as there were questions enough: not for {', '.join(change.strategy for change in untold)}"
    if moved:
        times += f", and the speed-up of {', '.join(moved)} left the other run's interval"
    tokens = "All" if same == compared else f"{same} of"
    return f"{times}. {tokens} {compared} answers have the same tokens in both."


def _settings(first: Run, second: Run) -> Iterator[tuple[str, str, str]]:
    sides = []
    for run in (first, second):
        everything: dict[str, Json] = {
            "config": run.header.config,
            "environment": dataclasses.asdict(run.header.environment),
        }
        sides.append(dict(flatten(everything)))
    for name in dict.fromkeys([*sides[0], *sides[1]]):
        one, other = (side.get(name, "") for side in sides)
        if one != other:
            yield name.removeprefix("config."), one, other


def flatten(value: Json, name: str = "") -> Iterator[tuple[str, str]]:
    """The leaves of nested JSON as (dotted name, text)."""
    if isinstance(value, Mapping) and value:
        for key, item in value.items():
            yield from flatten(item, f"{name}.{key}" if name else str(key))
    elif isinstance(value, Sequence) and not isinstance(value, str) and value:
        if all(not isinstance(item, Mapping) for item in value):
            yield name, ", ".join(_leaf(item) for item in value)
        else:
            for i, item in enumerate(value):
                yield from flatten(item, f"{name}.{i}")
    else:
        yield name, _leaf(value)


def _leaf(value: Json) -> str:
    if value is None:
        return "none"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, (Mapping, Sequence)) and not value:
        return ""
    return str(value)
