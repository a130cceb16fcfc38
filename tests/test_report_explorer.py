"""Choosing a question on the page: its answers, their colors, the timeline and its replay."""

from __future__ import annotations

from pathlib import Path

from decoding.report import Run, Summary
from tests.chromium import Chromium
from tests.made_runs import in_browser
from tests.synthetic_run import STRATEGIES


@in_browser
def test_answers_are_shown_whole_and_colored_by_their_steps(chromium: Chromium, page: Path, run: Run) -> None:
    chromium.open(page)
    records = [r for r in run.records if r.question_id == 1 and r.repeat == 0]
    texts = chromium.evaluate(
        "[...document.querySelectorAll('.answer')]"
        ".map(a => [...a.querySelectorAll('.text')].map(t => t.textContent).join(''))"
    )
    assert texts == ["".join(record.pieces) for record in records]
    groups = chromium.evaluate(
        "[...document.querySelectorAll('.answer')].map(a => a.querySelectorAll('.piece').length)"
    )
    assert groups == [sum(s.committed > 0 for s in record.trace) for record in records]
    bars = chromium.evaluate("[...document.querySelectorAll('.lanes')].map(l => l.querySelectorAll('.step').length)")
    assert bars == [len(record.trace) for record in records]
    labels = chromium.evaluate("[...document.querySelectorAll('#timeline text.faint')].map(t => t.textContent)")
    assert labels == list(records[-1].parts)
    lanes = chromium.evaluate("document.querySelectorAll('[data-numbers=timeline] tbody tr').length")
    assert lanes == sum(len({step.sequence for step in record.trace}) for record in records)
    for way in ("step", "origin", "drafter", "part", "time"):
        chromium.evaluate(f"paint.value = '{way}', paint.dispatchEvent(new Event('change'))")
        assert chromium.evaluate("document.querySelectorAll('.answer .text')[1].textContent") == "".join(
            records[1].pieces
        )
    chromium.evaluate("paint.value = 'plain', paint.dispatchEvent(new Event('change'))")
    assert chromium.evaluate("document.querySelector('.answer .text').textContent") == records[0].text
    assert chromium.evaluate("document.getElementById('repeat-label').offsetWidth") > 0


@in_browser
def test_confirmed_guesses_and_own_tokens_can_be_told_apart(chromium: Chromium, page: Path, run: Run) -> None:
    chromium.open(page)
    record = next(r for r in run.records if r.question_id == 1 and r.strategy == STRATEGIES[1])
    chromium.evaluate("paint.value = 'origin', paint.dispatchEvent(new Event('change'))")
    marked = chromium.evaluate(
        "[...document.querySelectorAll('.answer')[1].querySelectorAll('.piece.d4')].map(p => p.textContent.trim())"
    )
    pieces, expected = iter(record.pieces), []
    for step in record.trace:
        gained = [next(pieces) for _ in range(step.committed)]
        expected += ["".join(gained[: step.accepted]).strip()] * bool(step.accepted)
    assert marked == expected
    assert marked


@in_browser
def test_a_bar_and_its_words_light_up_together(chromium: Chromium, page: Path) -> None:
    chromium.open(page)
    chromium.evaluate(
        "document.querySelector('.piece[data-link=\"1-5\"]')"
        ".dispatchEvent(new PointerEvent('pointermove', {bubbles: true}))"
    )
    linked = "[...document.querySelectorAll('.linked')].map(n => n.tagName.toLowerCase() + n.dataset.link)"
    assert chromium.evaluate(linked) == ["g1-5", "span1-5"]
    chromium.evaluate("document.body.dispatchEvent(new PointerEvent('pointermove', {bubbles: true}))")
    assert chromium.evaluate(linked) == []


@in_browser
def test_arrow_keys_go_from_step_to_step(chromium: Chromium, page: Path) -> None:
    chromium.open(page)
    chromium.evaluate("timeline.focus()")
    said = "document.getElementById('step').textContent"
    assert chromium.evaluate(said) == ""
    chromium.press("ArrowRight", 39)
    first = chromium.evaluate(said)
    assert first.startswith(f"{STRATEGIES[0]}, step ") and "prompt tokens" in first
    chromium.press("ArrowRight", 39)
    assert chromium.evaluate(said) != first
    linked = "[...document.querySelectorAll('.linked')].map(n => n.tagName.toLowerCase() + n.dataset.link)"
    assert chromium.evaluate(linked) == ["g0-1", "span0-1"]
    for _ in range(2):
        chromium.press("ArrowLeft", 37)
    assert chromium.evaluate(said) == first
    chromium.evaluate("next.click()")
    assert chromium.evaluate(said) == ""


