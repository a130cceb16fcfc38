"""The columns of Skeleton-of-Thought's tables (Ning et al. 2024, sections 3 and 4, appendix), from a run's records.

Wall-clock time, critical path and total tokens are kept apart, because each of them flatters somebody: a batch hides
tokens, a fast machine hides the critical path, and a short answer hides both.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from statistics import fmean

import numpy as np

from decoding.quality import similarity
from decoding.report import BASELINE, AnswerRecord, PartRecord, Run, statistics
from decoding.report.statistics import Array, Interval
from decoding.report.winrates import outcome

ALL = "all"


@dataclass(frozen=True)
class Pair:
    """One question, answered plainly and by the strategy. Seconds and tokens are means over repeats.

    tokens: all that were generated, the outline included. answer_tokens: those of the answer, without outline and
    router. For the others see `Row`; they are nan where the answer had no outline.
    """

    category: str
    plain_seconds: float
    seconds: float
    plain_tokens: float
    tokens: float
    answer_tokens: float
    critical_tokens: float
    points: float
    outline_tokens: float
    point_tokens: float
    longest_tokens: float
    outline_seconds: float
    longest_seconds: float
    all_seconds: float
    similarity: float
    net_win_rate: float

    @property
    def expanded(self) -> bool:
        """The answer was outlined and its points were written; if not, it was answered plainly."""
        return self.points >= 2


@dataclass(frozen=True)
class Row:
    """Figures of one category, or of all questions. Times are seconds; means over questions unless they say otherwise.

    per_answer: median over questions of t(plain) ÷ t. per_token: median of (t ÷ n)(plain) ÷ (t ÷ n), n all generated
    tokens; per_answer_token: the same with the tokens of the answer only, the outline left out.
    lists: answers that were outlined; all figures from here on are about those. points: of an outline.
    critical_tokens: of the outline and the longest point, what a machine with no limit on its width would wait for
    (for plain answers, all their tokens). balance: tokens of the longest point ÷ mean tokens of a point.
    outline_seconds, longest_seconds, all_seconds: from the submission of the outline, of the slowest point and of
    each point (added up) to its end; with pipelining they overlap.
    similarity: ROUGE-L with plain decoding's answer. net_win_rate: strict, if a judge was asked.
    """

    category: str
    questions: int
    plain_seconds: float
    seconds: float
    per_answer: Interval
    per_token: Interval
    per_answer_token: Interval
    plain_tokens: float
    tokens: float
    answer_tokens: float
    similarity: float
    net_win_rate: float
    lists: int
    critical_tokens: float
    points: float
    outline_tokens: float
    point_tokens: float
    longest_tokens: float
    balance: float
    outline_seconds: float
    longest_seconds: float
    all_seconds: float


SPEED = ("questions", "lists", "plain_seconds", "seconds", "per_answer", "per_token", "per_answer_token")
LENGTH = ("plain_tokens", "tokens", "answer_tokens", "critical_tokens", "similarity", "net_win_rate")
STAGES = ("points", "outline_tokens", "point_tokens", "longest_tokens", "balance")
STAGE_SECONDS = ("outline_seconds", "longest_seconds", "all_seconds", "seconds")


def pairs(run: Run, strategy: str) -> list[Pair]:
    """Every question that both plain decoding and the strategy answered."""
    plain, ours = _by_question(run, BASELINE), _by_question(run, strategy)
    verdicts = {
        judgment.question_id: float(outcome(judgment, "strict"))
        for judgment in run.judgments
        if (judgment.model_1, judgment.model_2) == (strategy, BASELINE) and not judgment.failed
    }
    found = []
    for question, answers in ours.items():
        if question in plain:
            repeats = [_pair(answer, plain[question][0], verdicts.get(question)) for answer in answers]
            means = {item.name: _mean(getattr(each, item.name) for each in repeats) for item in fields(Pair)[1:]}
            plainly = plain[question]
            means["plain_seconds"] = fmean(answer.metrics.seconds for answer in plainly)
            means["plain_tokens"] = fmean(answer.metrics.new_tokens for answer in plainly)
            found.append(Pair(category=answers[0].category, **means))
    return found


def rows(run: Run, strategy: str) -> list[Row]:
    """One row for each category in order of appearance, and one for all questions together."""
    every = pairs(run, strategy)
    categories = dict.fromkeys(pair.category for pair in every)
    members = {category: [pair for pair in every if pair.category == category] for category in categories}
    if len(members) != 1:
        members[ALL] = every
    return [_row(category, chosen) for category, chosen in members.items() if chosen]


def table(rows: Sequence[Row], columns: Sequence[str]) -> str:
    """The named columns as aligned text, under their names."""
    cells = [["category", *(name.replace("_", " ") for name in columns)]]
    cells += [[row.category, *(_text(getattr(row, name)) for name in columns)] for row in rows]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = []
    for first, *others in cells:
        aligned = [cell.rjust(width) for cell, width in zip(others, widths[1:], strict=True)]
        lines.append("  ".join([first.ljust(widths[0]), *aligned]))
    return "\n".join(lines)


def median_ratio(slow: Array, fast: Array) -> Array:
    """Median over questions of slow ÷ fast, `[..., questions]` → `[...]`."""
    return np.asarray(np.median(slow / fast, axis=-1))


def throughput(records: Iterable[AnswerRecord]) -> float:
    """Tokens per second of answers that were made group by group: Σ tokens ÷ Σ over groups of their slowest answer."""
    slowest: dict[float, float] = {}
    tokens = 0
    for record in records:
        tokens += record.metrics.new_tokens
        slowest[record.started] = max(slowest.get(record.started, 0.0), record.metrics.seconds)
    total = sum(slowest.values())
    return tokens / total if total else float("nan")


def _row(category: str, chosen: Sequence[Pair]) -> Row:
    def column(name: str) -> Array:
        return np.array([getattr(pair, name) for pair in chosen], dtype=np.float64)

    def ratio(slow: Array, fast: Array) -> Interval:
        return statistics.bootstrap(median_ratio, slow, fast, method="percentile")

    lists = [pair for pair in chosen if pair.expanded]
    plain, ours = column("plain_seconds"), column("seconds")
    with np.errstate(divide="ignore", invalid="ignore"):
        plain_rate = plain / column("plain_tokens")
        per_token = ratio(plain_rate, ours / column("tokens"))
        per_answer_token = ratio(plain_rate, ours / column("answer_tokens"))
    of_all = ("plain_seconds", "seconds", "plain_tokens", "tokens", "answer_tokens", "similarity", "net_win_rate")
    of_lists = ("critical_tokens", *STAGES[:-1], *STAGE_SECONDS[:-1])
    return Row(
        category=category,
        questions=len(chosen),
        per_answer=ratio(plain, ours),
        per_token=per_token,
        per_answer_token=per_answer_token,
        lists=len(lists),
        balance=_mean(pair.longest_tokens / pair.point_tokens for pair in lists if pair.point_tokens),
        **{name: _mean(getattr(pair, name) for pair in chosen) for name in of_all},
        **{name: _mean(getattr(pair, name) for pair in lists) for name in of_lists},
    )


def _pair(answer: AnswerRecord, plain: AnswerRecord, verdict: float | None) -> Pair:
    parts = _stages(answer.parts)
    points, outlines, routers = parts["point"], parts["outline"], parts["router"]
    tokens = [point.metrics.new_tokens for point in points]
    seconds = [point.metrics.seconds for point in points]
    nothing = float("nan")
    outline_tokens = sum(part.metrics.new_tokens for part in outlines)
    router_tokens = sum(part.metrics.new_tokens for part in routers)
    return Pair(
        category=answer.category,
        plain_seconds=plain.metrics.seconds,
        seconds=answer.metrics.seconds,
        plain_tokens=plain.metrics.new_tokens,
        tokens=answer.metrics.new_tokens,
        answer_tokens=answer.metrics.new_tokens - outline_tokens - router_tokens,
        critical_tokens=outline_tokens + max(tokens) if tokens else nothing,
        points=len(points),
        outline_tokens=outline_tokens if points else nothing,
        point_tokens=fmean(tokens) if tokens else nothing,
        longest_tokens=max(tokens, default=nothing),
        outline_seconds=sum(part.metrics.seconds for part in outlines) if points else nothing,
        longest_seconds=max(seconds, default=nothing),
        all_seconds=sum(seconds) if seconds else nothing,
        similarity=similarity(answer.text, plain.text),
        net_win_rate=nothing if verdict is None else verdict,
    )


def _stages(parts: Mapping[str, PartRecord]) -> dict[str, list[PartRecord]]:
    """Parts by stage: "outline", "point 3" and "turn 2, point 1" begin with or end in the name of theirs."""
    found: dict[str, list[PartRecord]] = {"router": [], "outline": [], "point": [], "answer": []}
    for label, part in parts.items():
        match = re.fullmatch(r"(?:turn \d+, )?(router|outline|point|answer)(?: \d+)?", label)
        if match is not None:
            found[match[1]].append(part)
    return found


def _by_question(run: Run, strategy: str) -> dict[int | str, list[AnswerRecord]]:
    answers: dict[int | str, list[AnswerRecord]] = {}
    for record in run.records:
        if record.strategy == strategy and not record.failed:
            answers.setdefault(record.question_id, []).append(record)
    return answers


def _mean(values: Iterable[float]) -> float:
    """Of those that exist; nan if none does."""
    found = [value for value in values if value == value]
    return fmean(found) if found else float("nan")


def _text(value: float | int | Interval) -> str:
    if isinstance(value, Interval):
        low = f" [{value.low:.2f}, {value.high:.2f}]" if value.low == value.low else ""
        return "–" if value.estimate != value.estimate else f"{value.estimate:.2f}×{low}"
    if isinstance(value, int):
        return str(value)
    return "–" if value != value else f"{value:.2f}" if abs(value) < 10 else f"{value:.0f}"
