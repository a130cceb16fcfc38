"""Comparisons: who answers what, when and with which seed; what is recorded of it; and how it survives a kill."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import pytest

import decoding
from decoding.backends.base import Backend, OnText
from decoding.comparison import Comparison, execute
from decoding.config import RunConfig, read_run_file
from decoding.errors import CapabilityError, InvalidRequest, RecordError
from decoding.options import Schedule
from decoding.questions import Question
from decoding.report import RecordWriter, Run, read_run, summarize
from decoding.strategies import Strategy, TokenStrategy, parse
from decoding.trace import Metrics
from decoding.types import Generation, Prompt, SamplingParams
from tests.tiny import EOS, tiny_model, tiny_tokenizer

PLAIN, JACOBI = parse("autoregressive"), parse("jacobi")


@dataclass
class Script(Backend):
    """Answers a message with what is written for it, and notes what it was asked."""

    answers: dict[str, str]
    seconds: float = 0.01
    name = "script"
    capabilities: ClassVar[frozenset[str]] = frozenset({"text", "tokens"})

    def __post_init__(self) -> None:
        self.asked: list[tuple[str, int, str]] = []

    async def complete(
        self,
        prompt: Prompt,
        params: SamplingParams,
        strategy: TokenStrategy,
        *,
        prefill: str = "",
        on_text: OnText | None = None,
    ) -> Generation:
        text = prompt if isinstance(prompt, str) else prompt[-1]["content"]  # type: ignore[index]
        self.asked.append((text, params.seed, str(strategy)))
        if text == "too long":
            raise InvalidRequest("the question does not fit.")
        return Generation(self.answers.get(text, text), [1], "eos", Metrics(seconds=self.seconds, new_tokens=1))


def comparison(
    *questions: Question | str, strategies: tuple[Strategy, ...] = (PLAIN,), **schedule: object
) -> Comparison:
    asked = [q if isinstance(q, Question) else Question(q, "c", (q,)) for q in questions]
    return Comparison(asked, strategies, SamplingParams(), Schedule(**{"warm_up": 0, **schedule}))  # type: ignore[arg-type]


def recorded(made: Comparison, folder: Path, backend: Backend | None = None) -> Run:
    execute(made, backend or Script({}), folder)
    return read_run(folder)


@pytest.fixture(scope="module")
def lm() -> decoding.LocalBackend:
    model = tiny_model("llama", max_position_embeddings=512)
    return decoding.LocalBackend(model, tiny_tokenizer(), name="tiny", eos=[EOS], slots=4, capacity=512)


# Who answers what, when


def test_strategies_take_turns_and_the_first_one_moves_on(tmp_path: Path) -> None:
    run = recorded(comparison("a", "b", "c", strategies=(PLAIN, JACOBI), repeats=2), tmp_path)
    order = [(r.repeat, r.question_id, r.strategy[0]) for r in run]
    assert order == [
        *[(0, "a", "a"), (0, "a", "j"), (0, "b", "j"), (0, "b", "a"), (0, "c", "a"), (0, "c", "j")],
        *[(1, "a", "j"), (1, "a", "a"), (1, "b", "a"), (1, "b", "j"), (1, "c", "j"), (1, "c", "a")],
    ]
    assert [r.order for r in run] == list(range(12))


def test_a_seed_belongs_to_question_and_repeat_and_not_to_the_neighbours(tmp_path: Path) -> None:
    many = recorded(comparison("a", "b", strategies=(PLAIN, JACOBI), repeats=2), tmp_path / "many")
    alone = recorded(comparison("b", repeats=2), tmp_path / "alone")
    seeds = {(r.question_id, r.repeat): r.seed for r in many}
    assert len(set(seeds.values())) == 4
    assert all(seeds[r.question_id, r.repeat] == r.seed for r in (*many, *alone))


def test_a_sampled_answer_does_not_depend_on_which_other_questions_are_asked(lm: decoding.LocalBackend) -> None:
    params = SamplingParams(max_new_tokens=8, temperature=1.0)
    asked = [Question(str(i), "c", (f"Question {i}?",)) for i in range(4)]

    def answers(questions: list[Question], streams: int) -> dict[int | str, object]:
        made = decoding.compare(
            questions, lm, strategies=["autoregressive"], params=params, schedule=Schedule(streams=streams, warm_up=0)
        )
        return {record.question_id: record.tokens for record in made}

    together = answers(asked, 4)
    assert answers(asked[2:], 1) == {key: together[key] for key in ("2", "3")}
    assert len(set(map(str, together.values()))) == 4


def test_the_machine_rests_before_every_turn_and_warms_up_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rests: list[float] = []
    monkeypatch.setattr(time, "sleep", rests.append)
    backend = Script({})
    recorded(comparison("a", "b", strategies=(PLAIN, JACOBI), warm_up=2, cool_down=0.5), tmp_path, backend)
    assert [rest for rest in rests if rest >= 0.5] == [0.5] * 4  # others wait for git
    assert [text for text, *_ in backend.asked] == ["a"] * 6 + ["b"] * 2  # 2 × 2 to warm up, then the answers


def test_what_cannot_run_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    backend = Script({})
    backend.capabilities = frozenset({"text"})  # type: ignore[misc]
    with pytest.raises(CapabilityError):
        execute(comparison("a", strategies=(JACOBI,)), backend, tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: comparison("a", strategies=(PLAIN, PLAIN)), "listed twice"),
        (lambda: comparison(), "at least one question"),
        (lambda: comparison("a", "a"), "the same id"),
        (lambda: Question("a", "c", ()), "question 'a' has no turns"),
        (lambda: comparison("fine", "a\udcff"), "UTF-8"),
        (lambda: decoding.compare([1, 2], Script({})), "question '1': a turn must be text"),  # type: ignore[list-item]
        (lambda: Schedule(streams=0), "streams must be at least 1"),
        (lambda: Schedule(cool_down=-1.0), "cool_down"),
    ],
)
def test_nonsense_is_refused(make: object, message: str) -> None:
    with pytest.raises(InvalidRequest, match=message):
        make()  # type: ignore[operator]


# What is recorded


def test_every_turn_is_scored_against_its_own_reference(tmp_path: Path) -> None:
    question = Question("q", "math", ("3 + 4?", "and 5?", "thanks"), ("7", "12", ""), "numeric")
    run = recorded(
        comparison(question), tmp_path, Script({"3 + 4?": "It is 7.", "and 5?": "13, I think", "thanks": "12"})
    )
    (record,) = run
    assert record.quality == {"numeric": 0.5}
    assert list(record.turns) == ["It is 7.", "13, I think", "12"]
    assert record.text == "It is 7.\n\n13, I think\n\n12"


def test_a_turn_that_fails_ends_the_question_and_keeps_the_turns_before(tmp_path: Path) -> None:
    question = Question("q", "math", ("3 + 4?", "too long"), ("7", "8"), "numeric")
    run = recorded(comparison(question, "fine"), tmp_path, Script({"3 + 4?": "7"}))
    failed, fine = run
    assert failed.failed
    assert failed.error == "the question does not fit."
    assert list(failed.turns) == ["7", ""]
    assert failed.quality == {"numeric": 0.5}
    assert not fine.failed


def test_the_header_holds_configuration_and_latency_and_the_folder_a_run_file(tmp_path: Path) -> None:
    class Latency:
        def cost(self, tokens: int, sequences: int, context: int) -> float:
            return 0.01 * tokens * sequences + context / 128

    backend = Script({})
    backend.latency = Latency()  # type: ignore[attr-defined]
    config = RunConfig(questions="default", limit=1, strategies=("autoregressive",), schedule=Schedule(warm_up=0))
    execute(Comparison.of(config), backend, tmp_path, config=config)
    header = read_run(tmp_path).header
    assert header.latency[:2] == ((1, 1.01), (2, 1.02))
    assert RunConfig.of_header(header.config) == config == read_run_file(tmp_path / "config.toml")
    assert header.config["question_ids"] == ["generic-01"]


def test_one_turn_and_one_strategy_need_no_list() -> None:
    question = Question("1", "x", "abc")  # type: ignore[arg-type]
    assert question.turns == ("abc",)
    for strategy in ("autoregressive", PLAIN):
        (record,) = decoding.compare([question], Script({}), strategies=strategy)
        assert (record.question, record.strategy) == ("abc", "autoregressive")


def test_compare_takes_prompts_and_gives_a_run(lm: decoding.LocalBackend, tmp_path: Path) -> None:
    params = SamplingParams(max_new_tokens=6)
    run = decoding.compare(["One?", "Two?"], lm, strategies=["autoregressive", JACOBI], params=params)
    assert len(run) == 4
    assert {record.question_id for record in run} == {"1", "2"}
    compared = summarize(run).row("jacobi").comparison
    assert compared is not None
    assert compared.identical == 2
    shown = run._repr_html_()
    assert "jacobi" in shown and "<table>" in shown and "failures" not in shown
    decoding.compare(["One?"], lm, strategies=["autoregressive"], params=params, output=tmp_path)
    assert len(decoding.read_run(tmp_path)) == 1
    with pytest.raises(RecordError, match="already holds records"):
        decoding.compare(["One?"], lm, strategies=["autoregressive"], params=params, output=tmp_path)


def test_two_runs_of_one_configuration_have_the_same_tokens(lm: decoding.LocalBackend) -> None:
    strategies = ["autoregressive", "speculative(draft_length=4)", "jacobi(block_size=4)", "lookahead(adaptive=false)"]

    def tokens(seed: int) -> list[tuple[object, ...]]:
        params = SamplingParams(max_new_tokens=12, temperature=0.8, seed=seed)
        made = decoding.compare(["Say la la la.", "And ba ba ba?"], lm, strategies=strategies, params=params)
        return [(*record.key, *record.tokens) for record in made]

    assert tokens(seed=3) == tokens(seed=3)
    assert tokens(seed=3) != tokens(seed=4)


def test_a_notebook_shows_an_answer_as_text_and_never_as_markup() -> None:
    made = Generation("<script>alert(1)</script>", [1], "error", Metrics(new_tokens=1, seconds=0.5), error="<b>")
    shown = made._repr_html_()
    assert "<script>" not in shown and "<b>" not in shown
    assert "&lt;script&gt;" in shown and "1 tokens · 0.50 s" in shown


@pytest.mark.parametrize("package", ["pandas", "polars"])
def test_records_become_data_frames(package: str, lm: decoding.LocalBackend) -> None:
    run = decoding.compare(["One?"], lm, strategies=["autoregressive", JACOBI], params=SamplingParams(max_new_tokens=6))
    try:
        __import__(package)
    except ImportError:
        with pytest.raises(RecordError, match=f"pip install {package}"):
            getattr(run, f"to_{package}")()
        return
    answers, steps = getattr(run, f"to_{package}")(), getattr(run, f"to_{package}")("steps")
    assert len(answers) == 2
    assert list(answers["strategy"]) == [record.strategy for record in run]
    assert len(steps) == sum(len(record.trace) for record in run)
    assert sum(steps["committed"]) == sum(record.metrics.new_tokens for record in run)


# Interrupted


class _Killed(BaseException):
    """Ends a run like a signal would: nothing handles it."""


def interrupted(made: Comparison, folder: Path, after: int) -> None:
    count = 0

    def stop(question: object, strategy: object, record: object) -> None:
        nonlocal count
        count += record is not None
        if count > after:
            raise _Killed

    with pytest.raises(_Killed):
        execute(made, Script({}), folder, progress=stop)


def test_a_resumed_run_makes_what_is_missing_and_its_clock_goes_on(tmp_path: Path) -> None:
    made = comparison("a", "b", "c", strategies=(PLAIN, JACOBI))
    interrupted(made, tmp_path, after=2)
    before = read_run(tmp_path).records
    time.sleep(0.05)
    backend = Script({})
    execute(made, backend, tmp_path, resume=True)
    run = read_run(tmp_path)
    assert run.records[:3] == before
    assert len(backend.asked) == 3
    assert len({record.key for record in run}) == len(run) == 6
    assert [record.order for record in run] == list(range(6))
    started = [record.started for record in run]
    assert started == sorted(started)
    assert started[3] >= before[-1].started + before[-1].metrics.seconds
    assert [session.answers for session in run.resumed] == [3]
    assert not any("another environment" in notice for notice in summarize(run).notices)


def test_answers_that_failed_are_made_again_and_the_later_line_counts(tmp_path: Path) -> None:
    class Outage(Script):
        down = True

        async def complete(self, prompt: Prompt, *others: Any, **options: Any) -> Generation:
            if self.down and prompt[-1]["content"] in "bc":  # type: ignore[index]
                return Generation("", [], "error", Metrics(), error="500: no server.")
            return await super().complete(prompt, *others, **options)

    made, backend = comparison("a", "b", "c", "d", strategies=(PLAIN, JACOBI), repeats=2), Outage({})
    recorded(made, tmp_path, backend)
    execute(made, backend, tmp_path, resume=True)  # it fails once more
    whole = recorded(made, tmp_path / "whole")
    failed = read_run(tmp_path)
    assert [record.key for record in failed if record.failed] == [r.key for r in whole if r.question_id in ("b", "c")]
    backend.down, backend.asked = False, []
    shown: list[object] = []
    execute(made, backend, tmp_path, resume=True, progress=lambda *seen: shown.append(seen[2].key) if seen[2] else None)
    run = read_run(tmp_path)
    assert sorted(text for text, *_ in backend.asked) == [*"bbbbcccc"]
    assert sorted(map(str, shown)) == sorted(str(record.key) for record in run)
    assert [(record.key, record.text) for record in run] == [(record.key, record.text) for record in whole]
    assert [session.answers for session in run.resumed] == [16, 24]
    assert sorted(record.order for record in run) == [
        *(r.order for r in whole if r.question_id in ("a", "d")),
        *range(24, 32),
    ]
    assert not any("failed" in notice for notice in summarize(run).notices)
    with (
        RecordWriter(tmp_path, run.header, resume=True) as writer,
        pytest.raises(RecordError, match="already recorded"),
    ):
        writer.append(run.records[2])


def test_a_run_that_is_complete_asks_nothing_more(tmp_path: Path) -> None:
    made = comparison("a", warm_up=1)
    recorded(made, tmp_path)
    backend = Script({})
    execute(made, backend, tmp_path, resume=True)
    assert backend.asked == []


def test_a_pause_shows_in_the_clock(tmp_path: Path) -> None:
    made = comparison("a", "b")
    interrupted(made, tmp_path, after=0)
    path = tmp_path / "records.jsonl"
    header, *lines = path.read_text().splitlines(keepends=True)
    data = json.loads(header)
    data["created"] = "2020-01-01T00:00:00+00:00"
    path.write_text(json.dumps(data, separators=(",", ":")) + "\n" + "".join(lines))
    execute(made, Script({}), tmp_path, resume=True)
    first, second = read_run(tmp_path)
    assert first.started < 10
    assert second.started > 365 * 24 * 3600


def test_a_move_to_another_environment_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = comparison("a", "b")
    interrupted(made, tmp_path, after=0)
    here = decoding.comparison.environment
    monkeypatch.setattr("decoding.comparison.environment", lambda **names: replace(here(**names), git_commit="f00"))
    execute(made, Script({}), tmp_path, resume=True)
    (notice,) = [notice for notice in summarize(read_run(tmp_path)).notices if "another environment" in notice]
    assert "git_commit" in notice and "load" not in notice


def test_another_configuration_is_refused_with_what_differs(tmp_path: Path) -> None:
    recorded(comparison("a"), tmp_path)
    for other, key in [
        (comparison("b"), "question_ids"),
        (comparison("a", repeats=2), "schedule"),
        (comparison(Question("a", "c", ("changed",))), "questions_hash"),
    ]:
        with pytest.raises(RecordError, match=rf"another configuration \(different: .*{key}"):
            execute(other, Script({}), tmp_path, resume=True)
    assert len(read_run(tmp_path)) == 1


def test_a_run_killed_in_its_first_line_starts_again(tmp_path: Path) -> None:
    made = comparison("a")
    recorded(made, tmp_path)
    path = tmp_path / "records.jsonl"
    path.write_bytes(path.read_bytes()[:100])
    assert len(recorded(made, tmp_path)) == 1


def test_a_file_that_holds_something_else_is_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "records.jsonl"
    path.write_text("my notes")
    with pytest.raises(RecordError, match="line 1: not a header"):
        recorded(comparison("a"), tmp_path)
    assert path.read_text() == "my notes"


@pytest.mark.slow
def test_killed_at_random_moments_a_comparison_ends_like_one_left_alone(tmp_path: Path) -> None:
    tiny_model("llama", max_position_embeddings=2048).save_pretrained(tmp_path / "model")
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    questions = tmp_path / "questions.txt"
    questions.write_text("".join(f"What is {i} + {i}?\n" for i in range(40)))
    options = ["--suite", str(questions), "--model", str(tmp_path / "model"), "--max-new-tokens", "4", "--kills", "3"]
    done = subprocess.run(
        [sys.executable, "-m", "experiments.kill_resume", *options],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "killed 3 times" in done.stdout
    assert "same tokens and text: 120 of 120" in done.stdout
