"""A run's answers as FastChat keeps them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from decoding.errors import RecordError
from decoding.report import BASELINE, AnswerRecord, RecordWriter, Run, RunHeader, environment, export, read_run
from decoding.report.fastchat import model_id, write_fastchat
from decoding.trace import Metrics

ODD = "speculative(drafter=eagle3(head=/heads/a.safetensors))"


def record(question: int, strategy: str, text: str, **changes: Any) -> AnswerRecord:
    known: dict[str, Any] = {"tokens": [], "finish_reason": "eos", "metrics": Metrics(), "repeat": 0, "started": 2.5}
    asked = f"Question {question}?\n\nAnd then?" if question == 2 else f"Question {question}?"
    return AnswerRecord(question, "writing", asked, strategy, text=text, **known | changes)


@pytest.fixture
def run(tmp_path: Path) -> Run:
    with RecordWriter(tmp_path / "run", RunHeader.create({"model": "m"}, environment())) as writer:
        for strategy in (BASELINE, ODD):
            writer.append(record(1, strategy, f"ünique {strategy}", turns=[f"ünique {strategy}"]))
            writer.append(record(1, strategy, "again", turns=["again"], repeat=1))
            writer.append(record(2, strategy, "one\n\ntwo", turns=["one", "two"]))
            writer.append(record(3, strategy, "half", error="cut off", finish_reason="error"))
    return read_run(tmp_path / "run")


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_questions_and_answers_have_fastchats_fields(run: Run, tmp_path: Path) -> None:
    files = write_fastchat(run, tmp_path / "mine")
    assert lines(tmp_path / "mine" / "question.jsonl") == [
        {"question_id": 1, "category": "writing", "turns": ["Question 1?"]},
        {"question_id": 2, "category": "writing", "turns": ["Question 2?", "And then?"]},
    ]
    plain = lines(tmp_path / "mine" / "model_answer" / f"{BASELINE}.jsonl")
    assert set(plain[0]) == {"question_id", "answer_id", "model_id", "choices", "tstamp"}
    assert [answer["question_id"] for answer in plain] == [1, 2]  # the third failed
    assert plain[0]["choices"] == [{"index": 0, "turns": [f"ünique {BASELINE}"]}, {"index": 1, "turns": ["again"]}]
    assert plain[1]["choices"] == [{"index": 0, "turns": ["one", "two"]}]
    assert len(files) == 3 and len({answer["answer_id"] for path in files[1:] for answer in lines(path)}) == 4


def test_a_model_is_called_what_its_file_is_called(run: Run, tmp_path: Path) -> None:
    _, plain, odd = write_fastchat(run, tmp_path)
    for path in (plain, odd):
        assert path.parent == tmp_path / "model_answer"
        assert {answer["model_id"] for answer in lines(path)} == {path.name.removesuffix(".jsonl")}
    assert model_id("skeleton(inner=speculative(drafter=suffix))") == "skeleton(inner=speculative(drafter=suffix))"
    assert model_id("a(b=/c)") != model_id("a(b=_c)") and "/" not in model_id("a(b=/c)")
    assert len(model_id("x" * 400)) < 130


def test_a_report_exports_a_folder(run: Run, tmp_path: Path) -> None:
    export(run, tmp_path / "bench")
    assert (tmp_path / "bench" / "question.jsonl").exists()
    with pytest.raises(RecordError, match="or none for a folder"):
        export(run, tmp_path / "bench.txt")
    (tmp_path / "taken").write_text("")
    with pytest.raises(RecordError, match="could not be written"):
        export(run, tmp_path / "taken")