@in_browser
def test_every_control_works(chromium: Chromium, page: Path, run: Run, summary: Summary) -> None:
    chromium.open(page)
    title = "document.getElementById('question').selectedOptions[0].textContent"
    chromium.evaluate("document.getElementById('next').click()")
    assert chromium.evaluate(title).startswith("2 ·")
    chromium.evaluate("previous.click(), previous.click()")
    assert chromium.evaluate(title).startswith("16 ·")
    chromium.evaluate(
        "document.getElementById('find').value = 'math';"
        "document.getElementById('find').dispatchEvent(new Event('input'))"
    )
    math_ids = {r.question_id for r in run.records if r.category == "math"}
    assert chromium.evaluate("document.querySelectorAll('#question option').length") == len(math_ids)
    assert int(chromium.evaluate(title).split()[0]) in math_ids
    chromium.evaluate(
        "document.getElementById('find').value = 'nothing like it';"
        "document.getElementById('find').dispatchEvent(new Event('input'))"
    )
    assert "no question" in chromium.evaluate("document.getElementById('question').textContent")
    chromium.evaluate(
        "document.querySelector('.dot[data-question=\"4\"]').dispatchEvent(new MouseEvent('click', {bubbles: true}))"
    )
    assert chromium.evaluate(title).startswith("5 ·")

    chromium.evaluate("document.querySelectorAll('#filter button')[1].click()")
    assert chromium.evaluate("document.querySelectorAll('.answer').length") == len(STRATEGIES) - 1
    assert "prompt-lookup" not in chromium.evaluate("document.querySelectorAll('.lanes')[1].textContent")
    chromium.evaluate("document.querySelectorAll('#filter button')[1].click()")
    assert chromium.evaluate("document.querySelectorAll('.answer').length") == len(STRATEGIES)

    chromium.evaluate("document.querySelectorAll('#headline thead button')[0].click()")
    slowest = max(summary.strategies, key=lambda row: row.seconds).strategy
    assert chromium.evaluate("document.querySelector('#headline tbody th').textContent").strip() == slowest

    before = chromium.evaluate("document.querySelector('#timeline svg').clientWidth")
    chromium.evaluate("zoom.value = 100, zoom.dispatchEvent(new Event('input'))")
    assert chromium.evaluate("document.querySelector('#timeline svg').clientWidth") > 5 * before
    assert chromium.evaluate("document.documentElement.scrollWidth <= innerWidth")

    paper = "getComputedStyle(document.body).backgroundColor"
    light = chromium.evaluate(paper)
    chromium.evaluate("theme.click()")
    assert chromium.evaluate(paper) != light
    chromium.evaluate("theme.click()")
    assert chromium.evaluate(paper) == light


@in_browser
def test_the_replay_shows_what_had_been_written_by_then(chromium: Chromium, page: Path, run: Run) -> None:
    chromium.open(page)
    records = [r for r in run.records if r.question_id == 1 and r.repeat == 0]
    longest = max(record.metrics.seconds for record in records)
    chromium.evaluate("clock.value = 500, clock.dispatchEvent(new Event('input'))")
    visible = chromium.evaluate(
        "[...document.querySelectorAll('.answer')].map(a => a.querySelectorAll('.piece:not(.future)').length)"
    )
    assert visible == [sum(s.committed > 0 and s.end <= longest / 2 + 1e-4 for s in r.trace) for r in records]
    assert 0 < visible[0] < len(records[0].trace)
    chromium.evaluate("play.click()")
    chromium.evaluate("new Promise(done => setTimeout(done, 400))")
    assert int(chromium.evaluate("clock.value")) > 500
    chromium.evaluate("play.click()")
    stopped = chromium.evaluate("clock.value")
    chromium.evaluate("new Promise(done => setTimeout(done, 200))")
    assert chromium.evaluate("clock.value") == stopped
