"""Judging answers with a model: both orders, both conventions for ties, length taken out, FastChat's file format."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest
from scipy.optimize import minimize

from decoding.backends.base import Backend, OnText
from decoding.cli import main
from decoding.errors import ContextOverflow, InvalidRequest, RecordError, UnknownName
from decoding.judge import Judge, judge_run, verdict
from decoding.options import LoadOptions
from decoding.report import (
    BASELINE,
    AnswerRecord,
    RecordWriter,
    Run,
    RunHeader,
    environment,
    read_run,
    statistics,
    summarize,
)
from decoding.report.judgments import JUDGMENTS, Judgment, Winner, append_judgment, read_judgments
from decoding.report.table import columns
from decoding.report.winrates import RIDGE, JudgedPair, judged, length_controlled, length_difference, outcome
from decoding.strategies.base import TokenStrategy
from decoding.trace import Metrics
from decoding.types import Generation, Message, Prompt, SamplingParams

Opinion = Callable[[str, str], str]
"""Answers A and B → what the judge writes."""


class Opinionated(Backend):
    """A judge whose opinion is a function."""

    capabilities: ClassVar[frozenset[str]] = frozenset({"text"})
    name = "critic"

    def __init__(self, opinion: Opinion) -> None:
        self.opinion = opinion
        self.asked: list[Sequence[Message]] = []

    async def complete(
        self,
        prompt: Prompt,
        params: SamplingParams,
        strategy: TokenStrategy,
        *,
        prefill: str = "",
        on_text: OnText | None = None,
    ) -> Generation:
        assert not isinstance(prompt, str)
        messages = [message for message in prompt if isinstance(message, dict)]
        self.asked.append(messages)
        shown = re.search(r"\[Answer A\]\n(.*?)\n\[End.*\[Answer B\]\n(.*?)\n\[End", messages[-1]["content"], re.DOTALL)
        assert shown is not None
        said = self.opinion(shown[1], shown[2])
        if said == "too long":
            raise ContextOverflow("the prompt has too many tokens.")
        if said == "fail":
            return Generation("", [], "error", Metrics(), error="the server answered 500")
        return Generation(said, [], "eos", Metrics())


def says(which: str) -> str:
    return f"Both are fine. Some would say: Verdict: tie. Yet one is better.\n\nVerdict: {which}"


def first(a: str, b: str) -> str:
    return says("A")


def longer(a: str, b: str) -> str:
    return says("A" if len(a) > len(b) else "B" if len(b) > len(a) else "tie")


def better(a: str, b: str) -> str:
    return says("A" if "good" in a else "B" if "good" in b else "tie")


def record(strategy: str, question: int, text: str, **changes: object) -> AnswerRecord:
    category = "writing" if question % 2 else "generic"
    fields = {"finish_reason": "eos", "metrics": Metrics(seconds=1.0, new_tokens=5), "tokens": [], "repeat": 0}
    return AnswerRecord(question, category, f"Question {question}?", strategy, text=text, **fields | changes)  # type: ignore[arg-type]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A run of six questions: skeleton's answers are good on the first four, and jacobi's are plain decoding's."""
    header = RunHeader.create({"model": "m"}, environment())
    with RecordWriter(tmp_path, header) as writer:
        for question in range(6):
            writer.append(record(BASELINE, question, f"plain {question}"))
            writer.append(record("skeleton", question, f"{'good' if question < 4 else 'fair'} {question}, and longer"))
            writer.append(record("jacobi", question, f"plain {question}", lossless=True))
    return tmp_path


def test_the_last_verdict_counts() -> None:
    for text, expected in [
        ("Verdict: A", "A"),
        ("verdict: b", "B"),
        ("**Verdict:** Tie", "tie"),
        ("**Verdict: Answer B**", "B"),
        ("Verdict: A would be unfair. Verdict: B", "B"),
        ("Verdict: The answer A", "A"),
        ("My verdict is A", "A"),
        ("verdict: a\nAnd so it ends", "A"),
        ("Verdict: a tie", "tie"),
        ("Verdict: A tie.", "tie"),
        ("My verdict is a draw.", "tie"),
        ("Verdict: A and B are equally good", None),
        ("Verdict: B or A", None),
        ("Verdict: a close call", None),
        ("Verdict: Although both", None),
        ("A is better", None),
        ("", None),
    ]:
        assert verdict(text) == expected, text


