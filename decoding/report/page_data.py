"""What the page's scripts need, as JSON: one object for the figures and one for each question."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping

from decoding.report.measures import difference
from decoding.report.pace import pace, pauses
from decoding.report.records import BASELINE, AnswerRecord
from decoding.report.redaction import Json
from decoding.report.runfile import Run
from decoding.report.statistics import Interval
from decoding.report.summary import QuestionId, StrategySummary, Summary, per_question_seconds

_TITLE = 110


def page_data(run: Run, summary: Summary) -> dict[str, Json]:
    """Everything the figures show. Numbers that do not exist are null."""
    questions = {record.question_id: record for record in run.records}
    places = {question: i for i, question in enumerate(questions)}
    plain = per_question_seconds(run, BASELINE)
    return {
        "strategies": [_strategy(row, _ratios(run, row.strategy, plain, places)) for row in summary.strategies],
        "categories": list(summary.categories),
        "latency": [[tokens, seconds] for tokens, seconds in run.header.latency],
        "repeats": summary.repeats,
        "pace": _pace(run, places),
        "questions": [
            {"id": record.question_id, "category": record.category, "title": _title(record.question)}
            for record in questions.values()
        ],
    }


def _strategy(row: StrategySummary, ratios: list[Json]) -> dict[str, Json]:
    comparison = row.comparison
    return {
        "name": row.strategy,
        "baseline": row.baseline,
        "lossless": row.lossless,
        "seconds": _finite(row.seconds),
        "tokens": _finite(row.tokens),
        "speedup": _interval(comparison.speedup if comparison else None),
        "geometric": _interval(comparison.speedup_geometric if comparison else None),
        "perToken": _interval(comparison.speedup_per_token if comparison else None),
        "detectable": _finite(comparison.detectable) if comparison else None,
        "ratios": ratios,
        "quality": _interval(row.quality),
        "measures": dict(row.measures),
        "similarity": comparison.similarity if comparison else None,
        "acceptanceLength": _finite(row.acceptance.length),
        "histogram": [[tokens, passes] for tokens, passes in row.acceptance.histogram.items()],
        "positions": [[offered, confirmed] for offered, confirmed in row.acceptance.by_position],
        "steps": [[cost.tokens, cost.steps, cost.seconds] for cost in row.step_costs],
        "shares": [row.shares.plan, row.shares.forward, row.shares.commit, row.shares.other],
        "categories": {
            name: {
                "questions": category.questions,
                "seconds": _finite(category.seconds),
                "speedup": _interval(category.speedup),
                "geometric": _interval(category.speedup_geometric),
                "p": _finite(category.p_value),
                "detectable": _finite(category.detectable),
                "quality": category.quality,
            }
            for name, category in row.categories.items()
        },
    }


def _pace(run: Run, places: Mapping[QuestionId, int]) -> dict[str, Json]:
    """Plain decoding's answers as [place in the run, place of the question, started, seconds of a step, odd]."""
    found = pace(run)
    pairs = zip(found.answers, found.seconds, strict=True)
    return {
        "answers": [
            [record.order, places[record.question_id], round(record.started, 2), round(seconds, 6), i in found.odd]
            for i, (record, seconds) in enumerate(pairs)
        ],
        "change": _finite(found.drift.change),
        "p": _finite(found.drift.p_value),
        "flagged": found.drift.flagged,
        "pauses": [[order, round(seconds, 2)] for order, seconds in pauses(run)],
    }


def _ratios(run: Run, strategy: str, plain: Mapping[QuestionId, float], places: Mapping[QuestionId, int]) -> list[Json]:
    """[place of the question, t(plain) ÷ t(strategy)] for every question that both answered."""
    seconds = per_question_seconds(run, strategy) if strategy != BASELINE else {}
    return [[places[q], round(plain[q] / t, 4)] for q, t in seconds.items() if t > 0 and plain.get(q, 0) > 0]


def question_data(run: Run) -> Iterator[dict[str, Json]]:
    """The answers to each question, in the order in which the questions first appear in the run."""
    strategies = {name: i for i, name in enumerate(run.strategies)}
    answers: dict[QuestionId, list[AnswerRecord]] = {}
    for record in run.records:
        answers.setdefault(record.question_id, []).append(record)
    for records in answers.values():
        records.sort(key=lambda record: (record.repeat, strategies[record.strategy]))
        plain = {record.repeat: record for record in records if record.strategy == BASELINE and not record.failed}
        yield {
            "question": records[0].question,
            "answers": [_answer(record, strategies[record.strategy], plain.get(record.repeat)) for record in records],
        }


def _answer(record: AnswerRecord, strategy: int, plain: AnswerRecord | None) -> dict[str, Json]:
    metrics = record.metrics
    differs = difference(record, plain) if plain and plain is not record else None
    return {
        "strategy": strategy,
        "repeat": record.repeat,
        "finish": record.finish_reason,
        "error": record.error,
        "seconds": round(metrics.seconds, 4),
        "first": round(metrics.first_token_seconds, 4),
        "tokens": metrics.new_tokens,
        "forwards": metrics.forwards,
        "perForward": round(metrics.tokens_per_forward, 3),
        "quality": dict(record.quality),
        "compared": plain is not None and plain is not record,
        "differs": differs,
        "text": record.text,
        "pieces": list(record.pieces),
        "parts": [
            {
                "label": label,
                "text": "" if part.pieces else part.text,
                "pieces": list(part.pieces),
                "sequences": list(part.sequences),
            }
            for label, part in record.parts.items()
        ],
        "steps": _steps(record),
    }


def _steps(record: AnswerRecord) -> dict[str, Json]:
    """The trace by columns: starts and durations in tenths of a millisecond, drafters by their place in a list."""
    drafters = list(dict.fromkeys(step.drafter for step in record.trace))
    trace = record.trace
    columns: dict[str, Json] = {
        "step": [step.step for step in trace],
        "sequence": [step.sequence for step in trace],
        "start": [round(step.start * 1e4) for step in trace],
        "duration": [round((step.end - step.start) * 1e4) for step in trace],
        "tokens": [step.tokens for step in trace],
        "reused": [step.reused for step in trace],
        "drafted": [step.drafted for step in trace],
        "accepted": [step.accepted for step in trace],
        "committed": [step.committed for step in trace],
        "prefill": [int(step.prefill) for step in trace],
        "drafter": [drafters.index(step.drafter) for step in trace],
        "drafters": list(drafters),
    }
    if any(step.sources for step in trace):
        columns["sources"] = [step.sources for step in trace]
    return columns


def _title(question: str) -> str:
    line = " ".join(question.split())
    return line if len(line) <= _TITLE else line[: _TITLE - 1].rstrip() + "…"


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None


def _interval(interval: Interval | None) -> list[Json] | None:
    """[estimate, low, high]; the ends are null where there is no interval."""
    if interval is None or not math.isfinite(interval.estimate):
        return None
    return [interval.estimate, _finite(interval.low), _finite(interval.high)]
