"""The race: what is shown at a time is what was there at that time."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

import decoding
from decoding.race import Lane, picture, race, replay, result_table
from decoding.strategies import parse
from decoding.trace import Metrics, Step, measure
from decoding.types import Generation, SamplingParams
from tests.tiny import EOS, tiny_model, tiny_tokenizer


def lane(name: str, per_step: int, step: float, text: str = "word " * 20, error: str | None = None) -> Lane:
    """Twelve tokens after a prefill, `per_step` of them every `step` seconds."""
    trace = [Step(0, 0, 0.0, 0.0, step, 0.0, 1, 9, 9, 0, 0, 1, True)]
    for i in range(12 // per_step):
        drafted = per_step - 1
        trace.append(
            Step(i + 1, 0, (i + 1) * step, 0.0, step, 0.0, 1, per_step, per_step, drafted, drafted, per_step, False)
        )
    pieces = [(s.end, text[10 * i : 10 * i + 10]) for i, s in enumerate(trace)]
    metrics = measure(trace, seconds=trace[-1].end, prompt_tokens=9)
    shown = "".join(piece for _, piece in pieces)
    return Lane(
        name, Generation(shown, list(range(13)), "error" if error else "eos", metrics, trace, error=error), pieces
    )


def printed(shown: object, width: int = 90, height: int = 30) -> str:
    console = Console(file=io.StringIO(), width=width, height=height, force_terminal=True, color_system=None)
    console.print(shown)
    return console.file.getvalue()  # type: ignore[attr-defined]


def test_a_moment_holds_what_was_there_at_that_time() -> None:
    runner = lane("jacobi", 3, 1.0)
    assert runner.seconds == 5.0
    start, middle, end = runner.at(0.5), runner.at(3.0), runner.at(9.0)
    assert (start.text, start.tokens, start.tokens_per_forward, start.finished) == ("", 0, None, False)
    assert (middle.text, middle.tokens, middle.tokens_per_forward) == (("word " * 20)[:30], 7, 3.0)
    assert (end.text, end.tokens, end.tokens_per_forward, end.finished) == (runner.generation.text, 13, 3.0, True)


def test_a_backend_without_steps_shows_text_and_counts_at_the_end() -> None:
    made = Generation("ab", [], "eos", Metrics(seconds=2.0, new_tokens=7))
    runner = Lane("server", made, [(1.0, "a"), (2.0, "b")])
    assert (runner.at(1.5).text, runner.at(1.5).tokens) == ("a", None)
    assert (runner.at(2.0).text, runner.at(2.0).tokens, runner.at(2.0).tokens_per_forward) == ("ab", 7, None)


def test_answers_whose_tokens_nobody_knows_are_not_called_the_same() -> None:
    answers = [Generation(text, [], "eos", Metrics(seconds=1.0, new_tokens=2)) for text in ("Paris.", "Something else")]
    rows = printed(result_table([Lane(answer.text, answer, [(1.0, answer.text)]) for answer in answers])).splitlines()
    assert not any(" yes" in row for row in rows) and sum(row.rstrip().endswith("–") for row in rows) == 2


def test_the_picture_has_a_column_per_strategy_with_clock_and_tokens() -> None:
    console = Console(width=90, height=20)
    shown = printed(picture([lane("autoregressive", 1, 1.0), lane("jacobi", 3, 1.0)], 3.0, console), height=20)
    first = shown.splitlines()[0]
    assert first.index("autoregressive") < 45 < first.index("jacobi")
    assert "3.0 s · 3 tokens · 1.00 per forward" in shown
    assert "3.0 s · 7 tokens · 3.00 per forward" in shown
    assert len(shown.splitlines()) < 20


def test_strategies_that_do_not_fit_side_by_side_go_below() -> None:
    lanes = [lane(f"strategy-{i}", 1, 1.0) for i in range(5)]
    lines = printed(picture(lanes, 2.0, Console(width=72, height=40)), width=72, height=40).splitlines()
    assert sum("strategy-" in line for line in lines) == 3
    assert max(map(len, lines)) <= 72


def test_the_end_of_a_long_answer_is_what_is_seen() -> None:
    text = " ".join(f"w{i}" for i in range(400))
    made = Generation(text, [1], "eos", Metrics(seconds=1.0, new_tokens=1))
    shown = printed(
        picture([Lane("plain", made, [(1.0, text)])], 5.0, Console(width=40, height=10)), width=40, height=10
    )
    assert "w399" in shown and "w0 " not in shown


def test_a_replay_takes_the_recorded_time_and_needs_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr("decoding.race.time.perf_counter", lambda: now[0])
    monkeypatch.setattr("decoding.race.time.sleep", lambda seconds: now.__setitem__(0, now[0] + seconds))
    lanes = [lane("autoregressive", 1, 1.0), lane("jacobi", 3, 1.0)]
    screen = Console(file=io.StringIO(), width=90, height=20, force_terminal=True)
    replay(lanes, screen, speed=2.0)
    assert now[0] - 100 == pytest.approx(13 / 2, abs=0.2)  # the slower one's 13 s at twice the speed
    shown = screen.file.getvalue()  # type: ignore[attr-defined]
    assert "13.0 s" in shown and "5.0 s" in shown
    for quiet in (
        Console(file=io.StringIO(), width=90, height=20),
        Console(file=io.StringIO(), height=5, force_terminal=True),
    ):
        replay(lanes, quiet)
        assert quiet.file.getvalue() == ""  # type: ignore[attr-defined]


def test_the_table_ranks_and_says_who_wrote_the_same() -> None:
    other = lane("skeleton", 3, 0.5)
    other.generation.tokens[3] = 99
    failed = lane("broken", 3, 0.1, error="no")
    lanes = [lane("autoregressive", 1, 1.0), failed, lane("jacobi", 3, 1.0), other]
    rows = [line.split() for line in printed(result_table(lanes)).splitlines() if line[:1] in "abjs"][-5:-1]
    assert [row[0] for row in rows] == ["skeleton", "jacobi", "autoregressive", "broken"]
    assert rows[0][-1] == "no" and rows[1][-2:] == ["2.60×", "yes"]
    assert rows[3] == ["broken", "failed"]


def test_a_race_runs_every_strategy_alone_and_keeps_its_stream() -> None:
    model = tiny_model("llama", max_position_embeddings=512)
    lm = decoding.LocalBackend(model, tiny_tokenizer(), name="tiny", eos=[EOS], slots=4, capacity=512)
    strategies = [parse("autoregressive"), parse("jacobi(block_size=4)")]
    started: list[str] = []
    lanes = race(
        "Say it.", lm, strategies, SamplingParams(max_new_tokens=16), on_start=lambda s: started.append(str(s))
    )
    assert started == ["autoregressive", "jacobi(block_size=4)"]
    assert lanes[0].generation.tokens == lanes[1].generation.tokens
    for runner in lanes:
        assert "".join(text for _, text in runner.pieces) == runner.generation.text
        assert {step.batch_sequences for step in runner.generation.trace} == {1}
        times = [seconds for seconds, _ in runner.pieces]
        assert times == sorted(times)
