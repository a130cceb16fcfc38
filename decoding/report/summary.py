"""The figures of a run, one row per strategy: a pure function of its records.

Repeats collapse to per-question means first; whatever is compared with plain decoding is compared on the questions
that both answered. Definitions of all figures are in `decoding.report.definitions`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from statistics import fmean

import numpy as np

from decoding.quality import similarity
from decoding.report import statistics
from decoding.report.measures import (
    Acceptance,
    StepCost,
    TimeShares,
    acceptance,
    difference,
    step_costs,
    time_shares,
)
from decoding.report.notices import notices
from decoding.report.records import BASELINE, AnswerRecord
from decoding.report.runfile import Run
from decoding.report.statistics import Array, Interval
from decoding.report.winrates import Judged, JudgedPair, judged

QuestionId = int | str
ByQuestion = Mapping[QuestionId, Sequence[AnswerRecord]]


@dataclass(frozen=True)
class Difference:
    """Where an answer's tokens first leave plain decoding's; position counts from 0."""

    question_id: QuestionId
    repeat: int
    position: int


@dataclass(frozen=True)
class Comparison:
    """One strategy against plain decoding, on the `questions` questions that both answered.

    speedup: ratio of summed seconds; speedup_geometric: geometric mean of per-question ratios; speedup_per_token:
    ratio of seconds per token. p_value: Holm-corrected over the strategies of the run. detectable: the smallest
    speed-up this run could have found. identical of compared answers have plain decoding's tokens, the others are in
    `differences`; similarity: mean ROUGE-L F1.
    """

    questions: int
    speedup: Interval
    speedup_geometric: Interval
    speedup_per_token: Interval
    p_value: float
    detectable: float
    identical: int
    compared: int
    differences: tuple[Difference, ...]
    similarity: float


@dataclass(frozen=True)
class CategorySummary:
    """One strategy on the questions of one category; figures as in `Comparison`, on the questions that plain decoding
    answered too. p_value: Holm-corrected over all strategies and categories of the run."""

    questions: int
    seconds: float
    speedup: Interval | None
    quality: float | None
    speedup_geometric: Interval | None = None
    p_value: float = float("nan")
    detectable: float = float("nan")


@dataclass(frozen=True)
class StrategySummary:
    """One row of the table. Times are seconds, memory bytes; averages are over questions, failures left out.

    judged: what judges made of its answers, one entry for each judge.
    """

    strategy: str
    lossless: bool
    questions: int
    answers: int
    failures: int
    seconds: float
    first_token_seconds: float
    tokens: float
    forwards: float
    revised: float
    seconds_per_token: float
    acceptance: Acceptance
    step_costs: tuple[StepCost, ...]
    shares: TimeShares
    quality: Interval | None
    measures: Mapping[str, float]
    peak_memory: int | None
    categories: Mapping[str, CategorySummary]
    comparison: Comparison | None
    judged: tuple[Judged, ...] = ()

    @property
    def baseline(self) -> bool:
        return self.strategy == BASELINE


@dataclass(frozen=True)
class Summary:
    """The figures of a run. notices: what a reader should know before believing them, one sentence each."""

    strategies: tuple[StrategySummary, ...]
    categories: tuple[str, ...]
    questions: int
    repeats: int
    notices: tuple[str, ...] = field(default=())

    def row(self, strategy: str) -> StrategySummary:
        """The row of a strategy; KeyError if it was not run."""
        for row in self.strategies:
            if row.strategy == strategy:
                return row
        raise KeyError(strategy)


def summarize(run: Run, *, seed: int = 0, resamples: int = statistics.RESAMPLES) -> Summary:
    """The figures of a run. `seed` and `resamples` belong to the bootstrap; equal seeds give equal intervals."""
    complete: dict[str, ByQuestion] = {name: _by_question(run, name) for name in run.strategies}
    plain = complete.get(BASELINE, {})

    def estimate(statistic: statistics.Statistic, *columns: Array) -> Interval:
        return statistics.bootstrap(statistic, *columns, seed=seed, resamples=resamples)

    rows = [_strategy(run, name, answers, plain, estimate) for name, answers in complete.items()]
    adjusted = statistics.holm([row.comparison.p_value if row.comparison else float("nan") for row in rows])
    rows = [
        replace(row, comparison=replace(row.comparison, p_value=p)) if row.comparison else row
        for row, p in zip(rows, adjusted, strict=True)
    ]
    cells = [(i, name, cell.p_value) for i, row in enumerate(rows) for name, cell in row.categories.items()]
    for (i, name, _), p in zip(cells, statistics.holm([p for *_, p in cells]), strict=True):
        cell = replace(rows[i].categories[name], p_value=p)
        rows[i] = replace(rows[i], categories={**rows[i].categories, name: cell})
    return Summary(
        strategies=tuple(rows),
        categories=tuple(dict.fromkeys(record.category for record in run.records)),
        questions=len({record.question_id for record in run.records}),
        repeats=len({record.repeat for record in run.records}),
        notices=run.notices + notices(run, rows),
    )


def per_question_seconds(run: Run, strategy: str) -> dict[QuestionId, float]:
    """Mean seconds of a strategy's complete answers by question."""
    answers = _by_question(run, strategy)
    return dict(zip(answers, _means(answers, _seconds).tolist(), strict=True))


