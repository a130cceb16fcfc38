"""Two runs side by side: in the terminal, in Markdown and on their page."""

from __future__ import annotations

from dataclasses import replace
from io import StringIO
from pathlib import Path

import pytest
from rich.console import Console

from decoding.cli import main
from decoding.report import (
    RecordWriter,
    Run,
    RunHeader,
    compare_runs,
    comparison_markdown,
    environment,
    print_comparison,
    write_comparison,
)
from decoding.report.compared import verdict
from decoding.report.definitions import OF_TWO_RUNS
from tests.chromium import Chromium
from tests.made_runs import HOSTILE, answer, in_browser, run_of
from tests.synthetic_run import STRATEGIES, synthetic_run


def test_a_run_agrees_with_itself(run: Run) -> None:
    found = compare_runs(run, run)
    for change in found.changes:
        assert change.faster.estimate == 1.0
        assert change.identical == change.compared
        assert change.agree in (None, True)
    assert found.settings == ()
    assert found.missing == ()


def test_a_faster_run_with_other_settings_is_seen(run: Run) -> None:
    faster = tuple(
        replace(r, metrics=replace(r.metrics, seconds=r.metrics.seconds / 2)) if r.strategy == STRATEGIES[2] else r
        for r in run.records
        if r.strategy != STRATEGIES[3]
    )
    header = replace(run.header, config={**run.header.config, "model": "other"})
    found = compare_runs(run, Run(header, faster, "second"))
    changed = {change.strategy: change for change in found.changes}
    assert changed[STRATEGIES[2]].faster.estimate == pytest.approx(2.0)
    assert changed[STRATEGIES[2]].agree is False
    assert changed[STRATEGIES[1]].agree is True
    assert found.missing == (STRATEGIES[3],)
    assert found.settings == (("model", "synthetic-model", "other"),)
    console = Console(file=StringIO(), width=120)
    print_comparison(found, console)
    text = console.file.getvalue()  # type: ignore[attr-defined]
    assert "2.00×" in text
    assert "synthetic-model" in text
    assert STRATEGIES[3] in text
    text = comparison_markdown(found)
    assert f"In second, {STRATEGIES[2]} took 0.50 times as long" in text
    assert f"the speed-up of {STRATEGIES[2]} left" in text
    assert "| model | synthetic-model | other |" in text


def test_a_run_that_changed_nothing_says_so(run: Run) -> None:
    text = comparison_markdown(compare_runs(run, run))
    assert "No strategy's time differs" in text
    assert "All 64 answers have the same tokens" in text
    assert "differs |" not in text
    nothing = compare_runs(run_of(answer("x", 1, 1.0)), run_of(answer("y", 1, 1.0)))
    assert "no strategy in common" in comparison_markdown(nothing)


def test_a_verdict_claims_nothing_that_was_not_tested() -> None:
    def made(seconds: float, questions: range) -> Run:
        return run_of(*(answer("x", question, seconds) for question in questions))

    few = verdict(compare_runs(made(1.0, range(4)), made(10.0, range(4))))
    assert few.startswith("Too few questions (4) to tell whether times differ. All 4 answers")
    assert verdict(compare_runs(made(1.0, range(4)), made(1.0, range(4, 8)))) == "No question was answered in both."
    both = [run_of(*made(1.0, range(6)), *(answer("y", question, s) for question in range(4))) for s in (1.0, 9.0)]
    said = verdict(compare_runs(*both))
    assert "more than chance, as far as there were questions enough: not for y." in said


def test_runs_in_folders_of_one_name_are_told_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folders = [tmp_path / parent / "A" for parent in ("one", "two")]
    for folder in folders:
        with RecordWriter(folder, RunHeader.create({"model": "m"}, environment())) as writer:
            writer.append(answer("x", 1, 1.0))
    assert main(["report", *map(str, folders)]) == 0
    page = (folders[1] / "against-one-A.html").read_text(encoding="utf-8")
    assert "one/A and two/A" in page
    monkeypatch.chdir(folders[0])
    assert main(["report", ".", str(folders[0])]) == 0
    assert (folders[0] / "against-A.html").exists()


@in_browser
@pytest.mark.parametrize("width", [400, 1600])
def test_the_page_of_two_runs_fits_and_explains_itself(chromium: Chromium, tmp_path: Path, width: int) -> None:
    one, other = synthetic_run(6, tokens=(5, 20)), replace(synthetic_run(6, tokens=(5, 20), seed=1), name=HOSTILE)
    other = replace(other, header=replace(other.header, config={"model": HOSTILE}))
    chromium.show(width=width)
    chromium.open(write_comparison(compare_runs(one, other), tmp_path / "two.html"))
    assert chromium.evaluate("document.documentElement.scrollWidth") <= width
    assert chromium.evaluate("document.querySelectorAll('.strip .mark').length") == len(STRATEGIES)
    text = chromium.evaluate("document.body.textContent")
    assert HOSTILE in text
    for definition in OF_TWO_RUNS.values():
        assert definition.formula in text
    empty = compare_runs(run_of(answer("x", 1, 1.0)), run_of(answer("y", 1, 1.0)))
    chromium.open(write_comparison(empty, tmp_path / "empty.html"))
