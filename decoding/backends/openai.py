"""A model behind an OpenAI-compatible server: prompts go out, text comes back.

The `openai` package is imported when the first call is made: it takes a second that local models need not wait for.
"""

from __future__ import annotations

import asyncio
import math
import os
import random
import threading
import time
from collections.abc import AsyncGenerator, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, get_args
from urllib.parse import urlsplit

from decoding.backends.base import Backend, OnText
from decoding.backends.prefix import PrefixWarming, continues_messages
from decoding.backends.reply import Reply, ReplyFailure, Usage, failure_of, read_reply
from decoding.backends.request import Endpoint, RequestForm, prompt_text
from decoding.errors import CapabilityError, InvalidRequest
from decoding.trace import measure
from decoding.types import Generation, Prompt, SamplingParams

if TYPE_CHECKING:
    from openai import AsyncOpenAI

    from decoding.strategies.base import Strategy, TokenStrategy

FIRST_DELAY = 0.5
"""Seconds before the second attempt, at most; every further one doubles them, up to `LONGEST_DELAY`."""
LONGEST_DELAY = 16.0


@dataclass
class _Session:
    """What belongs to one event loop: connections, and the places for calls on them."""

    client: AsyncOpenAI
    places: asyncio.Semaphore
    warming: PrefixWarming
    lifetime: AsyncGenerator[AsyncOpenAI, None]


