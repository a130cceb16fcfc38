"""A run as a data frame or as a notebook's table."""

from __future__ import annotations

import dataclasses
from html import escape
from typing import TYPE_CHECKING, Literal

from decoding.errors import RecordError
from decoding.report.definitions import DEFINITIONS
from decoding.report.export import Cell, flat_rows
from decoding.report.runfile import Run
from decoding.report.summary import summarize
from decoding.report.table import columns, headline
from decoding.trace import Step

if TYPE_CHECKING:
    import pandas
    import polars

Rows = Literal["answers", "steps"]
"""What a row of a data frame is: an answer, or one sequence's share of one step (see `decoding.trace.Step`)."""


def to_pandas(run: Run, rows: Rows = "answers") -> pandas.DataFrame:
    """Raises RecordError if pandas is not installed."""
    try:
        import pandas
    except ImportError:
        raise RecordError("data frames need the package pandas, which is not installed: pip install pandas.") from None
    return pandas.DataFrame(_rows(run, rows))


def to_polars(run: Run, rows: Rows = "answers") -> polars.DataFrame:
    """Raises RecordError if Polars is not installed."""
    try:
        import polars
    except ImportError:
        raise RecordError("data frames need the package polars, which is not installed: pip install polars.") from None
    return polars.DataFrame(_rows(run, rows), infer_schema_length=None)


def step_rows(run: Run) -> list[dict[str, Cell]]:
    """One flat row per step and sequence, under the key of its answer."""
    names = [item.name for item in dataclasses.fields(Step)]
    return [
        {
            "question_id": record.question_id,
            "strategy": record.strategy,
            "repeat": record.repeat,
            **{name: getattr(step, name) for name in names},
        }
        for record in run
        for step in record.trace
    ]


def _rows(run: Run, rows: Rows) -> list[dict[str, Cell]]:
    flat = flat_rows(run) if rows == "answers" else step_rows(run)
    for row in flat:  # a column has one type, and question ids may be numbers or names
        row["question_id"] = str(row["question_id"])
    return flat


def to_html(run: Run) -> str:
    """The headline, the table and the notices, as a fragment of HTML. Headings explain themselves on hover."""
    summary = summarize(run)
    shown = columns(summary)
    heads = "".join(
        f'<th title="{escape(f"{DEFINITIONS[c.key].formula}. {DEFINITIONS[c.key].meaning}")}">{escape(c.title)}</th>'
        for c in shown
    )
    body = "".join(
        f'<tr><th style="text-align:left">{escape(row.strategy)}</th>'
        + "".join(f"<td>{escape(column.cell(row))}</td>" for column in shown)
        + "</tr>"
        for row in summary.strategies
    )
    notes = "".join(f"<p>⚠ {escape(notice)}</p>" for notice in summary.notices)
    return f"<p>{escape(headline(summary))}</p><table><tr><th>strategy</th>{heads}</tr>{body}</table>{notes}"
