"""How steady the machine was while a run was made, told by plain decoding, whose answers are spread over all of it."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

from decoding.report import statistics
from decoding.report.measures import step_seconds
from decoding.report.records import BASELINE, AnswerRecord
from decoding.report.runfile import Run
from decoding.report.statistics import Drift


@dataclass(frozen=True)
class Pace:
    """The speed of plain decoding's steps, answer after answer.

    answers: its complete answers in the order they were made; seconds: of a step in each, see `step_seconds`. drift:
    from start to end, by order, in which the pause before a resumption does not count. odd: positions of answers
    that were far from their usual speed.
    """

    answers: tuple[AnswerRecord, ...]
    seconds: tuple[float, ...]
    drift: Drift
    odd: tuple[int, ...]


def pace(run: Run) -> Pace:
    """The pace of a run; without plain decoding, of no answers."""
    plain = [r for r in run.records if r.strategy == BASELINE and not r.failed and step_seconds(r) > 0]
    plain.sort(key=lambda record: record.order)
    seconds = [step_seconds(record) for record in plain]
    questions = [record.question_id for record in plain]
    if not plain:
        return Pace((), (), Drift(0.0, 1.0, False), ())
    drift = statistics.drift([record.order for record in plain], seconds, questions)
    return Pace(tuple(plain), tuple(seconds), drift, tuple(statistics.outliers(seconds, questions)))


def pauses(run: Run) -> list[tuple[int, float]]:
    """(position in the run of the first answer after it, seconds) of every interruption that answers followed: from
    the end of the last answer before to the start of the next."""
    records = sorted(run.records, key=lambda record: record.order)
    starts = [session.answers for session in run.resumed]
    return [
        (after.order, max(0.0, after.started - before.started - before.metrics.seconds))
        for before, after in pairwise(records)
        if any(before.order < start <= after.order for start in starts)
    ]
