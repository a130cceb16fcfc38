"""What the steps of many answers say together: acceptance, cost of a step, where the time went, identity."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import median

from decoding.report.records import AnswerRecord
from decoding.trace import Step, acceptance_histogram


@dataclass(frozen=True)
class Acceptance:
    """How many tokens the passes after prefill gained.

    length: tokens committed per pass and sequence, bonus token included; 0 if no pass was recorded.
    tokens_per_forward: tokens committed after prefill per forward pass, all sequences of the answer together.
    histogram: tokens committed → how many passes.
    by_position: for the 1st, 2nd, … guess of a block: how often one was offered that far, and how often it and all
        before it were confirmed.
    """

    length: float = 0.0
    tokens_per_forward: float = 0.0
    histogram: Mapping[int, int] = field(default_factory=dict)
    by_position: Sequence[tuple[int, int]] = ()


def acceptance(records: Iterable[AnswerRecord]) -> Acceptance:
    """Acceptance pooled over all passes of `records`; without a trace, their metrics weighted by forwards."""
    histogram: dict[int, int] = {}
    passes = committed = forward_tokens = 0.0
    forwards = deepest = 0
    offered: dict[int, int] = {}
    confirmed: dict[int, int] = {}
    for record in records:
        metrics = record.metrics
        forwards += metrics.forwards
        forward_tokens += metrics.tokens_per_forward * metrics.forwards
        if not record.trace:
            passes += metrics.forwards
            committed += metrics.acceptance_length * metrics.forwards
        for count, times in acceptance_histogram(record.trace).items():
            histogram[count] = histogram.get(count, 0) + times
            passes += times
            committed += count * times
        for step in record.trace:
            if step.drafted:
                offered[step.drafted] = offered.get(step.drafted, 0) + 1
                confirmed[step.accepted] = confirmed.get(step.accepted, 0) + 1
                deepest = max(deepest, step.accepted)
    # A tree drafts more guesses than its depth: positions beyond the deepest confirmed one but one say nothing.
    positions = range(1, min(deepest + 1, max(offered, default=0)) + 1)
    return Acceptance(
        length=committed / passes if passes else 0.0,
        tokens_per_forward=forward_tokens / forwards if forwards else 0.0,
        histogram=dict(sorted(histogram.items())),
        by_position=tuple((_at_least(offered, j), _at_least(confirmed, j)) for j in positions),
    )


def _at_least(counts: Mapping[int, int], least: int) -> int:
    return sum(times for value, times in counts.items() if value >= least)


@dataclass(frozen=True)
class StepCost:
    """Steps that ran `tokens` tokens through the model: how many, and the median seconds of their forward pass."""

    tokens: int
    steps: int
    seconds: float


def step_costs(records: Iterable[AnswerRecord]) -> tuple[StepCost, ...]:
    """The cost of decoding steps by the number of tokens in them; steps that read prompts are left out.

    A step counts once for all answers that it was shared by: those that were made together started together.
    """
    steps: dict[tuple[float, int], Step] = {}
    mixed: set[tuple[float, int]] = set()
    for record in records:
        for step in record.trace:
            steps[record.started, step.step] = step
            if step.prefill:
                mixed.add((record.started, step.step))
    seconds: dict[int, list[float]] = {}
    for key, step in steps.items():
        if key not in mixed:
            seconds.setdefault(step.batch_tokens, []).append(step.forward)
    return tuple(StepCost(tokens, len(times), median(times)) for tokens, times in sorted(seconds.items()))


@dataclass(frozen=True)
class TimeShares:
    """Mean seconds per answer by what they were spent on; `other` is the rest up to the wall clock: queueing,
    text handling, steps of other answers."""

    plan: float
    forward: float
    commit: float
    other: float


def time_shares(records: Sequence[AnswerRecord]) -> TimeShares:
    """Where the time of `records` (at least one) went."""
    count = len(records)
    plan = sum(r.metrics.plan_seconds for r in records) / count
    forward = sum(r.metrics.forward_seconds for r in records) / count
    commit = sum(r.metrics.commit_seconds for r in records) / count
    total = sum(r.metrics.seconds for r in records) / count
    return TimeShares(plan, forward, commit, max(0.0, total - plan - forward - commit))


def first_difference(tokens: Sequence[object], reference: Sequence[object]) -> int | None:
    """Position (from 0) of the first token that differs; None if both are the same."""
    for i, (token, expected) in enumerate(zip(tokens, reference, strict=False)):
        if token != expected:
            return i
    return None if len(tokens) == len(reference) else min(len(tokens), len(reference))


def difference(record: AnswerRecord, reference: AnswerRecord) -> int | None:
    """Position of the first token that differs, or of the first character where only text is known; None if all are
    the same."""
    if record.tokens or reference.tokens:
        return first_difference(record.tokens, reference.tokens)
    return first_difference(record.text, reference.text)


def step_seconds(record: AnswerRecord) -> float:
    """Median duration of the answer's decoding steps: the speed of the machine while it was made. Without a trace,
    seconds per token; 0 if nothing was generated."""
    durations = [step.plan + step.forward + step.commit for step in record.trace if not step.prefill]
    if durations:
        return median(durations)
    return record.metrics.seconds / record.metrics.new_tokens if record.metrics.new_tokens else 0.0