def first_answers(run: Run, strategy: str) -> dict[QuestionId, AnswerRecord]:
    """A strategy's first complete answer to each question."""
    return {question: records[0] for question, records in _by_question(run, strategy).items()}


def _by_question(run: Run, strategy: str) -> ByQuestion:
    """The complete answers of a strategy by question, in the order of the run."""
    answers: dict[QuestionId, list[AnswerRecord]] = {}
    for record in run.records:
        if record.strategy == strategy and not record.failed:
            answers.setdefault(record.question_id, []).append(record)
    return answers


def _means(
    answers: ByQuestion, value: Callable[[AnswerRecord], float], only: Sequence[QuestionId] | None = None
) -> Array:
    """Per-question means over repeats, [questions]."""
    chosen = answers if only is None else only
    return np.array([fmean(value(record) for record in answers[question]) for question in chosen])


def _seconds(record: AnswerRecord) -> float:
    return record.metrics.seconds


def _new_tokens(record: AnswerRecord) -> float:
    return record.metrics.new_tokens


def _log_ratios(slow: Array, fast: Array) -> Array:
    """ln(slow ÷ fast) per question; not finite where one of them took no time."""
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.asarray(np.log(slow / fast))


def _average(values: Array) -> float:
    return float(values.mean()) if values.size else float("nan")


def _strategy(
    run: Run, name: str, answers: ByQuestion, plain: ByQuestion, estimate: Callable[..., Interval]
) -> StrategySummary:
    made = [record for record in run.records if record.strategy == name]
    good = [record for records in answers.values() for record in records]
    seconds, tokens = _means(answers, _seconds), _means(answers, _new_tokens)
    scored = {q: kept for q, records in answers.items() if (kept := [r for r in records if r.quality])}
    memory = [record.peak_memory for record in good if record.peak_memory is not None]
    measures = {measure for record in good for measure in record.quality}
    return StrategySummary(
        strategy=name,
        lossless=all(record.lossless for record in made),
        questions=len(answers),
        answers=len(made),
        failures=len(made) - len(good),
        seconds=_average(seconds),
        first_token_seconds=_average(_means(answers, lambda r: r.metrics.first_token_seconds)),
        tokens=_average(tokens),
        forwards=_average(_means(answers, lambda r: r.metrics.forwards)),
        revised=_average(_means(answers, lambda r: r.metrics.revised)),
        seconds_per_token=float(statistics.ratio_of_sums(seconds, tokens)),
        acceptance=acceptance(good),
        step_costs=step_costs(good),
        shares=time_shares(good) if good else TimeShares(0.0, 0.0, 0.0, 0.0),
        quality=estimate(statistics.mean, _means(scored, _quality)) if scored else None,
        measures={m: fmean(r.quality[m] for r in good if m in r.quality) for m in sorted(measures)},
        peak_memory=max(memory, default=None),
        categories=_categories(answers, plain if name != BASELINE else {}, estimate),
        comparison=_compare(answers, plain, estimate) if name != BASELINE and plain else None,
        judged=_judged(run, name, answers, plain, estimate),
    )


