"""The headline table in a terminal, fitted to its width: cells take two lines where that makes them narrow."""

from __future__ import annotations

import math
import re

from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from decoding.report.compared import RunComparison, verdict
from decoding.report.statistics import Interval
from decoding.report.summary import StrategySummary, Summary
from decoding.report.table import Column, columns, comparison_cells, headline

_NAME_WIDTH = 28
_GAP = 2


def summary_table(summary: Summary, width: int = 120) -> Table:
    """One row per strategy. Columns that do not fit into `width` characters are left out, the least telling first."""
    shown = _fitting(summary, width)
    table = _table()
    table.add_column("strategy")
    for column in shown:
        table.add_column(_two_lines(column.title), justify="right", no_wrap=True)
    for row in summary.strategies:
        table.add_row(
            Text(_wrapped(row.strategy), style="dim" if row.baseline else "bold"),
            *(_cell(column, row) for column in shown),
        )
    hidden = [column.title for column in columns(summary) if column not in shown]
    if hidden:
        table.caption = f"Not shown at this width: {', '.join(hidden)}."
        table.caption_justify = "left"
    return table


def print_summary(summary: Summary, console: Console | None = None) -> None:
    """Print the headline, the table and whatever a reader should know before believing it."""
    console = console or Console()
    notices = [Text(f"\n! {notice}", style="yellow") for notice in summary.notices]
    parts: list[RenderableType] = [Text(headline(summary)), "", summary_table(summary, console.width)]
    console.print(Group(*parts, *notices))


def comparison_table(comparison: RunComparison) -> Table:
    """One row per strategy that both runs have."""
    table = _table()
    (name, *titles), rows = comparison_cells(comparison)
    table.add_column(name)
    for title in titles:
        table.add_column(Text(title), justify="right")
    for change, (strategy, one, other, agree, faster, same) in zip(comparison.changes, rows, strict=True):
        table.add_row(
            Text(_wrapped(strategy), style="bold"),
            one,
            other,
            Text(agree, {"yes": "green", "no": "red"}.get(agree, "")),
            Text(faster, style=_sided(change.faster)),
            same,
        )
    return table


def print_comparison(comparison: RunComparison, console: Console | None = None) -> None:
    """Print what changed from the first run to the second."""
    console = console or Console()
    parts: list[RenderableType] = [Text(verdict(comparison)), "", comparison_table(comparison)]
    if comparison.missing:
        parts += ["", Text(f"Only in one of the runs: {', '.join(comparison.missing)}.", style="yellow")]
    if comparison.settings:
        settings = _table()
        for title in ("differs", *comparison.names):
            settings.add_column(Text(title), overflow="fold")
        for setting in comparison.settings:
            settings.add_row(*(Text(value) for value in setting))
        parts += ["", settings]
    console.print(Group(*parts))


def _table() -> Table:
    return Table(box=None, pad_edge=False, padding=(0, _GAP, 0, 0), header_style="dim")


def _fitting(summary: Summary, width: int) -> list[Column]:
    shown = list(columns(summary))
    names = max(_width(_wrapped(name)) for name in ("strategy", *(row.strategy for row in summary.strategies)))

    def needed() -> int:
        columns = ([_two_lines(c.title), *(_cell(c, row).plain for row in summary.strategies)] for c in shown)
        return names + sum(_GAP + max(map(_width, cells)) for cells in columns)

    while needed() > width and any(column.weight for column in shown):
        shown.remove(max(shown, key=lambda column: column.weight))
    return shown


def _cell(column: Column, row: StrategySummary) -> Text:
    figure, bracket, rest = column.cell(row).partition(" [")
    text = Text(figure, style=_style(column, row))
    return text.append(f"\n[{rest}", style="not bold dim") if bracket else text


def _two_lines(title: str) -> str:
    """A heading broken at the space that leaves the shorter lines."""
    spaces = [i for i, character in enumerate(title) if character == " "]
    breaks = [title[:i] + "\n" + title[i + 1 :] for i in spaces]
    return min([title, *breaks], key=_width)


def _wrapped(strategy: str) -> str:
    """A strategy's text form in lines of about `_NAME_WIDTH`, broken after `(`, `,` and `=`."""
    lines = [""]
    for piece in re.split(r"(?<=[(,=])", strategy):
        if lines[-1] and len(lines[-1] + piece) > _NAME_WIDTH:
            lines.append("  ")
        lines[-1] += piece
    return "\n".join(lines)


def _width(text: str) -> int:
    return max(map(len, text.split("\n")))


def _style(column: Column, row: StrategySummary) -> str:
    comparison = row.comparison
    if column.key == "failures" and row.failures:
        return "bold red"
    if comparison is None:
        return "dim" if row.baseline else ""
    if column.key == "speedup":
        return _sided(comparison.speedup)
    if column.key == "identical" and row.lossless:
        return "green" if comparison.identical == comparison.compared else "bold red"
    return ""


def _sided(interval: Interval) -> str:
    """Green where the whole interval is above 1, red where it is below."""
    if not math.isfinite(interval.low):
        return ""
    return "bold green" if interval.low > 1 else "red" if interval.high < 1 else ""
