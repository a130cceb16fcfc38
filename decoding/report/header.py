"""The first line of a run's records, and those that say that it went on (JSONL, schema 2).

    {"kind": "header", "schema": 2, "created": ..., "config": {...}, "config_hash": ..., "environment": {...}, ...}
    {"kind": "resumed", "at": ..., "answers": ..., "environment": {...}}

Reading ignores fields it does not know, so a field may be added under the same schema number; a change of meaning, or
a new kind of line, needs a new number.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from typing import Any

from decoding.errors import RecordError
from decoding.report.environment import Environment
from decoding.report.fields import get, get_dataclass
from decoding.report.redaction import Json, mask

SCHEMA = 2
"""Version of the record format written by this code."""


def config_hash(config: Json) -> str:
    """Sixteen hex digits that name a resolved configuration; credentials, the variables that hold them and the order of
    fields do not count."""
    canonical = json.dumps(mask(config, variables=True), sort_keys=True, separators=(",", ":"), ensure_ascii=True)
    return hashlib.sha256(canonical.encode("ascii")).hexdigest()[:16]


@dataclass(frozen=True)
class RunHeader:
    """The first line of a run.

    config: the resolved configuration as JSON, credentials masked; config_hash: see `config_hash`.
    created: UTC, ISO 8601. latency: (tokens, seconds) pairs, the backend's forward time against the tokens in a
    step, if it was measured.
    """

    config: Mapping[str, Json]
    config_hash: str
    environment: Environment
    created: str
    latency: Sequence[tuple[int, float]] = ()
    schema: int = SCHEMA

    @classmethod
    def create(
        cls, config: Mapping[str, Json], environment: Environment, latency: Iterable[tuple[int, float]] = ()
    ) -> RunHeader:
        """The header of a run that starts now."""
        masked = mask(config)
        assert isinstance(masked, dict)
        return cls(masked, config_hash(config), environment, _now(), tuple((int(n), float(s)) for n, s in latency))

    def to_json(self) -> dict[str, Json]:
        return {
            "kind": "header",
            "schema": self.schema,
            "created": self.created,
            "config": self.config,
            "config_hash": self.config_hash,
            "environment": dataclasses.asdict(self.environment),
            "latency": [[tokens, seconds] for tokens, seconds in self.latency],
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> RunHeader:
        """Raises RecordError for a newer schema or a missing or mistyped field."""
        schema = get(data, "schema", int)
        if schema > SCHEMA:
            raise RecordError(
                f"the records follow schema {schema}, but this version reads up to {SCHEMA}; "
                "update parallel-decoding to read them."
            )
        return cls(
            config=get(data, "config", dict),
            config_hash=get(data, "config_hash", str),
            environment=get_dataclass(Environment, get(data, "environment", dict)),
            created=get(data, "created", str),
            latency=tuple((int(n), float(s)) for n, s in get(data, "latency", list, [])),
            schema=schema,
        )


@dataclass(frozen=True)
class Resumption:
    """A run went on after an interruption: when (UTC, ISO 8601), after how many answers, failed ones included, and
    where."""

    at: str
    answers: int
    environment: Environment

    @classmethod
    def now(cls, answers: int, environment: Environment) -> Resumption:
        return cls(_now(), answers, environment)

    def to_json(self) -> dict[str, Json]:
        environment = dataclasses.asdict(self.environment)
        return {"kind": "resumed", "at": self.at, "answers": self.answers, "environment": environment}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Resumption:
        environment = get_dataclass(Environment, get(data, "environment", dict))
        return cls(get(data, "at", str), get(data, "answers", int), environment)


def _now() -> str:
    return datetime.now(timezone.utc).isoformat(timespec="seconds")
