"""A run's answers as Spec-Bench writes them (Xia et al. 2024).

    {"question_id": 81, "category": "writing", "answer_id": "...", "model_id": STRATEGY, "tstamp": 1700000000.0,
     "choices": [{"index": 0, "turns": ["...", ...], "decoding_steps": [31, ...], "new_tokens": [96, ...],
                  "wall_time": [2.5, ...], "accept_lengths": [1, 4, ...]}]}

One line a question; repeats are choices, and steps, tokens and seconds are per turn.
"""

from __future__ import annotations

import json
import re
import time
import zlib
from collections.abc import Iterable, Sequence
from pathlib import Path

from decoding.report import AnswerRecord, Run
from decoding.trace import Metrics


def write_answers(run: Run, name: str, path: Path) -> None:
    """Write a strategy's answers, making the folder they go to."""
    path.parent.mkdir(parents=True, exist_ok=True)
    repeats: dict[int | str, list[AnswerRecord]] = {}
    for record in run:
        if record.strategy == name:
            repeats.setdefault(record.question_id, []).append(record)
    lines = [json.dumps(answer(records), ensure_ascii=False) + "\n" for records in repeats.values()]
    path.write_text("".join(lines), encoding="utf-8")


def answer(records: Sequence[AnswerRecord]) -> dict[str, object]:
    """The line of one question's answers."""
    first = records[0]
    identifier = f"{zlib.crc32(f'{first.key}'.encode()):08x}"
    return {
        "question_id": int(first.question_id) if str(first.question_id).isdigit() else first.question_id,
        "category": first.category,
        "answer_id": identifier,
        "model_id": first.strategy,
        "choices": [_choice(index, record) for index, record in enumerate(records)],
        "tstamp": time.time(),
    }


def _choice(index: int, record: AnswerRecord) -> dict[str, object]:
    turns = list(by_turn(record))
    return {
        "index": index,
        "turns": list(record.turns) or [record.text],
        "decoding_steps": [steps for steps, _, _ in turns],
        "new_tokens": [tokens for _, tokens, _ in turns],
        "wall_time": [seconds for _, _, seconds in turns],
        "accept_lengths": accept_lengths(record),
    }


def by_turn(record: AnswerRecord) -> Iterable[tuple[int, int, float]]:
    """(decoding passes, new tokens, seconds) of every turn."""
    for metrics in turn_metrics(record):
        yield metrics.forwards, metrics.new_tokens, metrics.seconds


def turn_metrics(record: AnswerRecord) -> list[Metrics]:
    """Those of every turn; of the whole answer where turns are themselves made of parts, whose times overlap."""
    turns = [f"turn {number}" for number in range(1, len(record.turns) + 1)]
    if len(turns) > 1 and set(turns) == set(record.parts):
        return [record.parts[turn].metrics for turn in turns]
    return [record.metrics]


def accept_lengths(record: AnswerRecord) -> list[int]:
    """Tokens that every pass after prefill gained."""
    return [step.committed for step in record.trace if not step.prefill]


def slug(name: str) -> str:
    """A strategy as the name of a file."""
    return re.sub(r"[^\w.-]+", "-", name).strip("-")
