"""Runs made by hand and made up, and the pages and the browser that tests of reports share."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from decoding.report import BASELINE, AnswerRecord, Run, Summary, summarize, write_report
from decoding.trace import Metrics, Step
from tests.chromium import Chromium, find_chromium
from tests.synthetic_run import synthetic_run

HOSTILE = "</script><script>alert(1)</script><!-- <b>&amp; \"'` \u2028 {{ 7 * 7 }} [a](b) | ${x}"
BROWSER = find_chromium()
in_browser = pytest.mark.skipif(BROWSER is None, reason="no Chromium on this machine")


def answer(strategy: str, question: int, seconds: float, **changes: object) -> AnswerRecord:
    metrics = Metrics(seconds=seconds, new_tokens=10, forwards=10, tokens_per_forward=1.0, acceptance_length=1.0)
    record = AnswerRecord(question, "c", "q?", strategy, 0, "one two", [1, 2, 3], "eos", metrics)
    return replace(record, **changes)  # type: ignore[arg-type]


def run_of(*records: AnswerRecord) -> Run:
    return replace(synthetic_run(1), records=tuple(replace(r, order=i) for i, r in enumerate(records)))


def step(number: int, tokens: int, committed: int, **changes: object) -> Step:
    drafted = max(0, tokens - 1)
    made = Step(
        number, 0, 0.0, 0.1, 1.0, 0.1, 1, tokens, tokens, drafted, min(drafted, committed - 1), committed, False
    )
    return replace(made, **changes)  # type: ignore[arg-type]


def hostile_run() -> Run:
    made = synthetic_run(3, tokens=(5, 8))
    records = tuple(
        replace(
            r,
            question=HOSTILE,
            category=HOSTILE,
            text=HOSTILE,
            pieces=[HOSTILE, *r.pieces[1:]],
            strategy=r.strategy if r.strategy == BASELINE else f"{r.strategy}{HOSTILE}",
            error=HOSTILE if r.question_id == 3 else None,
            quality={HOSTILE: 0.5, "other": 0.4},
        )
        for r in made.records
    )
    return Run(replace(made.header, config={HOSTILE: HOSTILE}), records, HOSTILE)


@pytest.fixture(scope="session")
def run() -> Run:
    return synthetic_run(16, repeats=2, failures=1)


@pytest.fixture(scope="session")
def summary(run: Run) -> Summary:
    return summarize(run, resamples=499)


@pytest.fixture(scope="session")
def page(run: Run, summary: Summary, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_report(run, tmp_path_factory.mktemp("page") / "report.html", summary=summary)


@pytest.fixture(scope="session")
def browser() -> Iterator[Chromium]:
    assert BROWSER is not None
    with Chromium(BROWSER) as opened:
        yield opened


@pytest.fixture
def chromium(browser: Chromium) -> Iterator[Chromium]:
    """The browser in a window of usual size; the test fails if the page reported an error."""
    browser.errors.clear()
    browser.show()
    yield browser
    assert browser.errors == []
