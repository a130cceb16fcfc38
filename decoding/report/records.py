"""What a run leaves behind: one header, then one line per answer (JSONL, schema 2).

    {"kind": "header", "schema": 2, "created": ..., "config": {...}, "config_hash": ..., "environment": {...}, ...}
    {"kind": "answer", "question_id": ..., "strategy": ..., "repeat": ..., "text": ..., "trace": {...}, ...}
    {"kind": "resumed", "at": ..., "answers": ..., "environment": {...}}

Every report is made from these lines alone. Reading ignores fields it does not know, so a field may be added
under the same schema number; a change of meaning, or a new kind of line, needs a new number. Files are in
`decoding.report.runfile`.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timezone
from typing import Any, get_args

from decoding.errors import RecordError
from decoding.report.environment import Environment
from decoding.report.fields import get, get_dataclass, get_list
from decoding.report.redaction import Json, mask, mask_text
from decoding.trace import Metrics, Step
from decoding.types import FinishReason, Generation

SCHEMA = 2
"""Version of the record format written by this code."""

BASELINE = "autoregressive"
"""Text form of plain decoding, against which every other strategy is compared."""

Key = tuple[int | str, str, int]
"""(question_id, strategy, repeat): unique within a run.

A turn of a conversation has no key of its own. It cannot be made again without the answers before it, and turns of one
question are not independent evidence; so the whole conversation is one answer, whose `turns` keep its parts apart.
"""

TIME_DIGITS = 7
"""Times are stored to 0.1 µs: below what a clock resolves, and a third of the bytes."""


def config_hash(config: Json) -> str:
    """Sixteen hex digits that name a resolved configuration; credentials and the order of fields do not count."""
    canonical = json.dumps(mask(config), sort_keys=True, separators=(",", ":"), ensure_ascii=True)
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
    """A run went on after an interruption: when (UTC, ISO 8601), after how many answers, and where."""

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


@dataclass(frozen=True)
class PartRecord:
    """One generation out of which an answer was assembled: an outline, or one point.

    sequences: the engine's numbers of its sequences, by which its steps are found in the answer's trace.
    pieces: the text of every token, if the writer knew it.
    """

    text: str
    tokens: Sequence[int]
    metrics: Metrics
    finish_reason: FinishReason = "eos"
    sequences: Sequence[int] = ()
    pieces: Sequence[str] = ()

    def to_json(self) -> dict[str, Json]:
        return {
            "text": self.text,
            "tokens": list(self.tokens),
            "metrics": _times_rounded(dataclasses.asdict(self.metrics)),
            "finish_reason": self.finish_reason,
            "sequences": list(self.sequences),
            "pieces": list(self.pieces),
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> PartRecord:
        return cls(
            text=get(data, "text", str),
            tokens=get_list(data, "tokens", int),
            metrics=get_dataclass(Metrics, get(data, "metrics", dict)),
            finish_reason=_finish_reason(data),
            sequences=get_list(data, "sequences", int, []),
            pieces=get_list(data, "pieces", str, []),
        )


@dataclass(frozen=True)
class AnswerRecord:
    """One answer of one strategy to one question.

    question: the text of all turns. strategy: its text form. repeat: 0 for the first time.
    turns: the answer to each turn; `text` and `tokens` are those of all turns together. seed: the request's own.
    text, tokens, finish_reason, error, metrics, trace, parts: see `decoding.types.Generation`.
    pieces: the text of every token, for display; empty if unknown.
    lossless: the strategy promises plain decoding's tokens under this run's sampling parameters.
    peak_memory: bytes, at most in use while this answer was made; None if not measured.
    quality: measure → score from 0 (useless) to 1 (perfect).
    started: seconds since the run was created, on the wall clock, so that a pause before a resumption shows.
    order: position in the run, from 0.
    """

    question_id: int | str
    category: str
    question: str
    strategy: str
    repeat: int
    text: str
    tokens: Sequence[int]
    finish_reason: FinishReason
    metrics: Metrics
    trace: Sequence[Step] = ()
    error: str | None = None
    parts: Mapping[str, PartRecord] = field(default_factory=dict)
    pieces: Sequence[str] = ()
    lossless: bool = False
    peak_memory: int | None = None
    quality: Mapping[str, float] = field(default_factory=dict)
    started: float = 0.0
    order: int = 0
    turns: Sequence[str] = ()
    seed: int = 0

    @property
    def key(self) -> Key:
        return (self.question_id, self.strategy, self.repeat)

    @property
    def failed(self) -> bool:
        """No complete answer: it counts as a failure and in no average."""
        return self.error is not None or self.finish_reason in ("error", "cancelled")

    @classmethod
    def of(
        cls,
        generation: Generation,
        *,
        question_id: int | str,
        category: str,
        question: str,
        strategy: str,
        repeat: int = 0,
        lossless: bool = False,
        pieces: Callable[[Sequence[int]], Sequence[str]] | None = None,
        peak_memory: int | None = None,
        quality: Mapping[str, float] | None = None,
        started: float = 0.0,
        order: int = 0,
        turns: Sequence[str] = (),
        seed: int = 0,
    ) -> AnswerRecord:
        """The record of a generation; `pieces` gives the text of every token id of a list, for display."""

        def texts(tokens: Sequence[int]) -> list[str]:
            return list(pieces(tokens)) if pieces else []

        return cls(
            question_id=question_id,
            category=category,
            question=question,
            strategy=strategy,
            repeat=repeat,
            text=generation.text,
            tokens=list(generation.tokens),
            finish_reason=generation.finish_reason,
            metrics=generation.metrics,
            trace=list(generation.trace),
            error=None if generation.error is None else mask_text(generation.error),
            parts={
                label: PartRecord(
                    text=part.text,
                    tokens=list(part.tokens),
                    metrics=part.metrics,
                    finish_reason=part.finish_reason,
                    sequences=list(dict.fromkeys(step.sequence for step in part.trace)),
                    pieces=texts(part.tokens),
                )
                for label, part in generation.parts.items()
            },
            pieces=texts(generation.tokens),
            lossless=lossless,
            peak_memory=peak_memory,
            quality=dict(quality or {}),
            started=started,
            order=order,
            turns=list(turns),
            seed=seed,
        )

    def to_json(self) -> dict[str, Json]:
        return {
            "kind": "answer",
            "question_id": self.question_id,
            "category": self.category,
            "question": self.question,
            "strategy": self.strategy,
            "repeat": self.repeat,
            "text": self.text,
            "tokens": list(self.tokens),
            "finish_reason": self.finish_reason,
            "error": self.error,
            "metrics": _times_rounded(dataclasses.asdict(self.metrics)),
            "trace": trace_to_json(self.trace),
            "parts": {label: part.to_json() for label, part in self.parts.items()},
            "pieces": list(self.pieces),
            "lossless": self.lossless,
            "peak_memory": self.peak_memory,
            "quality": dict(self.quality),
            "started": round(self.started, TIME_DIGITS),
            "order": self.order,
            "turns": list(self.turns),
            "seed": self.seed,
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> AnswerRecord:
        """Raises RecordError for a missing or mistyped field."""
        quality = get(data, "quality", dict, {})
        return cls(
            question_id=get(data, "question_id", (int, str)),
            category=get(data, "category", str),
            question=get(data, "question", str),
            strategy=get(data, "strategy", str),
            repeat=get(data, "repeat", int),
            text=get(data, "text", str),
            tokens=get_list(data, "tokens", int),
            finish_reason=_finish_reason(data),
            error=get(data, "error", (str, type(None)), None),
            metrics=get_dataclass(Metrics, get(data, "metrics", dict)),
            trace=trace_from_json(get(data, "trace", dict, {})),
            parts={label: PartRecord.from_json(part) for label, part in get(data, "parts", dict, {}).items()},
            pieces=get_list(data, "pieces", str, []),
            lossless=get(data, "lossless", bool, False),
            peak_memory=get(data, "peak_memory", (int, type(None)), None),
            quality={name: float(get(quality, name, (int, float))) for name in quality},
            started=float(get(data, "started", (int, float), 0.0)),
            order=get(data, "order", int, 0),
            turns=get_list(data, "turns", str, []),
            seed=get(data, "seed", int, 0),
        )


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


def _finish_reason(data: Mapping[str, Any]) -> FinishReason:
    value: FinishReason = get(data, "finish_reason", str)
    if value not in get_args(FinishReason):
        raise RecordError(f"field 'finish_reason' must be one of {', '.join(get_args(FinishReason))}, not {value!r}.")
    return value


def _times_rounded(values: dict[str, Json]) -> dict[str, Json]:
    return {name: round(value, TIME_DIGITS) if isinstance(value, float) else value for name, value in values.items()}
