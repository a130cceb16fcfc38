"""The experiments on speculation: Spec-Bench's tables and answer files, and the law of acceptance."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import ClassVar

import pytest

import decoding
from decoding.backends.local import LocalBackend
from decoding.report import AnswerRecord, PartRecord, Run, RunHeader, environment, read_run
from decoding.trace import Metrics
from experiments import acceptance_theory, spec_bench, spec_bench_answers
from tests.test_trace import step
from tests.tiny import EOS, tiny_model, tiny_tokenizer

QUESTIONS = [
    {"question_id": 81, "category": "writing", "turns": ["abab", "again"]},
    {"question_id": 82, "category": "coding", "turns": ["xyxyxy"]},
    {"question_id": 161, "category": "qa", "turns": ["why why why"], "reference": ["because"]},
]


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    lm = LocalBackend(tiny_model("llama"), tiny_tokenizer(), name="tiny", eos=[EOS], slots=2, capacity=256)
    monkeypatch.setattr(decoding, "load", lambda *_, **__: lm)


def call(monkeypatch: pytest.MonkeyPatch, module: object, *arguments: str) -> None:
    monkeypatch.setattr(sys, "argv", ["experiment", *arguments])
    module.main()  # type: ignore[attr-defined]


@pytest.mark.usefixtures("tiny")
def test_spec_bench_writes_answers_tables_and_equality(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "question.jsonl"
    file.write_text("".join(json.dumps(question) + "\n" for question in QUESTIONS))
    figures = tmp_path / "results" / "figures.json"
    drafters = ("--drafters", "suffix", "speculative(draft_length=3)")
    arguments = (str(file), *drafters, "--batches", "1", "2", "--results", str(figures))
    call(monkeypatch, spec_bench, *arguments, "--max-new-tokens", "8", "--output", str(tmp_path / "out"))
    printed = capsys.readouterr().out
    assert "mt_bench" in printed and "3 of 3 answers identical" in printed and "0 of" in printed
    for batch in ("1", "2"):
        files = sorted((tmp_path / "out" / "answers" / batch).iterdir())
        assert [f.name for f in files] == [
            "0-autoregressive.jsonl",
            "1-speculative.jsonl",
            "2-speculative-draft_length-3.jsonl",
        ]
        for path in files:
            lines = [json.loads(line) for line in path.read_text().splitlines()]
            assert [line["question_id"] for line in lines] == [81, 82, 161]
            for line, question in zip(lines, QUESTIONS, strict=True):
                (choice,) = line["choices"]
                turns = len(question["turns"])  # type: ignore[arg-type]
                assert {len(choice[key]) for key in ("turns", "new_tokens", "wall_time", "decoding_steps")} == {turns}
                assert sum(choice["decoding_steps"]) == len(choice["accept_lengths"])
                # The first token of every turn comes with its prompt.
                assert sum(choice["accept_lengths"]) + turns == sum(choice["new_tokens"])
                if path is files[0]:
                    assert set(choice["accept_lengths"]) == {1}
    run = read_run(tmp_path / "out" / "batch-1")
    rows = spec_bench.rows(run, run.strategies[1])
    assert list(rows) == ["mt_bench", "qa", "overall"] and rows["overall"].length >= 1
    written = json.loads(figures.read_text())
    assert written["batches"]["1"][run.strategies[1]]["qa"] == spec_bench.as_json(rows["qa"])
    call(monkeypatch, spec_bench, *arguments, "--max-new-tokens", "8", "--output", str(tmp_path / "out"))


class FakePeer:
    """Takes a tenth of a second per token, or half of that."""

    def __init__(self, name: str) -> None:
        self.name, self.absent = name, ""
        self.rates: dict[int, list[float]] = {}
        self.notes: dict[int, str] = {}
        self.asked: list[tuple[list[int], int]] = []
        self.peers.append(self)

    peers: ClassVar[list[FakePeer]] = []

    def start(self, *_: object) -> None: ...

    def stop(self) -> None: ...

    def ask(self, texts: list[str], ids: list[list[int]], tokens: int, record: bool) -> None:
        if record:
            self.asked.append((ids[0], tokens))
            self.rates.setdefault(1, []).append(20.0 if self.name.endswith("lookup") else 10.0)


@pytest.mark.usefixtures("tiny")
def test_transformers_answers_the_same_prompts_at_the_same_lengths(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(spec_bench, "Peer", FakePeer)
    monkeypatch.setattr(FakePeer, "peers", [])
    file, figures = tmp_path / "question.jsonl", tmp_path / "figures.json"
    file.write_text("".join(json.dumps(question) + "\n" for question in QUESTIONS))
    arguments = (str(file), "--drafters", "suffix", "--batches", "1", "--transformers", "plain", "lookup")
    output = ("--results", str(figures), "--output", str(tmp_path / "out"))
    call(monkeypatch, spec_bench, *arguments, "--max-new-tokens", "8", "--repeats", "2", *output)
    run = read_run(tmp_path / "out" / "batch-1")
    plain = [r for r in run if r.strategy == "autoregressive"]
    assert len(plain) == 2 * len(QUESTIONS)
    for peer in FakePeer.peers:
        assert [count for _, count in peer.asked] == [
            metrics.new_tokens for r in plain for metrics in ([p.metrics for p in r.parts.values()] or [r.metrics])
        ]
    (first, _), (second, _), *_ = FakePeer.peers[0].asked
    assert len(second) > len(first), "the second turn sees the first and its answer"
    tokens = sum(r.metrics.new_tokens for r in plain)
    rate = tokens / sum(r.metrics.seconds for r in plain)
    over = json.loads(figures.read_text())["batches"]["1"]["autoregressive"]["over transformers:lookup"]
    assert over["speedup"] == pytest.approx(rate / 20.0), "held against the faster of the two"
    assert "as fast as transformers:lookup" in capsys.readouterr().out


def test_a_difference_is_counted() -> None:
    def record(strategy: str, tokens: list[int]) -> AnswerRecord:
        return AnswerRecord(1, "stem", "", strategy, 0, "", tokens, "length", Metrics())

    same, other = record("s", [1, 2, 3, 4]), record("t", [1, 2, 9, 4])
    run = Run(RunHeader.create({}, environment(), []), (record("autoregressive", [1, 2, 3, 4]), same, other))
    assert spec_bench.equality(run, "s").startswith("1 of 1") and "0 of 4" in spec_bench.equality(run, "s")
    assert spec_bench.equality(run, "t").startswith("0 of 1") and "2 of 4" in spec_bench.equality(run, "t")


def test_repeats_are_means_of_a_question_and_no_further_questions() -> None:
    def record(strategy: str, question: int, repeat: int, seconds: float) -> AnswerRecord:
        made = Metrics(seconds=seconds, new_tokens=10 + question)
        return AnswerRecord(question, "qa", "", strategy, repeat, "", [1], "length", made)

    def run(slow: list[float]) -> Run:
        """Question q takes plain decoding q seconds and "s" the same less a half; a repeat is so many times slower."""
        each = [(question, repeat, factor) for question in range(1, 7) for repeat, factor in enumerate(slow)]
        plain = [record("autoregressive", q, repeat, q * factor) for q, repeat, factor in each]
        made = [record("s", q, repeat, (q - 0.5) * factor) for q, repeat, factor in each]
        return Run(RunHeader.create({}, environment(), []), (*plain, *made))

    once, often = (spec_bench.rows(run(slow), "s")["qa"] for slow in ([1.0], [0.5, 1.0, 1.5]))
    assert often.speedup == once.speedup and once.speedup.low < once.speedup.estimate == pytest.approx(21 / 18)
    assert often.tokens_per_second == once.tokens_per_second
    assert spec_bench.equality(run([1.0, 2.0]), "s").startswith("12 of 12")
    choices = spec_bench_answers.answer([r for r in run([0.5, 1.5]) if r.key[:2] == (2, "s")])["choices"]
    assert [(choice["index"], choice["wall_time"]) for choice in choices] == [(0, [0.75]), (1, [2.25])]  # type: ignore[attr-defined]


def test_decoding_counts_every_turn_from_its_first_token_on() -> None:
    def record(strategy: str, seconds: float) -> AnswerRecord:
        turns = [Metrics(seconds=at + seconds, first_token_seconds=at, new_tokens=11) for at in (4.0, 2.0)]
        parts = {f"turn {i}": PartRecord("", [], turn) for i, turn in enumerate(turns, start=1)}
        whole = Metrics(seconds=6.0 + 2 * seconds, first_token_seconds=4.0, new_tokens=22)
        return AnswerRecord(1, "qa", "", strategy, 0, "", [1], "length", whole, parts=parts, turns=["a", "b"])

    records = (record("autoregressive", 5.0), record("s", 2.0))
    row = spec_bench.rows(Run(RunHeader.create({}, environment(), []), records), "s")["overall"]
    assert row.speedup.estimate == pytest.approx(16 / 10)
    assert row.decoding.estimate == pytest.approx(5 / 2) == spec_bench.as_json(row)["decoding"]


def test_parts_of_an_answer_are_no_turns() -> None:
    """Points are written at once: their seconds do not add up to the answer's."""
    point = PartRecord("", [], Metrics(seconds=4.0, first_token_seconds=1.0, new_tokens=9, forwards=9))
    whole = Metrics(seconds=6.0, first_token_seconds=1.0, new_tokens=21, forwards=12)
    parts = {"outline": point, "point 1": point, "point 2": point}
    once = AnswerRecord(1, "qa", "", "skeleton", 0, "", [1], "length", whole, parts=parts, turns=["a"])
    assert spec_bench._behind_prompts(once) == (5.0, 20)
    assert list(spec_bench_answers.by_turn(once)) == [(12, 21, 6.0)]
    parts = {f"turn {number}, {label}": part for number in (1, 2) for label, part in parts.items()}
    assert spec_bench._behind_prompts(replace(once, parts=parts, turns=["a", "b"])) == (5.0, 20)