@pytest.mark.parametrize("prompt", ["pair", "coherence", "diversity", "immersion", "integrity", "relevance"])
def test_every_prompt_shows_both_answers_and_asks_for_a_verdict(prompt: str) -> None:
    asked = Judge(Opinionated(first), prompt).ask("Why?", "since {{ x }}", "because")[-1]["content"]
    assert asked.index("Why?") < asked.index("since {{ x }}") < asked.index("because") < asked.index('"Verdict: tie"')
    others = [Judge(Opinionated(first), name).ask("Why?", "since {{ x }}", "because") for name in ("pair", "diversity")]
    assert sum(messages[-1]["content"] == asked for messages in others) == (prompt in ("pair", "diversity"))


def test_an_unknown_prompt_is_refused_before_anything_runs() -> None:
    with pytest.raises(UnknownName, match="judge/pair"):
        Judge(Opinionated(first), "pairs")


def test_every_pair_is_judged_in_both_orders_and_written_in_fastchats_format(folder: Path) -> None:
    critic = Opinionated(better)
    made = judge_run(read_run(folder), folder, Judge(critic))
    assert len(made) == 6 and len(critic.asked) == 12
    lines = [json.loads(line) for line in (folder / JUDGMENTS).read_text().splitlines()]
    assert set(lines[0]) == {
        *("question_id", "model_1", "model_2", "g1_winner", "g2_winner", "judge", "turn", "tstamp"),
        *("g1_user_prompt", "g1_judgment", "g2_user_prompt", "g2_judgment"),
    }
    line = next(line for line in lines if line["question_id"] == 0)
    assert (line["model_1"], line["model_2"], line["judge"]) == ("skeleton", BASELINE, ["critic", "pair"])
    assert (line["g1_winner"], line["g2_winner"]) == ("model_1", "model_1")
    assert line["g1_user_prompt"].index("good 0") < line["g1_user_prompt"].index("plain 0")
    assert line["g2_user_prompt"].index("plain 0") < line["g2_user_prompt"].index("good 0")
    assert line["g2_judgment"].endswith("Verdict: B")
    row = summarize(read_run(folder)).row("skeleton")
    (verdicts,) = row.judged
    assert (verdicts.strict.wins, verdicts.strict.ties, verdicts.strict.losses) == (4, 2, 0)
    assert verdicts.strict.net.estimate == pytest.approx(4 / 6) == verdicts.lenient.net.estimate
    assert verdicts.strict.net.low < 4 / 6 < verdicts.strict.net.high
    assert verdicts.categories == {"generic": pytest.approx(2 / 3), "writing": pytest.approx(2 / 3)}
    assert verdicts.first == 0.5 and verdicts.agreement == 1.0 and verdicts.longer > 2


def test_a_judge_that_likes_what_comes_first_decides_nothing(folder: Path) -> None:
    judge_run(read_run(folder), folder, Judge(Opinionated(first)))
    (verdicts,) = summarize(read_run(folder)).row("skeleton").judged
    assert (verdicts.strict.ties, verdicts.lenient.ties) == (6, 6)
    assert verdicts.first == 1.0 and verdicts.agreement == 0.0


