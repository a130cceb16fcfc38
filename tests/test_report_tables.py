"""Tables in the terminal and in Markdown, and what is exported for other programs."""

from __future__ import annotations

import csv
import sys
from dataclasses import replace
from io import StringIO
from pathlib import Path

import pytest
from rich.console import Console

from decoding.errors import RecordError
from decoding.report import (
    BASELINE,
    Run,
    Summary,
    compare_runs,
    export,
    export_comparison,
    flat_rows,
    markdown,
    print_summary,
    summarize,
    write_csv,
    write_parquet,
    write_report,
)
from decoding.report.definitions import DEFINITIONS
from decoding.report.table import COLUMNS, columns, headline
from tests.made_runs import answer, run_of


def test_every_column_is_defined() -> None:
    assert {column.key for column in COLUMNS} <= set(DEFINITIONS)


def test_columns_without_a_value_are_left_out(summary: Summary) -> None:
    keys = {column.key for column in columns(summarize(run_of(answer("x", 1, 1.0))))}
    assert keys.isdisjoint({"speedup", "quality", "peak_memory", "failures", "identical"})
    assert "failures" in {column.key for column in columns(summary)}


@pytest.mark.parametrize(
    ("seconds", "words"),
    [((4.0, 1.0), "x was 4.00× as fast as plain decoding"), ((1.0, 4.0), "No strategy was faster than plain decoding")],
)
def test_the_headline_says_what_happened(seconds: tuple[float, float], words: str) -> None:
    assert words in headline(summarize(run_of(answer(BASELINE, 1, seconds[0]), answer("x", 1, seconds[1]))))


def test_the_headline_admits_what_it_cannot_tell() -> None:
    times = [(1.0, 0.5), (1.0, 1.4), (1.0, 0.6), (1.0, 1.2), (1.0, 0.7), (1.0, 1.3)]
    records = [r for q, (a, b) in enumerate(times) for r in (answer(BASELINE, q, a), answer("x", q, b))]
    assert "cannot tell" in headline(summarize(run_of(*records)))


@pytest.mark.parametrize("width", [60, 80, 100, 120, 160, 220])
def test_the_terminal_table_fits_the_terminal(summary: Summary, width: int) -> None:
    console = Console(file=StringIO(), width=width)
    print_summary(summary, console)
    text = console.file.getvalue()  # type: ignore[attr-defined]
    assert max(map(len, text.splitlines())) <= width
    for word in ("autoregressive", "jacobi(block=16)", "speed-up", "failures"):
        assert word in text
    assert ("Not shown at this width" in text) == (width < 200)


def test_markdown_has_a_row_for_each_strategy_and_escapes_bars(summary: Summary) -> None:
    text = markdown(summary)
    table = [line for line in text.splitlines() if line.startswith("|")]
    assert len(table) == 2 + len(summary.strategies)
    assert len({line.count("|") for line in table}) == 1
    assert "a\\|b" in markdown(summarize(run_of(answer("a|b", 1, 1.0))))
    assert DEFINITIONS["speedup"].formula in text


def test_flat_rows_and_csv_hold_every_answer(run: Run, tmp_path: Path) -> None:
    rows = flat_rows(run)
    assert len(rows) == len(run.records)
    assert len({tuple(row) for row in rows}) == 1
    write_csv(run, tmp_path / "run.csv")
    with open(tmp_path / "run.csv", newline="", encoding="utf-8") as file:
        read = list(csv.DictReader(file))
    assert [float(row["seconds"]) for row in read] == [row["seconds"] for row in rows]
    assert [row["text"] for row in read] == [record.text for record in run.records]
    write_csv(replace(run, records=()), tmp_path / "empty.csv")


def test_parquet_without_its_package_says_what_to_install(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(RecordError, match="pip install pyarrow"):
        write_parquet(run, tmp_path / "run.parquet")


def test_parquet_holds_every_answer(run: Run, tmp_path: Path) -> None:
    parquet = pytest.importorskip("pyarrow.parquet")
    write_parquet(run, tmp_path / "run.parquet")
    assert parquet.read_table(tmp_path / "run.parquet").num_rows == len(run.records)


def test_the_ending_of_a_file_says_what_is_exported(run: Run, summary: Summary, tmp_path: Path) -> None:
    export(run, tmp_path / "run.md", summary=summary)
    assert (tmp_path / "run.md").read_text() == markdown(summary)
    export(run, tmp_path / "run.csv")
    assert len((tmp_path / "run.csv").read_text().splitlines()) > len(run.records)
    export(run, tmp_path / "folder")
    assert (tmp_path / "folder" / "question.jsonl").exists()
    with pytest.raises(RecordError, match=r"\.csv, \.parquet, \.md"):
        export(run, tmp_path / "run.xlsx")
    with pytest.raises(RecordError, match=r"\.md only"):
        export_comparison(compare_runs(run, run), tmp_path / "two.csv")


def test_question_ids_of_one_column_have_one_type() -> None:
    numbers = run_of(answer("x", 1, 1.0), answer("x", 2, 1.0))
    assert [row["question_id"] for row in flat_rows(numbers)] == [1, 2]
    mixed = run_of(answer("x", 1, 1.0), answer("x", 2, 1.0, question_id="two"))
    assert [row["question_id"] for row in flat_rows(mixed)] == ["1", "two"]


@pytest.mark.parametrize("write", [write_csv, write_report, export])
def test_a_place_that_cannot_be_written_is_named(run: Run, tmp_path: Path, write: object) -> None:
    with pytest.raises(RecordError, match="nowhere"):
        write(run, tmp_path / "nowhere" / "file.csv")  # type: ignore[operator]