class OpenAIBackend(Backend):
    """A model that an OpenAI-compatible server offers at `base_url` ("http://127.0.0.1:8000/v1").

    model: as the server names it. api_key: by default the environment's OPENAI_API_KEY; servers that want
    none get a placeholder. It is sent to the server and shown nowhere.
    endpoint: "chat", where text is a user's message, or "completions", where text goes in as it is (messages
    are joined by blank lines) and token ids are understood.
    concurrency: calls under way at once in one event loop; more wait. timeout: seconds to wait for an answer
    to begin, and then for each further piece of it.
    retries: further attempts after HTTP 429, 500, 502, 503 and 504, lost connections, streams that break off
    and timeouts, with growing, random pauses; never shorter than the server asks for (Retry-After). A
    server that asks for more than `timeout` is not waited for.
    prefill: whether the server continues an assistant message that the request ends with (vLLM and SGLang do).
    None finds out with one short call, once for each server and model, before a strategy runs that would use it;
    the completions endpoint always can. Strategies give an instruction where the server cannot.
    warm_prefix: of several calls that begin with the same so many characters, let one go first and the others wait
    until it brings text, so that they find what they share in the server's cache; 0 sends all of them at once.
    `usage.cached_tokens` tells whether it helps.
    extra_body: also send parameters that are not OpenAI's (top_k, min_p, repetition_penalty, min_new_tokens,
    ignore_eos), under vLLM's names; without it they are refused.
    prompt_price, cached_price, completion_price: money per million tokens, for `cost`; cached prompt
    tokens cost what others do unless they have a price of their own.

    A call that fails for good gives a generation with finish_reason "error", the cause, and the text received.
    Nothing is known of the server's forward passes: traces are empty, metrics come from the clock and the usage
    that the server reports (`reused_tokens` are those it took from its cache).
    """

    def __init__(
        self,
        base_url: str,
        model: str,
        api_key: str | None = None,
        *,
        endpoint: Endpoint = "chat",
        concurrency: int = 8,
        timeout: float = 60.0,
        retries: int = 4,
        prefill: bool | None = None,
        warm_prefix: int = 0,
        extra_body: bool = False,
        prompt_price: float | None = None,
        cached_price: float | None = None,
        completion_price: float | None = None,
    ) -> None:
        url = urlsplit(base_url)
        if url.scheme not in ("http", "https") or not url.hostname or url.username or url.query:
            # The value is not shown: it may hold a password.
            raise InvalidRequest(
                "base_url must be http(s)://host[:port][/path], without user, password or query; "
                "a key goes into api_key."
            )
        if endpoint not in get_args(Endpoint):
            raise InvalidRequest(f"endpoint must be 'chat' or 'completions', not {endpoint!r}.")
        if concurrency < 1 or retries < 0 or warm_prefix < 0:
            raise InvalidRequest("concurrency must be at least 1, retries and warm_prefix at least 0.")
        if not (math.isfinite(timeout) and timeout > 0):
            raise InvalidRequest(f"timeout must be a positive number of seconds, not {timeout!r}.")
        self.base_url = base_url
        self.model = model
        self.name = f"{model} at {url.netloc}"
        self.endpoint = endpoint
        self.concurrency = concurrency
        self.timeout = timeout
        self.retries = retries
        self.warm_prefix = warm_prefix
        self.prompt_price = prompt_price
        self.cached_price = prompt_price if cached_price is None else cached_price
        self.completion_price = completion_price
        self._api_key = _header_value(os.environ.get("OPENAI_API_KEY", "") if api_key is None else api_key)
        self._form = RequestForm(
            model,
            endpoint,
            # OpenAI's own newer models refuse the field that every other server understands.
            "max_completion_tokens" if endpoint == "chat" and url.hostname == "api.openai.com" else "max_tokens",
            extra_body,
        )
        self._prefill = True if prefill is None and endpoint == "completions" else prefill
        self._set_prefill(bool(self._prefill))
        self._sessions: dict[asyncio.AbstractEventLoop, _Session] = {}
        self._usage = Usage()
        self._lock = threading.Lock()

    def __repr__(self) -> str:
        return f"OpenAIBackend(base_url={self.base_url!r}, model={self.model!r}, endpoint={self.endpoint!r})"

    @property
    def usage(self) -> Usage:
        """What all calls so far have used, as the server reported it."""
        return self._usage

    @property
    def cost(self) -> float | None:
        """The price of `usage`; None without prices."""
        if self.prompt_price is None or self.cached_price is None or self.completion_price is None:
            return None
        used = self._usage
        return (
            (used.prompt_tokens - used.cached_tokens) * self.prompt_price
            + used.cached_tokens * self.cached_price
            + used.completion_tokens * self.completion_price
        ) / 1e6

    def account(self) -> str:
        """Usage, and its price if prices are known, in one line."""
        return f"{self.usage}" + ("" if self.cost is None else f"; cost {self.cost:.4g}")

    async def complete(
        self,
        prompt: Prompt,
        params: SamplingParams,
        strategy: TokenStrategy,
        *,
        prefill: str = "",
        on_text: OnText | None = None,
    ) -> Generation:
        super().require(strategy)
        if prefill and "prefill" not in self.capabilities:
            raise CapabilityError(f"{self.name} cannot continue an answer that was begun for it (prefill).")
        request = self._form.arguments(prompt, params, prefill)
        began = time.perf_counter()
        reply = Reply(on_text, max_new_tokens=params.max_new_tokens)
        error = await self._answered(request, reply)
        with self._lock:
            self._usage = self._usage.after(reply, failed=error is not None)
        seconds = time.perf_counter() - began
        return Generation(
            text=reply.text if error is None else reply.kept,
            tokens=[],
            finish_reason="error" if error is not None else reply.finish_reason,
            metrics=replace(
                measure([], seconds=seconds, prompt_tokens=reply.prompt_tokens),
                first_token_seconds=0.0 if reply.first_text_at is None else reply.first_text_at - began,
                reused_tokens=reply.cached_tokens,
                prefill_tokens=reply.prompt_tokens - reply.cached_tokens,
                new_tokens=reply.new_tokens,
            ),
            error=error,
        )

    def require(self, strategy: Strategy) -> None:
        """See `Backend.require`. Also finds out, before anything runs, whether the server continues messages."""
        from decoding.strategies.base import TokenStrategy  # strategies are written against backends

        super().require(strategy)
        if self._prefill is None and not isinstance(strategy, TokenStrategy):  # those begin no answers
            self._prefill, reply = continues_messages(self._form, self.base_url, self._api_key, self.timeout)
            self._set_prefill(bool(self._prefill))
            if reply is not None:
                with self._lock:
                    self._usage = self._usage.after(reply, failed=False)

    def _set_prefill(self, continues: bool) -> None:
        self.capabilities = frozenset({"text", "prefill"} if continues else {"text"})  # type: ignore[misc]

    async def _answered(self, request: Mapping[str, Any], reply: Reply) -> str | None:
        """Make attempts until one succeeds, or none can. Returns the cause if all failed."""
        session = await self._session()
        if self.warm_prefix:
            await session.warming.wait(prompt_text(request), reply.begun)
        while True:
            reply.begin()
            try:
                async with session.places:
                    await self._attempt(session.client, request, reply)
                return None
            except ReplyFailure as failure:
                cause = self._presentable(str(failure))
                if failure.wait > self.timeout:
                    return f"{cause}; it asks to wait {failure.wait:.0f} s, which is longer than the timeout"
                if not failure.transient or reply.attempts > self.retries:
                    return cause + (f" (after {reply.attempts} attempts)" if reply.attempts > 1 else "")
                longest = min(FIRST_DELAY * 2 ** (reply.attempts - 1), LONGEST_DELAY)
                # Random, so that calls which failed together do not come back together.
                pause = failure.wait + longest * random.uniform(0.5, 1.0)
            finally:
                reply.begun.set()  # nobody waits for a second attempt
            await asyncio.sleep(pause)  # without holding a place

    async def _attempt(self, client: AsyncOpenAI, request: Mapping[str, Any], reply: Reply) -> None:
        """One call, read to its end. Raises ReplyFailure."""
        create: Any = client.chat.completions.create if self.endpoint == "chat" else client.completions.create
        try:
            stream = await asyncio.wait_for(create(**request), self.timeout)
            try:
                await read_reply(stream, reply, self.timeout)
            finally:
                await stream.close()
        except ReplyFailure:
            raise
        except Exception as error:
            raise failure_of(error, self.timeout) from None

    async def _session(self) -> _Session:
        """This event loop's connections. They are closed when the loop shuts down, as `asyncio.run` does."""
        loop = asyncio.get_running_loop()
        with self._lock:
            for closed in [other for other in self._sessions if other.is_closed()]:
                del self._sessions[closed]
            if loop in self._sessions:
                return self._sessions[loop]
        lifetime = self._lifetime()
        session = _Session(
            await anext(lifetime), asyncio.Semaphore(self.concurrency), PrefixWarming(self.warm_prefix), lifetime
        )
        with self._lock:
            return self._sessions.setdefault(loop, session)

    async def _lifetime(self) -> AsyncGenerator[AsyncOpenAI, None]:
        """Yields the client. A loop that shuts down closes its unfinished generators, and so the client."""
        from openai import AsyncOpenAI, DefaultAsyncHttpxClient

        plain = urlsplit(self.base_url).scheme == "http"
        client = AsyncOpenAI(
            base_url=self.base_url,
            api_key=self._api_key or "none",
            timeout=self.timeout,
            max_retries=0,
            # Reading the certificates takes as long as many an answer; without redirects, http never needs them.
            http_client=DefaultAsyncHttpxClient(verify=False, follow_redirects=False) if plain else None,
        )
        try:
            yield client
        finally:
            await client.close()

    def _presentable(self, cause: str) -> str:
        """A cause that may quote a server: without the key that some repeat, on one line, and not a whole page."""
        cause = cause.replace(self._api_key, "[masked]") if self._api_key else cause
        cause = " ".join(cause.split())
        return cause if len(cause) <= 300 else cause[:300] + " …"


def _header_value(key: str) -> str:
    """The key without the line end that files bring along. One that no header can hold would end up in an error."""
    key = key.strip()
    if not (key.isascii() and (key.isprintable() and " " not in key)):
        raise InvalidRequest("the API key must be printable ASCII without spaces; check where it comes from.")
    return key
