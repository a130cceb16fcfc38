"""Runs as files: what `decoding compare --config FILE` reads, and what a run directory keeps of it.

    questions = "default"         # a shipped suite, or a file (looked for beside this one first)
    limit = 40
    strategies = ["autoregressive", "speculative(drafter=prompt-lookup)"]
    model = "smollm2-135m"

    [params]                      # fields of `decoding.SamplingParams`
    max_new_tokens = 128

    [schedule]                    # fields of `decoding.options.Schedule`
    repeats = 2

    [load]                        # fields of `decoding.options.LoadOptions`
    dtype = "float32"

Every key may be left out. A key that does not exist, or a value of the wrong type, is an error that names file and
key. The shipped files have names (`run_files()` lists them).
"""

from __future__ import annotations

import dataclasses
import importlib.resources
import json
import os
import sys
import types
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar, Union, get_args, get_origin, get_type_hints

from decoding.errors import InvalidRequest, UnknownName
from decoding.models import DEFAULT_MODEL
from decoding.options import DEFAULT_STRATEGIES, LoadOptions, Schedule
from decoding.questions import suites
from decoding.report.redaction import MASK, Json, mask
from decoding.strategies import Strategy, parse
from decoding.types import SamplingParams

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

T = TypeVar("T")


@dataclass(frozen=True)
class RunConfig:
    """A comparison as it can be written down.

    questions: name of a suite, or a file; limit: the first so many; categories: only these.
    strategies: in text form; model: alias, folder, .gguf file, hub id, or what a server calls it.
    """

    questions: str = "default"
    limit: int | None = None
    categories: tuple[str, ...] | None = None
    strategies: tuple[str, ...] = DEFAULT_STRATEGIES
    model: str = DEFAULT_MODEL
    params: SamplingParams = field(default_factory=SamplingParams)
    schedule: Schedule = field(default_factory=Schedule)
    load: LoadOptions = field(default_factory=LoadOptions)

    def __post_init__(self) -> None:
        self.parsed_strategies()

    def parsed_strategies(self) -> list[Strategy]:
        """Raises UnknownName or InvalidRequest for a text that is no strategy."""
        return [parse(text) for text in self.strategies]

    def flat(self) -> dict[str, Any]:
        """All options in one level, as a command line has them, lists included."""
        values: dict[str, Any] = {}
        for item in dataclasses.fields(self):
            value = getattr(self, item.name)
            inside = dataclasses.fields(value) if dataclasses.is_dataclass(value) else ()
            values.update({inner.name: getattr(value, inner.name) for inner in inside} or {item.name: value})
        return {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}

    @classmethod
    def of_flat(cls, values: Mapping[str, Any]) -> RunConfig:
        """The inverse of `flat`; other entries of `values` do not count.

        Raises InvalidRequest for what was masked where it was written down: anything else in its place, the default
        included, would make another run of it.
        """
        nested: dict[str, Any] = {}
        for name, hint in get_type_hints(cls).items():
            if dataclasses.is_dataclass(hint):
                nested[name] = {f.name: values[f.name] for f in dataclasses.fields(hint) if f.name in values}
            elif name in values:
                nested[name] = values[name]
        config = _build(cls, nested, "")
        for name, value in config.flat().items():
            if MASK in str(value):
                option = name if name == "questions" else f"--{name.replace('_', '-')}"
                raise InvalidRequest(
                    f"{option} looked like a credential and was not written down; give {option} again."
                )
        return config

    @classmethod
    def of_header(cls, config: Mapping[str, Any]) -> RunConfig:
        """The configuration that a run's header holds; what else it holds (ids of questions, say) does not count."""
        known = {item.name for item in dataclasses.fields(cls)}
        table = {key: value for key, value in config.items() if key in known}
        return _build(cls, table, "records")

    def to_json(self) -> dict[str, Json]:
        """The same in JSON's types, for a header; `of_header` reads it back."""
        return {
            "questions": self.questions,
            "limit": self.limit,
            "categories": None if self.categories is None else list(self.categories),
            "strategies": list(self.strategies),
            "model": self.model,
            "params": params_to_json(self.params),
            "schedule": dataclasses.asdict(self.schedule),
            "load": dataclasses.asdict(self.load),
        }

    def to_toml(self) -> str:
        """A run file that reads back as this configuration; credentials are masked."""
        entries = self.to_json()
        tables = {key: value for key, value in entries.items() if isinstance(value, Mapping)}
        lines = _toml_lines({key: value for key, value in entries.items() if key not in tables})
        for key, table in tables.items():
            lines += [f"\n[{key}]\n", *_toml_lines(table)]
        return "".join(lines)


def params_to_json(params: SamplingParams) -> dict[str, Json]:
    """Sampling parameters in JSON's types."""
    bias: dict[str, Json] = {str(token): value for token, value in params.logit_bias.items()}
    return dataclasses.asdict(params) | {"stop": list(params.stop), "logit_bias": bias}