def test_an_interrupted_run_goes_on_where_it_stopped(folder: Path) -> None:
    faults = {"5": "fail", "4": "no idea", "3": "too long"}
    failing = Opinionated(lambda a, b: next((fault for n, fault in faults.items() if n in a), better(a, b)))
    made = judge_run(read_run(folder), folder, Judge(failing))
    failed = {judgment.question_id: judgment.g1_judgment for judgment in made if judgment.failed}
    assert failed == {3: "the prompt has too many tokens.", 4: "no idea", 5: "the server answered 500"}
    (verdicts,) = summarize(read_run(folder)).row("skeleton").judged
    assert (verdicts.errors, verdicts.pairs) == (3, 3)
    with open(folder / JUDGMENTS, "a") as file:
        file.write('{"question_id": 3, "model_1": "skel')  # killed while writing
    again = Opinionated(better)
    made = judge_run(read_run(folder), folder, Judge(again))
    assert {judgment.question_id for judgment in made} == {3, 4, 5} and len(again.asked) == 6
    (verdicts,) = summarize(read_run(folder)).row("skeleton").judged
    assert (verdicts.errors, verdicts.pairs) == (0, 6)
    assert judge_run(read_run(folder), folder, Judge(again)) == ()
    assert len(judge_run(read_run(folder), folder, Judge(again, "coherence"))) == 6  # another judge
    assert [v.judge for v in summarize(read_run(folder)).row("skeleton").judged] == [
        "critic, pair",
        "critic, coherence",
    ]


def test_equal_answers_are_a_tie_without_asking(folder: Path) -> None:
    critic = Opinionated(first)
    made = judge_run(read_run(folder), folder, Judge(critic), strategies=["jacobi"])
    assert not critic.asked and {(j.g1_winner, j.g2_winner) for j in made} == {("tie", "tie")}


def test_what_cannot_be_judged_is_refused(folder: Path, tmp_path: Path) -> None:
    run = read_run(folder)
    with pytest.raises(InvalidRequest, match="no strategy 'lookahead'"):
        judge_run(run, folder, Judge(Opinionated(first)), strategies=["lookahead"])
    alone = Run(run.header, tuple(r for r in run.records if r.strategy == "skeleton"))
    with pytest.raises(InvalidRequest, match=BASELINE):
        judge_run(alone, folder, Judge(Opinionated(first)))
    exact = Run(run.header, tuple(r for r in run.records if r.strategy != "skeleton"))
    with pytest.raises(InvalidRequest, match="promises"):
        judge_run(exact, folder, Judge(Opinionated(first)))


def test_a_file_that_holds_something_else_is_an_error(folder: Path) -> None:
    (folder / JUDGMENTS).write_text('{"question_id": 1}\n')
    with pytest.raises(RecordError, match="line 1"):
        read_run(folder)
    (folder / JUDGMENTS).write_text("[1]\n")
    with pytest.raises(RecordError, match="line 1"):
        read_run(folder)


def test_judgments_survive_writing_and_reading(tmp_path: Path) -> None:
    judgment = Judgment("q", "a", "b", "tie", "model_2", ("m", "pair"), "p1", "j\n1", "p2", "ü", 1, 2.5)
    append_judgment(tmp_path, judgment)
    assert read_judgments(tmp_path) == (judgment,)
    assert read_judgments(tmp_path / "elsewhere") == ()


@pytest.mark.parametrize(
    ("g1", "g2", "strict", "lenient"),
    [
        ("model_1", "model_1", 1, 1),
        ("model_1", "tie", 0, 1),
        ("tie", "model_2", 0, -1),
        ("model_1", "model_2", 0, 0),
        ("tie", "tie", 0, 0),
        ("model_2", "model_2", -1, -1),
    ],
)
def test_the_two_conventions_for_ties(g1: Winner, g2: Winner, strict: int, lenient: int) -> None:
    judgment = Judgment(1, "a", "b", g1, g2, ("m", "pair"))
    assert (outcome(judgment, "strict"), outcome(judgment, "lenient")) == (strict, lenient)


def pairs_of(lengths: np.ndarray, wins: np.ndarray) -> list[JudgedPair]:
    winners: dict[int, Winner] = {1: "model_1", 0: "tie", -1: "model_2"}
    return [
        JudgedPair(Judgment(i, "a", "b", winners[int(w)], winners[int(w)], ("m", "p")), "c", (int(x), 500))
        for i, (x, w) in enumerate(zip(lengths, wins, strict=True))
    ]


