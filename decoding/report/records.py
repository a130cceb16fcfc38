"""What a run says of its answers: one line of JSON for each, which follows the header (`decoding.report.header`).

    {"kind": "answer", "question_id": ..., "strategy": ..., "repeat": ..., "text": ..., "trace": {...}, ...}

Every report is made from these lines and the header alone. Files are in `decoding.report.runfile`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, get_args

from decoding.errors import RecordError
from decoding.report.fields import get, get_dataclass, get_list
from decoding.report.redaction import Json, mask_text
from decoding.report.traces import TIME_DIGITS, times_rounded, trace_from_json, trace_to_json
from decoding.trace import Metrics, Step
from decoding.types import FinishReason, Generation

BASELINE = "autoregressive"
"""Text form of plain decoding, against which every other strategy is compared."""

Key = tuple[int | str, str, int]
"""(question_id, strategy, repeat): unique within a run. If an answer that failed was made again, the later line counts.

A turn of a conversation has no key of its own. It cannot be made again without the answers before it, and turns of one
question are not independent evidence; so the whole conversation is one answer, whose `turns` keep its parts apart.
"""


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
            "metrics": times_rounded(dataclasses.asdict(self.metrics)),
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
            "metrics": times_rounded(dataclasses.asdict(self.metrics)),
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


def _finish_reason(data: Mapping[str, Any]) -> FinishReason:
    value: FinishReason = get(data, "finish_reason", str)
    if value not in get_args(FinishReason):
        raise RecordError(f"field 'finish_reason' must be one of {', '.join(get_args(FinishReason))}, not {value!r}.")
    return value