def _judged(
    run: Run, name: str, answers: ByQuestion, plain: ByQuestion, estimate: Callable[..., Interval]
) -> tuple[Judged, ...]:
    """The verdicts on a strategy's answers, judge by judge."""
    pairs: dict[str, list[JudgedPair]] = {}
    for judgment in run.judgments:
        question = judgment.question_id
        if (judgment.model_1, judgment.model_2) == (name, BASELINE) and question in answers and question in plain:
            ours, theirs = answers[question][0], plain[question][0]
            pair = JudgedPair(judgment, ours.category, (len(ours.text), len(theirs.text)))
            pairs.setdefault(", ".join(judgment.judge), []).append(pair)
    return tuple(judged(judge, each, estimate) for judge, each in pairs.items())


def _quality(record: AnswerRecord) -> float:
    return fmean(record.quality.values())


def _categories(
    answers: ByQuestion, plain: ByQuestion, estimate: Callable[..., Interval]
) -> Mapping[str, CategorySummary]:
    members: dict[str, list[QuestionId]] = {}
    for question, records in answers.items():
        members.setdefault(records[0].category, []).append(question)
    summaries = {}
    for category, questions in members.items():
        both = [question for question in questions if question in plain]
        scored = [r for question in questions for r in answers[question] if r.quality]
        slow, fast = _means(plain, _seconds, both), _means(answers, _seconds, both)
        logs = _log_ratios(slow, fast)
        summaries[category] = CategorySummary(
            questions=len(questions),
            seconds=_average(_means(answers, _seconds, questions)),
            speedup=estimate(statistics.ratio_of_sums, slow, fast) if both else None,
            quality=fmean(map(_quality, scored)) if scored else None,
            speedup_geometric=estimate(statistics.geometric_mean_ratio, slow, fast) if both else None,
            p_value=statistics.sign_flip_p(logs),
            detectable=statistics.minimum_detectable_ratio(logs),
        )
    return summaries


def _compare(answers: ByQuestion, plain: ByQuestion, estimate: Callable[..., Interval]) -> Comparison | None:
    both = [question for question in answers if question in plain]
    if not both:
        return None
    slow, fast = _means(plain, _seconds, both), _means(answers, _seconds, both)
    slow_tokens, fast_tokens = _means(plain, _new_tokens, both), _means(answers, _new_tokens, both)
    logs = _log_ratios(slow, fast)
    pairs = _pairs(answers, plain)
    differences = tuple(
        Difference(record.question_id, record.repeat, position)
        for record, reference in pairs
        if (position := difference(record, reference)) is not None
    )
    return Comparison(
        questions=len(both),
        speedup=estimate(statistics.ratio_of_sums, slow, fast),
        speedup_geometric=estimate(statistics.geometric_mean_ratio, slow, fast),
        speedup_per_token=estimate(statistics.ratio_of_rates, slow, slow_tokens, fast, fast_tokens),
        p_value=statistics.sign_flip_p(logs),
        detectable=statistics.minimum_detectable_ratio(logs),
        identical=len(pairs) - len(differences),
        compared=len(pairs),
        differences=differences,
        similarity=fmean(similarity(record.text, reference.text) for record, reference in pairs),
    )


def _pairs(answers: ByQuestion, plain: ByQuestion) -> list[tuple[AnswerRecord, AnswerRecord]]:
    """Every answer with plain decoding's to the same question: of the same repeat, or else of its first."""
    pairs = []
    for question, records in answers.items():
        references = {reference.repeat: reference for reference in plain.get(question, ())}
        for record in records if references else ():
            pairs.append((record, references.get(record.repeat) or next(iter(references.values()))))
    return pairs