def test_a_name_that_is_no_drafter_is_told_of_both(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(decoding.UnknownName, match=r"unknown drafter or strategy 'nosuch'.*lookahead.*prompt-lookup"):
        call(monkeypatch, spec_bench, "--drafters", "nosuch", "--output", str(tmp_path))


def test_the_law_of_acceptance() -> None:
    assert acceptance_theory.law(0.5, 2) == pytest.approx(1.75) and acceptance_theory.law(1.0, 4) == 5
    trace = [step(0, drafted=2, committed=3), step(1, drafted=2, committed=1), step(2), step(3, prefill=True)]
    found = acceptance_theory.point([trace], 2)
    assert (found.passes, found.alpha, found.measured, found.interval) == (2, 2 / 3, 2.0, None)
    many = acceptance_theory.point([trace, trace[1:], *[trace] * 8], 2)
    assert many.interval is not None and many.interval[0] < many.measured < many.interval[1]


@pytest.mark.usefixtures("tiny")
def test_the_law_is_plotted_beside_what_was_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file, output = tmp_path / "questions.txt", tmp_path / "new" / "law.svg"
    file.write_text("abababab\nxyxyxyxy\n")
    arguments = (str(file), "--max-new-tokens", "12", "--streams", "2", "--lengths", "1", "2")
    call(monkeypatch, acceptance_theory, *arguments, "--drafter", "prompt-lookup", "--output", str(output))
    figures = json.loads(output.with_suffix(".json").read_text())
    assert [point["length"] for point in figures["points"]] == [1, 2] and "<svg" in output.read_text()


@pytest.mark.usefixtures("tiny")
def test_lengths_that_were_never_drafted_leave_no_plot(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    file, output = tmp_path / "questions.txt", tmp_path / "law.svg"
    file.write_text("abababab\n")
    arguments = (str(file), "--max-new-tokens", "4", "--lengths", "30", "--output", str(output))
    call(monkeypatch, acceptance_theory, *arguments)
    assert "no plot is written" in capsys.readouterr().out and not output.exists()
