"""Traces and times as records hold them: a list for each field of a step, and no more digits than a clock gives."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from decoding.errors import RecordError
from decoding.report.redaction import Json
from decoding.trace import Step

TIME_DIGITS = 7
"""Times are stored to 0.1 µs: below what a clock resolves, and a third of the bytes."""

_STEP_FIELDS = [field for field in dataclasses.fields(Step) if field.name != "frame"]


def trace_to_json(trace: Sequence[Step]) -> dict[str, Json]:
    """A trace by columns, each under the name of its `Step` field; columns that hold only the default are left out."""
    columns: dict[str, Json] = {}
    for column in _STEP_FIELDS:
        values = [getattr(step, column.name) for step in trace]
        if any(value != column.default for value in values):
            columns[column.name] = [
                int(v) if isinstance(v, bool) else round(v, TIME_DIGITS) if isinstance(v, float) else v for v in values
            ]
    return columns


def trace_from_json(columns: Mapping[str, Any]) -> tuple[Step, ...]:
    """The steps of `trace_to_json`'s columns. Raises RecordError if they are not columns of one table."""
    known = {column.name: columns[column.name] for column in _STEP_FIELDS if column.name in columns}
    if not known:
        return ()
    lengths = {len(values) if isinstance(values, list) else -1 for values in known.values()}
    if len(lengths) != 1 or -1 in lengths:
        raise RecordError("field 'trace' must hold lists of one length.")
    if "prefill" in known:
        known["prefill"] = [bool(value) for value in known["prefill"]]
    names = tuple(known)
    try:
        return tuple(Step(**dict(zip(names, row, strict=True))) for row in zip(*known.values(), strict=True))
    except TypeError:
        missing = [c.name for c in _STEP_FIELDS if c.name not in known and c.default is dataclasses.MISSING]
        raise RecordError(f"field 'trace' lacks the columns {', '.join(missing)}.") from None


def times_rounded(values: Mapping[str, Json]) -> dict[str, Json]:
    """A copy whose floats, times in seconds, have `TIME_DIGITS` digits."""
    return {name: round(value, TIME_DIGITS) if isinstance(value, float) else value for name, value in values.items()}
