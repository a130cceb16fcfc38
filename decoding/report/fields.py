"""Reading typed fields out of JSON objects; every failure says which field and what was expected."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, TypeVar

from decoding.errors import RecordError

T = TypeVar("T")
_MISSING: Any = object()


def get(data: Mapping[str, Any], name: str, kind: type[Any] | tuple[type[Any], ...], default: Any = _MISSING) -> Any:
    """`data[name]`, which must be of `kind`; booleans are not numbers, and numbers are finite."""
    value = data.get(name, default)
    if value is _MISSING:
        raise RecordError(f"field {name!r} is missing.")
    kinds = kind if isinstance(kind, tuple) else (kind,)
    if not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds):
        expected = " or ".join("null" if k is type(None) else k.__name__ for k in kinds)
        raise RecordError(f"field {name!r} must be {expected}, not {type(value).__name__}.")
    if isinstance(value, float) and not math.isfinite(value):
        raise RecordError(f"field {name!r} must be a finite number.")
    return value


def get_list(data: Mapping[str, Any], name: str, kind: type[T], default: Any = _MISSING) -> list[T]:
    values: list[T] = get(data, name, list, default)
    if not all(isinstance(value, kind) for value in values):
        raise RecordError(f"field {name!r} must be a list of {kind.__name__}.")
    return values


def get_dataclass(kind: type[T], data: Mapping[str, Any]) -> T:
    """A dataclass whose fields all have defaults, from JSON; the defaults' types are the fields'."""
    empty = kind()
    values = {}
    for item in dataclasses.fields(kind):  # type: ignore[arg-type]
        if item.name in data:
            expected = type(getattr(empty, item.name))
            values[item.name] = get(data, item.name, (int, float) if expected is float else expected)
    return kind(**values)
