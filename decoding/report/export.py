"""Records and figures in other forms: flat rows for data frames, CSV, Parquet, Markdown."""

from __future__ import annotations

import csv
import dataclasses
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TypeAlias

from decoding.errors import RecordError
from decoding.report.definitions import DEFINITIONS
from decoding.report.runfile import Run
from decoding.report.summary import Summary
from decoding.report.table import columns, headline

Cell: TypeAlias = bool | int | float | str | None


def flat_rows(run: Run) -> list[dict[str, Cell]]:
    """One flat row per answer, all with the same columns: `pandas.DataFrame(flat_rows(run))`.

    Measures of quality become columns `quality.<name>`, None where a question has no such measure. Traces and token
    ids are left to the records.
    """
    measures = sorted({name for record in run.records for name in record.quality})
    return [
        {
            "question_id": record.question_id,
            "category": record.category,
            "strategy": record.strategy,
            "repeat": record.repeat,
            "order": record.order,
            "started": record.started,
            "finish_reason": record.finish_reason,
            "error": record.error,
            "lossless": record.lossless,
            "peak_memory": record.peak_memory,
            **dataclasses.asdict(record.metrics),
            **{f"quality.{name}": record.quality.get(name) for name in measures},
            "question": record.question,
            "text": record.text,
        }
        for record in run.records
    ]


def write_csv(run: Run, path: str | os.PathLike[str]) -> None:
    """Write `flat_rows` as CSV (UTF-8, one header line). Raises RecordError if the file cannot be written."""
    rows = flat_rows(run)
    try:
        with open(path, "w", newline="", encoding="utf-8", errors="replace") as file:
            writer = csv.DictWriter(file, fieldnames=list(rows[0]) if rows else [])
            writer.writeheader()
            writer.writerows(rows)
    except OSError as error:
        raise RecordError(f"{path} could not be written ({error.strerror}).") from error


def write_parquet(run: Run, path: str | os.PathLike[str]) -> None:
    """Write `flat_rows` as Parquet. Raises RecordError if pyarrow is missing or the file cannot be written."""
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise RecordError("Parquet needs the package pyarrow, which is not installed: pip install pyarrow.") from None
    rows = flat_rows(run)
    for row in rows:  # a Parquet column has one type, and question ids may be numbers or names
        row["question_id"] = str(row["question_id"])
    try:
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), Path(path))
    except OSError as error:
        raise RecordError(f"{path} could not be written ({error}).") from error


def markdown(summary: Summary) -> str:
    """The headline, the table, what to beware of, and the definition of every column."""
    shown = columns(summary)
    head = ["strategy", *(column.title for column in shown)]
    rows = [[f"`{row.strategy}`", *(column.cell(row) for column in shown)] for row in summary.strategies]
    rule = ["---", *("---:" for _ in shown)]
    lines = [headline(summary), "", *map(_line, (head, rule, *rows)), ""]
    lines += [f"> {notice}" for notice in summary.notices] + ([""] if summary.notices else [])
    for key in (*(column.key for column in shown), "interval"):
        definition = DEFINITIONS[key]
        lines.append(f"- **{definition.name}**: {definition.formula}. {definition.meaning}")
    return "\n".join(lines) + "\n"


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"
