"""The figures of a report, by hand: ratios, repeats, failures, identity, acceptance, drift."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest

from decoding.report import BASELINE, Run, Summary, markdown, summarize
from decoding.report.environment import Environment
from decoding.report.header import Resumption
from decoding.report.measures import acceptance, first_difference, step_costs, time_shares
from decoding.report.pace import pace, pauses
from decoding.report.records import AnswerRecord
from decoding.trace import Metrics, Step
from tests.made_runs import answer, run_of, step
from tests.synthetic_run import synthetic_run


def test_speedups_are_the_ratios_they_are_named_after() -> None:
    run = run_of(answer(BASELINE, 1, 4.0), answer("x", 1, 1.0), answer(BASELINE, 2, 2.0), answer("x", 2, 2.0))
    row = summarize(run).row("x")
    assert row.seconds == 1.5
    assert row.comparison is not None
    assert row.comparison.speedup.estimate == 2.0
    assert row.comparison.speedup_geometric.estimate == pytest.approx(2.0)
    assert row.comparison.questions == 2
    assert summarize(run).row(BASELINE).comparison is None


def test_longer_answers_show_in_the_speedup_per_token() -> None:
    long = Metrics(seconds=4.0, new_tokens=40)
    row = summarize(run_of(answer(BASELINE, 1, 2.0), answer("x", 1, 4.0, metrics=long))).row("x")
    assert row.comparison is not None
    assert row.comparison.speedup.estimate == 0.5
    assert row.comparison.speedup_per_token.estimate == 2.0
    assert row.tokens == 40


def test_repeats_collapse_to_their_questions_mean() -> None:
    run = run_of(
        answer(BASELINE, 1, 4.0), answer("x", 1, 1.0), answer("x", 1, 3.0, repeat=1), answer(BASELINE, 2, 4.0),
        answer("x", 2, 4.0),
    )  # fmt: skip
    row = summarize(run).row("x")
    assert row.seconds == 3.0  # not (1 + 3 + 4) / 3
    assert row.answers == 3
    assert row.questions == 2
    assert row.comparison is not None
    assert row.comparison.speedup_geometric.estimate == pytest.approx(math.sqrt(2))


def test_failures_count_as_failures_and_nowhere_else() -> None:
    run = run_of(
        answer(BASELINE, 1, 2.0), answer("x", 1, 1.0), answer(BASELINE, 2, 2.0),
        answer("x", 2, 0.001, finish_reason="error", error="out of memory."),
    )  # fmt: skip
    found = summarize(run)
    row = found.row("x")
    assert (row.failures, row.answers, row.seconds) == (1, 2, 1.0)
    assert row.comparison is not None
    assert row.comparison.questions == 1
    assert any("x: 1 of 2 answers failed" in notice and "out of memory" in notice for notice in found.notices)


def test_a_strategy_that_never_answered_has_a_row_without_figures() -> None:
    run = run_of(answer(BASELINE, 1, 2.0), answer("x", 1, 1.0, finish_reason="error", error="no."))
    row = summarize(run).row("x")
    assert row.comparison is None
    assert math.isnan(row.seconds)
    assert "–" in markdown(summarize(run))


def test_identity_and_the_first_difference_are_counted() -> None:
    run = run_of(
        answer(BASELINE, 1, 2.0), answer("x", 1, 1.0, lossless=True),
        answer(BASELINE, 2, 2.0), answer("x", 2, 1.0, lossless=True, tokens=[1, 9, 3], text="one"),
    )  # fmt: skip
    found = summarize(run)
    comparison = found.row("x").comparison
    assert comparison is not None
    assert (comparison.identical, comparison.compared) == (1, 2)
    assert (comparison.differences[0].question_id, comparison.differences[0].position) == (2, 1)
    assert comparison.similarity == pytest.approx((1 + 2 / 3) / 2)
    assert any("x promises" in notice and "token 1" in notice for notice in found.notices)


def test_no_promise_no_notice() -> None:
    run = run_of(answer(BASELINE, 1, 2.0), answer("x", 1, 1.0, tokens=[4]))
    assert summarize(run).notices == ()


def test_repeats_are_compared_with_the_same_repeat_of_plain_decoding() -> None:
    run = run_of(
        answer(BASELINE, 1, 2.0), answer(BASELINE, 1, 2.0, repeat=1, tokens=[7]),
        answer("x", 1, 1.0), answer("x", 1, 1.0, repeat=1, tokens=[7]), answer("x", 1, 1.0, repeat=2),
    )  # fmt: skip
    comparison = summarize(run).row("x").comparison
    assert comparison is not None
    assert (comparison.identical, comparison.compared) == (3, 3)


@pytest.mark.parametrize(
    ("tokens", "reference", "position"),
    [([1, 2], [1, 2], None), ([], [], None), ([1, 3], [1, 2], 1), ([1], [1, 2], 1), ([1, 2, 3], [1, 2], 2)],
)
def test_the_first_difference(tokens: list[int], reference: list[int], position: int | None) -> None:
    assert first_difference(tokens, reference) == position


def test_without_plain_decoding_there_are_figures_but_no_speedups() -> None:
    found = summarize(run_of(answer("x", 1, 1.0), answer("y", 1, 2.0)))
    assert found.row("x").seconds == 1.0
    assert found.row("x").comparison is None
    assert any("no speed-ups" in notice for notice in found.notices)


def test_quality_is_the_mean_of_the_questions_that_have_one() -> None:
    run = run_of(
        answer("x", 1, 1.0, quality={"exact": 1.0, "judge": 0.0}), answer("x", 2, 1.0, quality={"exact": 0.0}),
        answer("x", 3, 1.0),
    )  # fmt: skip
    row = summarize(run).row("x")
    assert row.quality is not None
    assert row.quality.estimate == 0.25
    assert row.measures == {"exact": 0.5, "judge": 0.0}


def test_peak_memory_is_the_largest() -> None:
    run = run_of(answer("x", 1, 1.0, peak_memory=5), answer("x", 2, 1.0, peak_memory=9), answer("x", 3, 1.0))
    assert summarize(run).row("x").peak_memory == 9


def test_acceptance_is_pooled_over_passes() -> None:
    first = answer("x", 1, 1.0, trace=(step(0, 5, 1, prefill=True, drafted=0), step(1, 4, 4), step(2, 4, 1)))
    second = answer("x", 2, 1.0, trace=(step(0, 1, 1),))
    found = acceptance([first, second])
    assert found.length == 2.0  # (4 + 1 + 1) / 3 passes
    assert found.histogram == {1: 2, 4: 1}
    assert found.by_position == ((2, 1), (2, 1), (2, 1))
    assert acceptance([answer("x", 1, 1.0)]).length == 1.0  # no trace: as the metrics say
    assert acceptance([]).length == 0.0


def test_positions_end_one_beyond_the_deepest_confirmed_guess() -> None:
    found = acceptance([answer("x", 1, 1.0, trace=(step(1, 61, 3), step(2, 61, 1)))])
    assert found.by_position == ((2, 1), (2, 1), (2, 0))


def test_the_cost_of_a_step_leaves_out_prompts_and_counts_a_shared_step_once() -> None:
    trace = (
        step(0, 9, 1, prefill=True), step(1, 2, 1, batch_tokens=4), step(1, 2, 1, batch_tokens=4, sequence=1),
        step(2, 2, 1, batch_tokens=4, forward=3.0), step(3, 1, 1), step(3, 8, 0, prefill=True, sequence=2),
    )  # fmt: skip
    (cost,) = step_costs([answer("x", 1, 1.0, trace=trace)])
    assert (cost.tokens, cost.steps, cost.seconds) == (4, 2, 2.0)


def test_the_cost_of_a_step_counts_a_step_of_several_answers_once() -> None:
    def made(question: int, started: float, *trace: Step) -> AnswerRecord:
        return answer("x", question, 1.0, started=started, trace=trace)

    def shared(number: int, forward: float) -> Step:
        return step(number, 1, 1, batch_tokens=2, batch_sequences=2, forward=forward)

    together = [
        made(1, 0.0, shared(1, 1.0), shared(2, 9.0), shared(3, 1.0)),
        made(2, 0.0, shared(1, 1.0), step(2, 1, 1, prefill=True, batch_tokens=2), shared(3, 1.0)),
    ]
    (cost,) = step_costs([*together, made(3, 5.0, shared(1, 4.0))])  # the engine's numbers began again
    assert (cost.tokens, cost.steps, cost.seconds) == (2, 3, 1.0)


def test_shares_add_up_to_the_wall_clock() -> None:
    metrics = Metrics(seconds=10.0, plan_seconds=1.0, forward_seconds=6.0, commit_seconds=1.0)
    shares = time_shares([answer("x", 1, 10.0, metrics=metrics)])
    assert (shares.plan, shares.forward, shares.commit, shares.other) == (1.0, 6.0, 1.0, 2.0)


def test_drift_and_disturbance_of_the_machine_are_reported() -> None:
    assert not any("drifted" in notice for notice in summarize(synthetic_run(20), resamples=99).notices)
    drifted = synthetic_run(20, repeats=2, drift=0.5)
    assert any("slower" in notice and "drifted" in notice for notice in summarize(drifted, resamples=99).notices)
    steady = synthetic_run(20)
    slow = [
        replace(r, trace=tuple(replace(s, forward=3 * s.forward) for s in r.trace))
        if r.question_id == 7 and r.strategy == BASELINE
        else r
        for r in steady.records
    ]
    notices = summarize(replace(steady, records=tuple(slow)), resamples=99).notices
    assert any("far from their usual time on question 7:" in notice for notice in notices)


def test_a_pause_lies_where_the_run_was_resumed() -> None:
    made = run_of(*(answer(BASELINE, q, 2.0, started=s) for q, s in ((1, 0.0), (2, 2.0), (3, 104.0), (4, 106.0))))
    sessions = [Resumption("2026-01-01T00:00:00+00:00", answers, Environment()) for answers in (0, 2, 2, 4)]
    assert pauses(replace(made, resumed=tuple(sessions))) == [(2, 100.0)]  # where answers followed, and once
    assert pauses(made) == []
    failed = replace(made, records=tuple(replace(r, order=r.order + (r.order > 0)) for r in made))  # the second did
    assert pauses(replace(failed, resumed=tuple(sessions[1:2]))) == [(2, 0.0)]
    assert pauses(replace(failed, resumed=(replace(sessions[0], answers=3),))) == [(3, 100.0)]


def test_the_pace_leaves_out_failures_and_other_strategies() -> None:
    found = pace(run_of(answer("x", 1, 1.0), answer(BASELINE, 1, 3.0), answer(BASELINE, 2, 1.0, error="no.")))
    assert [(r.question_id, seconds) for r, seconds in zip(found.answers, found.seconds, strict=True)] == [(1, 0.3)]
    assert pace(run_of(answer("x", 1, 1.0))).answers == ()


def test_the_summary_is_a_pure_function_of_the_records(run: Run, summary: Summary) -> None:
    assert repr(summarize(run, resamples=499)) == repr(summary)  # nan is not equal to itself
    shuffled = replace(run, records=tuple(sorted(run.records, key=lambda r: (r.order * 7919) % 1000)))
    other = summarize(shuffled, resamples=499)
    for row in summary.strategies:
        assert other.row(row.strategy).seconds == pytest.approx(row.seconds)
        assert other.row(row.strategy).acceptance == row.acceptance
