"""Metrics are pure functions of the trace."""

from __future__ import annotations

from dataclasses import replace

import pytest

from decoding.trace import SourceShare, Step, acceptance_histogram, measure, origins, shifted, speculation


def step(number: int, sequence: int = 0, committed: int = 1, prefill: bool = False, drafted: int = 0) -> Step:
    return Step(
        step=number,
        sequence=sequence,
        start=float(number),
        plan=0.1,
        forward=0.5,
        commit=0.2,
        batch_sequences=2,
        batch_tokens=10,
        tokens=9 if prefill else 1 + drafted,
        drafted=drafted,
        accepted=committed - 1 if drafted else 0,
        committed=committed,
        prefill=prefill,
        reused=4 if prefill else 0,
    )


TRACE = [
    step(0, committed=0, prefill=True),
    step(1, committed=1, prefill=True),
    step(2, committed=3, drafted=4),
    step(3, committed=1, drafted=4),
    step(4, committed=2),
]


def test_tokens_per_forward_counts_target_passes_after_prefill() -> None:
    metrics = measure(TRACE, seconds=9.0, prompt_tokens=26)
    assert (metrics.new_tokens, metrics.forwards, metrics.prefill_tokens, metrics.reused_tokens) == (7, 3, 18, 8)
    assert metrics.tokens_per_forward == metrics.acceptance_length == 2
    assert (metrics.drafted, metrics.accepted, metrics.verifications) == (8, 2, 2)
    assert metrics.first_token_seconds == pytest.approx(1.8)
    assert metrics.forward_seconds == pytest.approx(2.5)
    assert acceptance_histogram(TRACE) == {1: 1, 2: 1, 3: 1}


def test_a_pass_shared_by_sequences_of_one_answer_counts_once() -> None:
    trace = [*TRACE, *(step(number, sequence=1) for number in (2, 3, 4, 5))]
    metrics = measure(trace, seconds=9.0, prompt_tokens=26)
    assert metrics.forwards == 4 and metrics.new_tokens == 11
    assert metrics.tokens_per_forward == 10 / 4 and metrics.acceptance_length == 10 / 7


def test_an_empty_trace_has_no_rates() -> None:
    metrics = measure([], seconds=0.0, prompt_tokens=3)
    assert metrics.tokens_per_forward == metrics.acceptance_length == metrics.first_token_seconds == 0


def test_shifting_moves_the_clock_only() -> None:
    moved = shifted(TRACE, 2.0)
    assert [s.start for s in moved] == [s.start + 2 for s in TRACE]
    assert measure(moved, seconds=9.0, prompt_tokens=26).forwards == 3


def test_every_token_has_an_origin() -> None:
    trace = [
        step(0, committed=1, prefill=True),
        replace(step(1, committed=3, drafted=4), drafter="suffix"),
        replace(step(2, committed=3, drafted=5), drafter="mixed", sources="suffix suffix+recycling"),
        step(3),
    ]
    assert [(o.step, o.drafter) for o in origins(trace)] == [
        (0, ""), (1, "suffix"), (1, "suffix"), (1, ""), (2, "suffix"), (2, "suffix+recycling"), (2, ""), (3, ""),
    ]  # fmt: skip
    cut = replace(step(4, committed=1, drafted=4), accepted=3)  # a stop string ended the answer within the guesses
    assert len(origins([cut])) == 1


def test_speculation_is_summed_up_by_position_and_source() -> None:
    trace = [
        step(0, committed=1, prefill=True),
        replace(step(1, committed=3, drafted=4), drafter="suffix", expected=2.5),
        replace(
            step(2, committed=2, drafted=5),
            drafter="mixed",
            sources="suffix+recycling",
            offered="suffix=3 recycling=4",
            expected=1.5,
        ),
        step(3),
    ]
    found = speculation(trace, seconds=4.0)
    assert (found.passes, found.acceptance_length, found.wasted) == (3, 2.0, 6)
    assert found.histogram == {1: 1, 2: 1, 3: 1} and found.by_position == ((2, 2), (2, 1), (2, 0))
    assert found.by_source == {"recycling": SourceShare(4, 1), "suffix": SourceShare(7, 3)}
    assert (found.expected, found.measured) == (4.0, 5)
    assert found.draft_seconds == pytest.approx(0.3) and found.verify_seconds == pytest.approx(2.1)
    assert found.other_seconds == pytest.approx(1.6)
    expected, measured = found.speedups(plain_seconds=0.8)
    assert measured == pytest.approx(6 * 0.8 / 2.4) and expected == pytest.approx(measured * 4 / 5)
    assert speculation([]).speedups(1.0) == (0.0, 0.0)
