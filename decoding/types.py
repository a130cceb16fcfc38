"""Plain data that crosses the boundaries between layers: what is asked, and what comes back."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from html import escape
from typing import Any, Literal, TypedDict

from decoding.errors import InvalidRequest
from decoding.trace import Metrics, Step


class Message(TypedDict):
    """One chat message, as chat templates and OpenAI-compatible servers take it."""

    role: str
    content: str


Prompt = str | Sequence[Message] | Sequence[int]
"""Text (goes through the chat template), chat messages (likewise), or token ids (go in as they are)."""

FinishReason = Literal["eos", "stop", "length", "context", "cancelled", "error"]
"""Why a generation ended: end-of-sequence token, stop string, `max_new_tokens`, the model's context
is full, the caller cancelled it, or it failed (`Generation.error` says how)."""


def is_text(value: object) -> bool:
    """Whether a value is text that has a UTF-8 form: half of a surrogate pair has none, and no tokenizer takes it.

    JSON can spell one, and Python makes one of every byte on a command line that is not UTF-8.
    """
    if not isinstance(value, str):
        return False
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return True


@dataclass(frozen=True)
class SamplingParams:
    """How tokens are chosen and when to stop.

    temperature: 0 is greedy (the default); 1 samples from the model's own distribution.
    top_k: keep the k most likely tokens; 0 keeps all.
    top_p: keep the smallest set of tokens whose probability reaches p; 1 keeps all.
    min_p: drop tokens less likely than `min_p` times the most likely one; 0 drops none.
    repetition_penalty: divide positive and multiply negative logits of tokens already in the prompt
        or the answer (CTRL, Keskar et al. 2019); 1 leaves them alone.
    logit_bias: token id → value added to its logit.
    seed: the request's own random seed; two requests with the same seed and prompt get the same answer, in any batch.
        (Where a drafter samples its guesses, give `Speculative` a `draft_length` for that: how many pay depends on the
        batch, and so does what is drawn. The distribution never does.)
    max_new_tokens, min_new_tokens: limits in tokens; end-of-sequence is impossible before the minimum.
    stop: strings that end the answer; the text is cut before the first of them.
    ignore_eos: keep going after an end-of-sequence token (for measurements of equal length).
    logprobs: also return the model's log-probability (natural log, before temperature and
        filtering) of every new token.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    seed: int = 0
    max_new_tokens: int = 256
    min_new_tokens: int = 0
    stop: Sequence[str] = ()
    ignore_eos: bool = False
    logprobs: bool = False

    def __post_init__(self) -> None:
        def check(ok: bool, what: str) -> None:
            if not ok:
                raise InvalidRequest(what)

        def finite(value: float) -> bool:
            return isinstance(value, (int, float)) and math.isfinite(value)

        check(
            finite(self.temperature) and self.temperature >= 0,
            f"temperature must be 0 (greedy) or a positive number, not {self.temperature!r}.",
        )
        check(
            isinstance(self.top_k, int) and self.top_k >= 0,
            f"top_k must be 0 (off) or a positive integer, not {self.top_k!r}.",
        )
        check(finite(self.top_p) and 0 < self.top_p <= 1, f"top_p must be in (0, 1], not {self.top_p!r}.")
        check(finite(self.min_p) and 0 <= self.min_p <= 1, f"min_p must be in [0, 1], not {self.min_p!r}.")
        check(
            finite(self.repetition_penalty) and self.repetition_penalty > 0,
            f"repetition_penalty must be a positive number, not {self.repetition_penalty!r}.",
        )
        check(
            isinstance(self.max_new_tokens, int) and self.max_new_tokens >= 1,
            f"max_new_tokens must be at least 1, not {self.max_new_tokens!r}.",
        )
        check(
            isinstance(self.min_new_tokens, int) and 0 <= self.min_new_tokens <= self.max_new_tokens,
            f"min_new_tokens must lie in [0, max_new_tokens = {self.max_new_tokens}], not {self.min_new_tokens!r}.",
        )
        check(isinstance(self.seed, int), f"seed must be an integer, not {self.seed!r}.")
        check(isinstance(self.stop, Iterable), f"stop must be a string or a list of strings, not {self.stop!r}.")
        object.__setattr__(self, "stop", (self.stop,) if isinstance(self.stop, str) else tuple(self.stop))
        check(all(isinstance(s, str) and s for s in self.stop), "stop strings must be non-empty strings.")
        check(
            isinstance(self.logit_bias, Mapping)
            and all(isinstance(t, int) and t >= 0 and finite(b) for t, b in self.logit_bias.items()),
            "logit_bias maps token ids (integers from 0) to finite numbers.",
        )

    def but(self, **changes: Any) -> SamplingParams:
        """A copy with some fields changed."""
        return replace(self, **changes)


@dataclass(frozen=True)
class Generation:
    """One answer.

    text: the answer, cut before a stop string, without special tokens.
    tokens: ids of the new tokens, the end-of-sequence token included if one ended the answer. For
        strategies that assemble an answer from several sequences, the tokens of all of them in order.
    finish_reason: see `FinishReason`; error: the cause when it is "error".
    metrics, trace: see `decoding.trace`.
    logprobs: one natural-log probability per entry of `tokens` if they were asked for.
    parts: the generations this answer was assembled from (an outline and its points), each under a
        label; empty for token-level strategies.
    """

    text: str
    tokens: list[int]
    finish_reason: FinishReason
    metrics: Metrics
    trace: list[Step] = field(default_factory=list)
    logprobs: list[float] | None = None
    error: str | None = None
    parts: Mapping[str, Generation] = field(default_factory=dict)

    def _repr_html_(self) -> str:
        """What a notebook shows: the answer, and one line about how it was made."""
        metrics = self.metrics
        facts = [f"{metrics.new_tokens} tokens", f"{metrics.seconds:.2f} s"]
        if metrics.forwards:
            facts += [f"{metrics.forwards} forwards", f"{metrics.tokens_per_forward:.2f} tokens per forward"]
        facts.append(f"ended by {self.finish_reason}" + (f": {self.error}" if self.error else ""))
        return (
            f'<div style="white-space: pre-wrap; max-width: 50em">{escape(self.text)}</div>'
            f'<small style="opacity: 0.7">{escape(" · ".join(facts))}</small>'
        )
