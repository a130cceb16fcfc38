"""Records and figures in other forms: flat rows for data frames, CSV, Parquet, Markdown, FastChat's files.

A data frame of a run is `pandas.DataFrame(flat_rows(run))`, or polars' in the same way.
"""

from __future__ import annotations

import csv
import dataclasses
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TypeAlias

from decoding.errors import RecordError
from decoding.report.compared import RunComparison, verdict
from decoding.report.definitions import DEFINITIONS, OF_TWO_RUNS, Definition
from decoding.report.fastchat import write_fastchat
from decoding.report.runfile import Run
from decoding.report.summary import Summary, summarize
from decoding.report.table import columns, comparison_cells, headline

Cell: TypeAlias = bool | int | float | str | None


def flat_rows(run: Run) -> list[dict[str, Cell]]:
    """One flat row per answer, all with the same columns: `pandas.DataFrame(flat_rows(run))`.

    Measures of quality become columns `quality.<name>`, None where a question has no such measure. Question ids are
    text if one of them is, because a column has one type. Traces and token ids are left to the records.
    """
    measures = sorted({name for record in run.records for name in record.quality})
    named = any(isinstance(record.question_id, str) for record in run.records)
    return [
        {
            "question_id": str(record.question_id) if named else record.question_id,
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
    try:
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), Path(path))
    except OSError as error:
        raise RecordError(f"{path} could not be written ({error}).") from error


EXPORTS = (".csv", ".parquet", ".md")
"""Endings of the files that `export` writes."""


def export(run: Run, path: str | os.PathLike[str], *, summary: Summary | None = None) -> None:
    """Write every answer (`.csv`, `.parquet`) or the table (`.md`), as the ending of `path` says; a path without one
    becomes a folder of FastChat's, with the questions and every strategy's answers.

    `summary` saves computing it again. Raises RecordError for another ending or if the file cannot be written.
    """
    kind = Path(path).suffix
    if kind == ".csv":
        write_csv(run, path)
    elif kind == ".parquet":
        write_parquet(run, path)
    elif kind == ".md":
        _write(path, markdown(summary or summarize(run)))
    elif not kind:
        write_fastchat(run, path)
    else:
        raise RecordError(
            f"{path}: exports are {', '.join(EXPORTS)} files, or folders of FastChat's; give it one of these endings, "
            "or none for a folder."
        )


def export_comparison(comparison: RunComparison, path: str | os.PathLike[str]) -> None:
    """Write the comparison of two runs as Markdown. Raises RecordError for another ending or an unwritable file."""
    if Path(path).suffix != ".md":
        raise RecordError(f"{path}: a comparison of two runs is exported as .md only.")
    _write(path, comparison_markdown(comparison))


def _write(path: str | os.PathLike[str], text: str) -> None:
    try:
        Path(path).write_text(text, encoding="utf-8", errors="replace")
    except OSError as error:
        raise RecordError(f"{path} could not be written ({error.strerror}).") from error


def markdown(summary: Summary) -> str:
    """The headline, the table, what to beware of, and the definition of every column."""
    shown = columns(summary)
    head = ["strategy", *(column.title for column in shown)]
    rows = [[f"`{row.strategy}`", *(column.cell(row) for column in shown)] for row in summary.strategies]
    lines = [headline(summary), "", *_table(head, rows), ""]
    lines += [f"> {notice}" for notice in summary.notices] + ([""] if summary.notices else [])
    lines += _defined(DEFINITIONS[key] for key in (*(column.key for column in shown), "interval"))
    return "\n".join(lines) + "\n"


def comparison_markdown(comparison: RunComparison) -> str:
    """What changed from one run to another, the table, the settings that differ, and the definitions."""
    head, rows = comparison_cells(comparison)
    lines = [verdict(comparison), "", *_table(head, [[f"`{name}`", *cells] for name, *cells in rows]), ""]
    if comparison.missing:
        lines += [f"> Only in one of the runs: {', '.join(comparison.missing)}.", ""]
    if comparison.settings:
        lines += [*_table(["differs", *comparison.names], comparison.settings), ""]
    lines += _defined(OF_TWO_RUNS.values())
    return "\n".join(lines) + "\n"


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    return [_line(cells) for cells in (head, ["---", *("---:" for _ in head[1:])], *rows)]


def _defined(definitions: Iterable[Definition]) -> list[str]:
    return [f"- **{definition.name}**: {definition.formula}. {definition.meaning}" for definition in definitions]


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|").replace("\n", " ") for cell in cells) + " |"
