"""What a streamed call to a server brings in, and every way in which it can fail."""

from __future__ import annotations

import asyncio
import math
import time
from dataclasses import dataclass
from datetime import datetime, timezone
from email.utils import parsedate_to_datetime
from typing import TYPE_CHECKING, Any

from decoding.backends.base import OnText
from decoding.types import FinishReason

if TYPE_CHECKING:
    from collections.abc import Mapping

    from openai import AsyncStream

LONGEST_TOKEN = 256
"""Characters: more than any tokenizer's. A server that sends more text than this for every token asked for is cut off,
so that no answer fills the memory."""

LONGEST_BODY = 65536
"""Bytes read of what is no stream of events, to say what it is."""

TRANSIENT = frozenset({429, 500, 502, 503, 504})
"""HTTP statuses after which another attempt may succeed."""


class ReplyFailure(Exception):
    """An attempt that brought no whole answer.

    transient: another attempt may succeed. wait: seconds that the server asks to leave before it.
    """

    def __init__(self, cause: str, *, transient: bool = False, wait: float = 0.0) -> None:
        super().__init__(cause)
        self.transient = transient
        self.wait = wait


@dataclass(frozen=True)
class Usage:
    """Sums over all calls of a backend.

    calls: finished ones, `failed` of them for good; retries: attempts beyond the first.
    prompt_tokens, cached_tokens, completion_tokens: as the server reported them; cached ones are part of
    the prompt's. unreported: calls without a report (failed, or ended early from this side); their prompts
    count nothing, and their answers one token for each event that brought text.
    """

    calls: int = 0
    failed: int = 0
    retries: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    completion_tokens: int = 0
    unreported: int = 0

    def __str__(self) -> str:
        return (
            f"{self.calls:,} calls, {self.failed:,} of them failed, {self.retries:,} retries; tokens: "
            f"{self.prompt_tokens:,} prompt ({self.cached_tokens:,} cached), {self.completion_tokens:,} completion"
        )

    def after(self, reply: Reply, *, failed: bool) -> Usage:
        """The sums with one more call in them."""
        return Usage(
            calls=self.calls + 1,
            failed=self.failed + failed,
            retries=self.retries + reply.attempts - 1,
            prompt_tokens=self.prompt_tokens + reply.prompt_tokens,
            cached_tokens=self.cached_tokens + reply.cached_tokens,
            completion_tokens=self.completion_tokens + reply.new_tokens,
            unreported=self.unreported + (not reply.reported),
        )


class Reply:
    """The answer to one call as it comes in, over as many attempts as it takes.

    text: of this attempt. kept: the longest text so far, which is what remains if no attempt succeeds, and what
    the listener has heard: a further attempt has to begin with it, or the pieces would not join. enough: the
    listener wants no more. events: of this attempt; choices: whether any of them had choices.
    reported: whether the server counted the tokens.
    first_text_at: `time.perf_counter()` at the first piece of any attempt. begun: set from then on.
    """

    def __init__(self, on_text: OnText | None = None, *, max_new_tokens: int = 2**20) -> None:
        self._on_text = on_text
        self._longest = LONGEST_TOKEN * max_new_tokens
        self.begun = asyncio.Event()
        self._most_events = 0
        self.kept = ""
        self.enough = False
        self.first_text_at: float | None = None
        self.attempts = 0
        self._reset()

    def begin(self) -> None:
        """Another attempt starts, from nothing."""
        self.attempts += 1
        self._reset()

    def _reset(self) -> None:
        self.text = ""
        self.events = 0
        self.choices = False
        self.ended: FinishReason | None = None
        self.reported = False
        self.prompt_tokens = self.cached_tokens = self._completion_tokens = 0
        self._text_events = 0

    @property
    def finish_reason(self) -> FinishReason:
        """Why the answer ended. Only for one that did."""
        assert self.ended is not None
        return self.ended

    @property
    def new_tokens(self) -> int:
        """As reported, or else one for each event that brought text."""
        return self._completion_tokens if self.reported else self._most_events

    def add(self, piece: str) -> None:
        """More text. Ends the answer if the listener wants no more. Raises ReplyFailure."""
        if self.first_text_at is None:
            self.first_text_at = time.perf_counter()
            self.begun.set()
        if len(self.text) + len(piece) > self._longest:
            raise ReplyFailure(f"the server sent more than {len(self.text)} characters, far beyond max_new_tokens")
        self._text_events += 1
        self._most_events = max(self._most_events, self._text_events)
        self.text += piece
        if len(self.text) <= len(self.kept):
            return
        new, heard = self.text[len(self.kept) :], self.kept
        if self._on_text is not None and not self.text.startswith(heard):
            raise self._diverged()
        self.kept = self.text
        if self._on_text is None:
            return
        try:
            self.enough = self._on_text(new) is True
        except Exception as error:  # the caller's, and no reason to ask the server again
            raise ReplyFailure(f"on_text failed: {type(error).__name__}: {error}") from error
        if self.enough:
            self.ended = "stop"

    def end(self, reason: object, detail: object = None) -> None:
        """The server ended the answer. `detail` is vLLM's `stop_reason`, the stop string that was found."""
        if reason not in ("stop", "length"):
            raise ReplyFailure(f"the server ended the answer with {reason!r}")
        if self._on_text is not None and self.text != self.kept:
            raise self._diverged()
        self.ended = "length" if reason == "length" else "stop" if isinstance(detail, str) else "eos"

    def report(self, usage: object) -> None:
        """The server's count of tokens."""
        self.reported = True
        self.prompt_tokens = _count(usage, "prompt_tokens")
        self._completion_tokens = _count(usage, "completion_tokens")
        cached = _count(getattr(usage, "prompt_tokens_details", None), "cached_tokens")
        self.cached_tokens = min(cached, self.prompt_tokens)

    def _diverged(self) -> ReplyFailure:
        return ReplyFailure(
            f"the stream broke off after {len(self.kept)} characters, and another attempt began differently"
        )