def run_files() -> dict[str, Path]:
    """The shipped run files: their names and paths."""
    folder = Path(str(importlib.resources.files("experiments")))
    return {file.stem: file for file in sorted(folder.glob("*.toml"))}


def read_run_file(path_or_name: str | os.PathLike[str]) -> RunConfig:
    """Read a run file: a shipped one by its name, or any by its path.

    Raises UnknownName for a name or key that does not exist, and InvalidRequest, with file and key, for a file that
    is missing or malformed.
    """
    path = Path(path_or_name)
    if isinstance(path_or_name, str) and not path.suffix and path.name == path_or_name and not os.path.exists(path):
        shipped = run_files()
        if path_or_name not in shipped:
            raise UnknownName("run file", path_or_name, shipped)
        path = shipped[path_or_name]
    try:
        table = tomllib.loads(path.read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise InvalidRequest(f"run file {str(path)!r} cannot be read: {error.strerror or error}.") from error
    except RecursionError as error:
        raise InvalidRequest(f"{path}: not valid TOML: it is nested too deeply.") from error
    except ValueError as error:  # not TOML, or not UTF-8
        raise InvalidRequest(f"{path}: not valid TOML: {str(error).rstrip('.')}.") from error
    config = _build(RunConfig, table, str(path))
    beside = path.parent / config.questions
    if config.questions not in suites() and os.path.isfile(beside):
        config = dataclasses.replace(config, questions=str(beside))
    return config


def _build(cls: type[T], table: Mapping[str, Any], file: str, section: str = "") -> T:
    """A dataclass from a table whose keys are its fields."""
    hints = get_type_hints(cls)
    known = [item.name for item in dataclasses.fields(cls) if item.init]  # type: ignore[arg-type]
    for key in table:
        if key not in known:
            raise UnknownName(f"key in {file}, [{section.rstrip('.')}]:" if section else f"key in {file}:", key, known)
    values = {key: _value(value, hints[key], file, section + key) for key, value in table.items()}
    try:
        return cls(**values)
    except InvalidRequest as error:
        raise InvalidRequest(f"{file}: {error}" if file else str(error)) from error


def _value(value: Any, hint: Any, file: str, key: str) -> Any:
    """`value` as the type that `hint` asks for: lists become tuples, whole numbers become floats."""
    if get_origin(hint) in (Union, types.UnionType):
        if value is None and type(None) in get_args(hint):
            return None
        (hint,) = (option for option in get_args(hint) if option is not type(None))
    origin = get_origin(hint) or hint
    if dataclasses.is_dataclass(origin) and isinstance(value, Mapping):
        return _build(origin, value, file, f"{key}.")  # type: ignore[arg-type]
    if origin in (tuple, Sequence) and isinstance(value, (list, tuple)):
        return tuple(_value(item, get_args(hint)[0], file, key) for item in value)
    if origin is Mapping and isinstance(value, Mapping):
        return {_token(name, file, key): _value(item, get_args(hint)[1], file, key) for name, item in value.items()}
    if origin is float and isinstance(value, (int, float)) and not isinstance(value, bool):
        return float(value)
    if origin in (str, int, bool) and isinstance(value, origin) and not (origin is int and isinstance(value, bool)):
        return value
    raise InvalidRequest(f"{file}: {key} must be {_expected(hint)}, not {_kind(value)}.")


def _expected(hint: Any) -> str:
    if get_origin(hint) in (tuple, Sequence):
        return "a list of numbers" if get_args(hint)[0] is float else "a list of texts"
    names = {str: "text in quotes", int: "a whole number", float: "a number", bool: "true or false"}
    return names.get(hint, "a table")


def _kind(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, Mapping):
        return "a table"
    if isinstance(value, (list, tuple)):
        return "a list"
    return f"the text {value!r:.40}" if isinstance(value, str) else str(value)


def _token(name: Any, file: str, key: str) -> int:
    """A token id; keys of tables are text in TOML and JSON."""
    try:
        return int(name)
    except ValueError:
        raise InvalidRequest(f"{file}: the keys of {key} must be token ids, not {name!r}.") from None


def _toml_lines(table: Mapping[str, Json]) -> list[str]:
    masked = mask(table)
    assert isinstance(masked, Mapping)
    return [f"{key} = {_to_toml(value)}\n" for key, value in masked.items() if value is not None]


def _to_toml(value: Json) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, str):
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
    if isinstance(value, Mapping):
        return "{" + ", ".join(f'"{key}" = {_to_toml(item)}' for key, item in value.items()) + "}"
    if isinstance(value, Sequence):
        return "[" + ", ".join(map(_to_toml, value)) + "]"
    return repr(value)
