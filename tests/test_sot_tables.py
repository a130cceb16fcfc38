"""The tables of Skeleton-of-Thought's evaluation, from records whose figures are known by hand."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from decoding.questions import load_questions
from decoding.report import BASELINE, AnswerRecord, PartRecord, Run
from decoding.report.judgments import Judgment
from decoding.trace import Metrics
from experiments.sot_tables import ALL, LENGTH, SPEED, STAGES, median_ratio, pairs, rows, table, throughput
from experiments.sot_vicuna import chosen, load_line, show
from tests.synthetic_run import synthetic_run


def part(tokens: int, seconds: float) -> PartRecord:
    return PartRecord("text", (), Metrics(seconds=seconds, new_tokens=tokens), "eos")


def record(strategy: str, question: int, seconds: float, tokens: int, **changes: object) -> AnswerRecord:
    metrics = Metrics(seconds=seconds, new_tokens=tokens)
    category = "generic" if question < 2 else "math"
    made = AnswerRecord(question, category, "Why?", strategy, 0, "one two", [], "eos", metrics)
    return replace(made, started=float(question), **changes)  # type: ignore[arg-type]


PARTS: Mapping[str, PartRecord] = {
    "router": part(1, 0.1),
    "outline": part(20, 1.0),
    "point 1": part(30, 1.5),
    "point 2": part(10, 0.5),
}


@pytest.fixture
def run() -> Run:
    records = (
        record(BASELINE, 0, 8.0, 80),
        record("skeleton", 0, 2.0, 61, parts=PARTS),
        record(BASELINE, 1, 4.0, 40),
        record("skeleton", 1, 4.0, 80, parts={f"turn 2, {label}": each for label, each in PARTS.items()}),
        record(BASELINE, 2, 3.0, 30),
        record("skeleton", 2, 6.0, 50, parts={"outline": part(20, 1.0), "answer": part(30, 3.0)}),
        record(BASELINE, 3, 1.0, 10),
        record("skeleton", 3, 1.0, 10, error="the server answered 500"),
    )
    verdict = Judgment(0, "skeleton", BASELINE, "model_1", "model_1", ("m", "pair"))
    return replace(synthetic_run(1), records=records, judgments=(verdict,))


def test_speed_up_medians_by_category_and_over_all(run: Run) -> None:
    generic, maths, every = rows(run, "skeleton")
    assert [row.category for row in (generic, maths, every)] == ["generic", "math", ALL]
    assert [row.questions for row in (generic, maths, every)] == [2, 1, 3]  # the failed answer counts nowhere
    assert every.per_answer.estimate == pytest.approx(1.0)  # of 4, 1 and 0.5
    assert generic.per_answer.estimate == pytest.approx(2.5)
    assert every.per_token.estimate == pytest.approx(np.median([0.1 / (2 / 61), 0.1 / (4 / 80), 0.1 / (6 / 50)]))
    assert every.per_answer_token.estimate == pytest.approx(np.median([0.1 / (2 / 40), 0.1 / (4 / 59), 0.1 / (6 / 30)]))


def test_stages_lengths_and_verdicts(run: Run) -> None:
    generic, maths, every = rows(run, "skeleton")
    assert (generic.lists, maths.lists, every.lists) == (2, 0, 2)
    assert (generic.points, generic.outline_tokens, generic.point_tokens, generic.longest_tokens) == (2, 20, 20, 30)
    assert generic.balance == 1.5 and generic.critical_tokens == 50
    assert (generic.outline_seconds, generic.longest_seconds, generic.all_seconds) == (1.0, 1.5, 2.0)
    assert every.plain_tokens == 50 and every.tokens == pytest.approx(191 / 3)
    assert math.isnan(maths.points) and math.isnan(maths.critical_tokens)
    assert generic.net_win_rate == 1.0 and math.isnan(maths.net_win_rate) and generic.similarity == 1.0


def test_repeats_are_averaged_first(run: Run) -> None:
    again = replace(run, records=(*run.records, record("skeleton", 0, 4.0, 61, parts=PARTS, repeat=1)))
    (first, *_) = pairs(again, "skeleton")
    assert first.seconds == 3.0 and first.plain_seconds == 8.0 and len(pairs(again, "skeleton")) == 3


def test_one_category_needs_no_sum(run: Run) -> None:
    assert [row.category for row in rows(replace(run, records=run.records[:4]), "skeleton")] == ["generic"]


def test_medians_are_taken_along_the_last_axis() -> None:
    slow = np.array([[1.0, 2.0, 9.0], [4.0, 4.0, 4.0]])
    assert median_ratio(slow, np.array([[1.0, 1.0, 1.0], [1.0, 2.0, 4.0]])) == pytest.approx([2.0, 2.0])


def test_throughput_counts_a_group_once() -> None:
    together = [replace(record(BASELINE, n, 1.0 + n, 10), started=0.0) for n in range(3)]
    assert throughput(together) == 10.0  # 30 tokens in 3 seconds
    assert throughput([replace(r, started=float(i)) for i, r in enumerate(together)]) == 5.0
    assert math.isnan(throughput([]))


def test_tables_are_aligned_and_show_nothing_as_a_dash(
    run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for columns in (SPEED, LENGTH, STAGES):
        lines = table(rows(run, "skeleton"), columns).split("\n")
        assert len({len(line) for line in lines}) == 1 and len(lines) == 4
    assert "–" in lines[2] and "1.50" in lines[1]
    show(run, tmp_path)
    assert "8 answers, 1 of them failed" in capsys.readouterr().out and "NaN" not in (tmp_path / "sot.json").read_text()
    assert load_line(run, BASELINE).split()[0] == "3.50"


def test_labels_choose_the_questions(tmp_path: Path) -> None:
    (tmp_path / "q.txt").write_text("Name a river.\nWhich habits help?\n")
    (tmp_path / "l.csv").write_text("label;request\n1;Which habits help?\n0;Name a river.\n")
    found = chosen(str(tmp_path / "q.txt"), str(tmp_path / "l.csv"), True)
    assert [question.turns[0] for question in found] == ["Which habits help?"]
    assert len(chosen(str(tmp_path / "l.csv"), None, True)) == 1
    assert len(chosen(str(tmp_path / "q.txt"), None, False)) == len(load_questions(tmp_path / "q.txt")) == 2
    with pytest.raises(SystemExit, match="labels"):
        chosen(str(tmp_path / "q.txt"), None, True)