def test_wins_that_come_from_length_vanish_at_equal_length_and_others_do_not() -> None:
    rng = np.random.default_rng(5)
    estimate = partial(statistics.bootstrap, resamples=999)
    lengths = rng.normal(650, 250, 250).clip(50)  # longer on the whole
    bought = judged("m", pairs_of(lengths, np.where(lengths > 500 + rng.normal(0, 60, 250), 1, -1)), estimate)
    assert bought.strict.net.estimate > 0.35
    assert bought.length_controlled.low < 0 < bought.length_controlled.high
    earned = judged("m", pairs_of(lengths, np.where(rng.random(250) < 0.8, 1, -1)), estimate)
    assert earned.length_controlled.estimate == pytest.approx(earned.strict.net.estimate, abs=0.1)
    assert earned.length_controlled.low > 0.3


def test_the_regression_finds_the_penalized_optimum_also_where_it_lies_far_out() -> None:
    rng = np.random.default_rng(1)
    for wins in (rng.choice([-1.0, 0.0, 1.0], 30), np.ones(30), np.sign(rng.normal(size=30))):
        longer = length_difference(rng.normal(100, 50, 30), np.full(30, 80.0))

        def loss(at: np.ndarray, longer: np.ndarray = longer, wins: np.ndarray = wins) -> float:
            z = at[0] + at[1] * longer
            return float(np.sum(np.logaddexp(0, z) - (wins + 1) / 2 * z) + RIDGE / 2 * np.sum(at**2))

        a = minimize(loss, np.zeros(2), tol=1e-10).x[0]
        expected = 2 / (1 + math.exp(-a)) - 1
        assert float(length_controlled(wins, longer)) == pytest.approx(expected, abs=1e-5)
    both = length_controlled(np.stack([wins, -wins]), np.stack([longer, -longer]))
    assert both.shape == (2,) and both[0] == pytest.approx(-both[1])


def test_nothing_judged_has_no_figures() -> None:
    nothing = judged("m", [])
    assert nothing.pairs == 0 and math.isnan(nothing.strict.net.estimate) and math.isnan(nothing.first)


def test_the_table_has_the_column_only_if_somebody_judged(folder: Path) -> None:
    assert "net_win_rate" not in [column.key for column in columns(summarize(read_run(folder)))]
    judge_run(read_run(folder), folder, Judge(Opinionated(better)))
    summary = summarize(read_run(folder))
    (column,) = [column for column in columns(summary) if column.key == "net_win_rate"]
    assert [column.cell(row) for row in summary.strategies] == ["–", "+0.67", "–"]


@pytest.mark.parametrize("named", ["", "records.jsonl"])
def test_the_command_line_judges_and_assesses(
    folder: Path, named: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked: list[LoadOptions] = []

    def load(self: LoadOptions, model: str) -> Backend:
        asked.append(self)
        return Opinionated(better)

    monkeypatch.setattr(LoadOptions, "load", load)
    monkeypatch.setenv("COLUMNS", "200")
    server = ["--base-url", "http://127.0.0.1:9/v1", "--concurrency", "3", "--no-prefill", "--prices", "1", "2", "3"]
    assert main(["judge", str(folder / named), "--model", "m", *server]) == 0
    out = capsys.readouterr().out
    assert "4/2/0" in out and "+0.67" in out and "critic, pair" in out
    (how,) = asked
    assert (how.concurrency, how.prefill, list(how.prices or ())) == (3, False, [1.0, 2.0, 3.0])
    assert main(["judge", str(folder), "--model", "m", "--prompt", "nothing"]) == 2
    assert "judge/nothing" in capsys.readouterr().err
    assert main(["assess", str(folder / named)]) == 0
    out = capsys.readouterr().out
    assert "coverage" in out and "cannot tell" in out and "perplexity" not in out
    lines = [json.loads(line) for line in (folder / "assessments.jsonl").read_text().splitlines()]
    assert len(lines) == 18 and {line["coverage"] for line in lines} == {0.0}