async def read_reply(stream: AsyncStream[Any], reply: Reply, timeout: float) -> None:
    """Read a stream of chat or completion events to the answer's end.

    timeout: seconds to wait for the next event. Raises ReplyFailure, ValueError for events that are not JSON, and
    whatever the transport raises.
    """
    kind = stream.response.headers.get("content-type", "")
    if not kind.startswith("text/event-stream"):
        said = await asyncio.wait_for(_beginning(stream.response), timeout)
        raise ReplyFailure(f"the server sent {kind or 'untyped data'} instead of a stream of events: {said}")
    while True:
        try:
            event = await asyncio.wait_for(anext(stream, None), timeout)
        except Exception:
            if reply.ended is None:
                raise
            return  # the answer was whole; only the usage is missing
        if event is None:
            break
        reply.events += 1
        _take(event, reply)
        if reply.enough:
            return
    if reply.ended is not None:
        return
    if reply.events and not reply.choices:
        raise ReplyFailure("the server sent no choices")
    raise ReplyFailure("the stream broke off before the answer ended", transient=True)


async def _beginning(response: Any) -> str:
    """What the server sent instead of events, up to `LONGEST_BODY` bytes."""
    body = b""
    async for piece in response.aiter_bytes():
        body += piece
        if len(body) >= LONGEST_BODY:
            break
    return body[:LONGEST_BODY].decode(errors="replace")


def _take(event: object, reply: Reply) -> None:
    """Put one event into the reply. The client does not check what servers send, so everything may be missing."""
    usage, choices = getattr(event, "usage", None), getattr(event, "choices", None)
    if usage is not None:
        reply.report(usage)
    if not isinstance(choices, list):
        raise ReplyFailure("the server sent a malformed event: it has no choices")
    for choice in choices[:1]:
        reply.choices = True
        delta = getattr(choice, "delta", None)
        piece = getattr(choice, "text", None) if delta is None else getattr(delta, "content", None)
        if piece is not None and not isinstance(piece, str):
            raise ReplyFailure("the server sent a malformed event: its text is no text")
        if piece and reply.ended is None:
            reply.add(piece)
        reason = getattr(choice, "finish_reason", None)
        if reason is not None and reply.ended is None:
            reply.end(reason, getattr(choice, "stop_reason", None))


def failure_of(error: Exception, timeout: float) -> ReplyFailure:
    """What an exception of the client, or below it, means."""
    import openai

    if isinstance(error, (asyncio.TimeoutError, openai.APITimeoutError)):
        return ReplyFailure(f"the server sent nothing for {timeout:g} s", transient=True)
    if isinstance(error, openai.APIStatusError):
        return ReplyFailure(
            f"the server answered {error.status_code}: {_message(error)}",
            transient=error.status_code in TRANSIENT,
            wait=_retry_after(error.response.headers),
        )
    if isinstance(error, openai.APIConnectionError):
        cause = error.__cause__ or error
        return ReplyFailure(f"the connection failed: {str(cause) or type(cause).__name__}", transient=True)
    if isinstance(error, openai.APIError):
        return ReplyFailure(
            f"the server broke off with an error: {_message(error)}",
            transient=error.code in {str(status) for status in TRANSIENT},
        )
    if isinstance(error, ValueError):
        return ReplyFailure(f"the server sent a malformed event: {error}")
    return ReplyFailure(f"{type(error).__name__}: {error}", transient=True)  # the transport's own


def _message(error: Any) -> str:
    """The server's explanation: OpenAI's `message`, FastAPI's `detail`, or the body as it is."""
    body = error.body
    if isinstance(body, dict):
        body = body.get("message") or body.get("detail") or body
    return str(body or error.message)


def _retry_after(headers: Mapping[str, str]) -> float:
    """Seconds that the server asks to wait: a number, or a date; 0 if it asks for nothing."""
    text = headers.get("retry-after", "")
    try:
        seconds = float(text)
    except ValueError:
        try:
            seconds = (parsedate_to_datetime(text) - datetime.now(timezone.utc)).total_seconds()
        except (ValueError, TypeError):
            return 0.0
    return max(seconds, 0.0) if math.isfinite(seconds) else 0.0


def _count(usage: object, name: str) -> int:
    value = getattr(usage, name, None)
    return value if isinstance(value, int) and value > 0 else 0
