"""A run's answers as FastChat keeps them, so that its judge and its viewers read them.

    question.jsonl             {"question_id": 81, "category": "writing", "turns": ["...", ...]}
    model_answer/MODEL.jsonl   {"question_id": 81, "answer_id": "...", "model_id": MODEL,
                                "choices": [{"index": 0, "turns": ["...", ...]}], "tstamp": 1700000000.0}

The "models" are strategies of the run, and repeats are choices. As `data/NAME/` in a checkout of FastChat, this is what
`python gen_judgment.py --bench-name NAME --model-list MODEL ...` takes (Zheng et al. 2023, MT-bench); its verdicts have
the format of `decoding.report.judgments`.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterable, Mapping
from datetime import datetime, timedelta
from pathlib import Path

from decoding.errors import RecordError
from decoding.report.records import AnswerRecord
from decoding.report.redaction import Json
from decoding.report.runfile import Run

QUESTIONS, ANSWERS = "question.jsonl", "model_answer"
"""Names of the file and of the folder."""


def write_fastchat(run: Run, directory: str | os.PathLike[str]) -> list[Path]:
    """Write the questions of a run, and the answers of each of its strategies, into a folder; returns the files.

    Answers that failed are left out, as FastChat has no way to mark them. Raises RecordError if a file cannot be
    written.
    """
    folder = Path(directory)
    answers: dict[str, dict[int | str, list[AnswerRecord]]] = {strategy: {} for strategy in run.strategies}
    for record in run.records:
        if not record.failed:
            answers[record.strategy].setdefault(record.question_id, []).append(record)
    questions = {record.question_id: record for record in run.records if not record.failed}
    written = {folder / QUESTIONS: [_question(record) for record in questions.values()]}
    began = datetime.fromisoformat(run.header.created)
    for strategy, asked in answers.items():
        model = model_id(strategy)
        lines = [_answer(model, repeats, began) for repeats in asked.values()]
        written[folder / ANSWERS / f"{model}.jsonl"] = lines
    try:
        (folder / ANSWERS).mkdir(parents=True, exist_ok=True)
        for path, lines in written.items():
            _write(path, lines)
    except OSError as error:
        raise RecordError(f"{folder} could not be written ({error.strerror or error}).") from error
    return list(written)


def model_id(strategy: str) -> str:
    """What FastChat calls a strategy. It is a file's name there, so what no file can be called is replaced."""
    plain = re.sub(r"[^\w.,=+() -]", "_", strategy)
    if plain == strategy and len(plain) <= 120:
        return plain
    return f"{plain[:110]}-{hashlib.sha256(strategy.encode()).hexdigest()[:8]}"


def _question(record: AnswerRecord) -> Mapping[str, Json]:
    # A record holds the turns of its question as one text; they come apart again if none of them has a blank line.
    turns = record.question.split("\n\n")
    if len(turns) != len(record.turns):
        turns = [record.question]
    return {"question_id": record.question_id, "category": record.category, "turns": list(turns)}


def _answer(model: str, repeats: list[AnswerRecord], began: datetime) -> Mapping[str, Json]:
    first = repeats[0]
    return {
        "question_id": first.question_id,
        "answer_id": hashlib.sha256(f"{model} {first.question_id} {first.text}".encode()).hexdigest()[:22],
        "model_id": model,
        "choices": [
            {"index": index, "turns": list(record.turns) or [record.text]} for index, record in enumerate(repeats)
        ],
        "tstamp": (began + timedelta(seconds=first.started)).timestamp(),
    }


def _write(path: Path, lines: Iterable[Mapping[str, Json]]) -> None:
    path.write_text("".join(json.dumps(line, ensure_ascii=True) + "\n" for line in lines), encoding="utf-8")
