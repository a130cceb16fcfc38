"""One answer of Skeleton-of-Thought in the making: routed, outlined, expanded while the outline is being written."""

from __future__ import annotations

import asyncio
import time
import zlib
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import prompts
from decoding.assembly import assembled_metrics
from decoding.backends.base import Backend, OnText
from decoding.errors import DecodingError, InvalidRequest
from decoding.strategies.base import TokenStrategy
from decoding.strategies.merge import Composition
from decoding.strategies.outline import OutlineParser, Point, steered
from decoding.strategies.router import Always, Router
from decoding.trace import Metrics, measure, shifted
from decoding.types import FinishReason, Generation, Message, Prompt, SamplingParams

if TYPE_CHECKING:
    from decoding.strategies.skeleton import SkeletonOfThought

STYLES = ("skeleton", "skeleton/small")
"""Templates for large models and for small ones."""

_CUT_OFF = ("length", "context", "cancelled", "error")


class SkeletonAnswer:
    """Answers one request; `write` is called once. Everything runs in one event loop, between steps of the engine."""

    def __init__(
        self,
        strategy: SkeletonOfThought,
        prompt: Prompt,
        params: SamplingParams,
        backend: Backend,
        on_text: OnText | None,
    ) -> None:
        self._strategy = strategy
        self._prompt = prompt
        self._params = params
        self._backend = backend
        self._on_text = on_text
        self._history, self._question = _conversation(prompt)
        self._most = strategy.points(params.max_new_tokens)
        self._ask = strategy.asked(
            self._question, self._history, params.max_new_tokens, can_prefill="prefill" in backend.capabilities
        )
        self._style = strategy.prompt or STYLES[0 < backend.parameters < 1e9]
        self._began = time.perf_counter()
        self._parts: dict[str, Generation] = {}
        self._points: list[Point] = []
        self._places = asyncio.Semaphore(self._most)  # for points that are being written
        self._tasks: list[asyncio.Task[Generation]] = []  # one for each point
        self._text = Composition()
        self._shown = 0  # characters of it
        self._over = False  # whatever is still being written is not wanted any more

    async def write(self) -> Generation:
        try:
            return await self._write()
        finally:  # after an error or a cancellation, nobody waits for the points
            for task in self._tasks:
                task.cancel()
            await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _write(self) -> Generation:
        if not await self._wants_outline():
            answer = await self._plain()
            return self._assembled(answer.text, answer.finish_reason, answer.error)
        outline = await self._outline()
        if len(self._points) < 2:
            self._over = True
            if outline.error is not None:
                return self._assembled("", outline.finish_reason, outline.error)
            answer = await self._plain()
            await asyncio.gather(*self._tasks)  # of a single point; it ended at its next token
            return self._assembled(answer.text, answer.finish_reason, answer.error)
        points = await asyncio.gather(*self._tasks)
        failed = [f"point {place}: {point.error}" for place, point in enumerate(points, 1) if point.error is not None]
        if outline.error is not None:
            failed.insert(0, f"outline: {outline.error}")
        if self._over:
            return self._assembled(self._text.text[: self._shown], "stop", "; ".join(failed) or None)
        reason: FinishReason = "error" if failed else points[-1].finish_reason
        return self._assembled(self._text.text, reason, "; ".join(failed) or None)

    async def _wants_outline(self) -> bool:
        router = self._strategy.router
        assert isinstance(router, Router)
        if isinstance(router, Always):
            return True
        offset = time.perf_counter() - self._began
        route = await router.route(self._question, self._history, self._backend, self._strategy.templates)
        self._parts["router"] = replace(route.generation, trace=shifted(route.generation.trace, offset))
        return route.skeleton

    async def _plain(self) -> Generation:
        """What `inner` alone answers, as it would if there were no outlines."""
        offset = time.perf_counter() - self._began
        answer = await self._strategy.stage("inner").answer(self._prompt, self._params, self._backend, self._on_text)
        self._parts["answer"] = replace(answer, trace=shifted(answer.trace, offset))
        return answer

    async def _outline(self) -> Generation:
        chat = prompts.render(f"{self._style}/outline", folder=self._strategy.templates, **self._ask)
        expand = self._strategy.stage("expand")
        at_once = self._strategy.at_once or self._backend.at_once(chat.messages, expand, self._most)
        self._places = asyncio.Semaphore(at_once)
        parser = OutlineParser(max_points=self._most)
        steer = self._strategy.steer and bool(chat.prefill) and "tokens" in self._backend.capabilities
        written, fed = chat.prefill, 0
        ahead: str | None = None  # the outline with a number that was given
        began = time.perf_counter()

        def points() -> list[tuple[Point, str]]:
            """Those that complete lines complete, each with the outline as far as its own line."""
            nonlocal fed
            complete = []
            while (end := written.find("\n", fed) + 1) and not parser.done:
                complete += [(point, written[:end].rstrip()) for point in parser.feed(written[fed:end])]
                fed = end
            return complete

        def read(piece: str) -> bool:
            nonlocal written, ahead
            if written == ahead:
                return True
            written += piece
            ahead = steered(written) if steer else None
            written = ahead or written
            found.extend(points())
            if self._strategy.pipeline:
                self._begin(found)
            return ahead is not None or parser.done or self._over

        found = points()
        stretches: list[Generation] = []
        left = self._strategy.outline_tokens
        while not stretches or (ahead is not None and left > 0 and not parser.done and not self._over):
            label = "outline" if not stretches else f"outline, from point {len(stretches) + 1}"
            begun, ahead = replace(chat, prefill=written), None
            stretches.append(await self._generate(label, begun, left, read))
            left -= len(stretches[-1].tokens)
        if written == ahead or (len(stretches) > 1 and not stretches[-1].text):
            written = written[: written.rindex("\n")]  # a number that nothing followed
        outline = self._parts["outline"] = _joined(
            stretches, written.removeprefix(chat.prefill), time.perf_counter() - began
        )
        if not parser.done:
            rest = parser.feed(written[fed:]) + parser.finish(truncated=outline.finish_reason in _CUT_OFF)
            found.extend((point, written.rstrip()) for point in rest)
        self._begin(found)
        return outline

    def _begin(self, found: list[tuple[Point, str]]) -> None:
        """Start to write the points, and forget that they were found."""
        for point, outline in found:
            if not self._over:
                self._points.append(point)
                place = self._text.add(point)
                self._tasks.append(asyncio.ensure_future(self._expand(place, point, outline)))
        found.clear()
        self._show()

    async def _expand(self, place: int, point: Point, outline: str) -> Generation:
        """Write one point, once those it needs are there: a task for each makes topological waves of them all.

        Only then does it take one of the places, so that those it waits for cannot be waiting for its own.
        """
        parents = [other for other, known in enumerate(self._points[:place]) if known.index in point.needs]
        if parents:
            await asyncio.wait([self._tasks[parent] for parent in parents])
        async with self._places:
            if self._over:
                return Generation("", [], "cancelled", Metrics())
            return await self._written(place, point, parents, outline)

    async def _written(self, place: int, point: Point, parents: Sequence[int], outline: str) -> Generation:
        limit = self._strategy.budget(place, self._params.max_new_tokens)
        chat = prompts.render(
            f"{self._style}/expand",
            folder=self._strategy.templates,
            outline=outline,
            index=point.index,
            title=point.title,
            parents=[
                {"index": self._points[parent].index, "title": self._points[parent].title, "text": text}
                for parent in parents
                if (text := self._text.own(parent))
            ],
            **self._ask | {"length": self._strategy.length_of(limit)},
        )

        def read(piece: str) -> bool:
            self._text.feed(place, piece)
            self._show()
            return self._over

        label = f"point {place + 1}"
        generation = await self._generate(label, chat, limit, read, (f"\n{point.index + 1}.",))
        self._parts[label] = generation
        self._text.finish(place, truncated=generation.finish_reason in _CUT_OFF)
        self._show()
        return generation

    def _show(self) -> None:
        """Hand on what has become certain. Until there are two points, the answer may yet be a plain one."""
        if self._on_text is None or self._over or len(self._points) < 2:
            return
        if more := self._text.text[self._shown :]:
            self._shown += len(more)
            self._over = self._on_text(more) is True

    async def _generate(
        self, label: str, chat: prompts.ChatPrompt, limit: int, read: OnText, stop: Sequence[str] = ()
    ) -> Generation:
        """One sequence of the answer, which has a seed of its own, by its label."""
        outline = label.startswith("outline")
        stage: TokenStrategy = self._strategy.stage("outline" if outline else "expand")
        params = self._params.but(
            max_new_tokens=limit,
            min_new_tokens=0,
            ignore_eos=False,
            seed=self._params.seed ^ zlib.crc32(label.encode()),
            stop=(*self._params.stop, *stop),
            repetition_penalty=self._strategy.repetition_penalty
            if self._params.repetition_penalty == 1 and "tokens" in self._backend.capabilities
            else self._params.repetition_penalty,
        )
        offset = time.perf_counter() - self._began
        try:
            generation = await self._backend.complete(chat.messages, params, stage, prefill=chat.prefill, on_text=read)
        except DecodingError as error:
            if outline:
                raise
            # A prompt that has grown too long, say: the other points are not to suffer for it.
            generation = Generation("", [], "error", Metrics(), error=f"{type(error).__name__}: {error}")
        return replace(generation, trace=shifted(generation.trace, offset))

    def _assembled(self, text: str, reason: FinishReason, error: str | None) -> Generation:
        """One generation from its parts, in the order they were asked for."""
        order = ("router", "outline")
        labels = sorted(self._parts, key=lambda label: (order.index(label) if label in order else 2, len(label), label))
        parts = {label: self._parts[label] for label in labels}
        trace = sorted((step for part in parts.values() for step in part.trace), key=lambda s: (s.step, s.sequence))
        router = parts.get("router")
        written = [part for label, part in parts.items() if label != "router"]
        seconds = time.perf_counter() - self._began
        metrics = assembled_metrics([*written, *([router] if router else [])], trace, seconds=seconds)
        if router is not None and not router.trace:  # no step of the engine tells what it cost
            metrics = replace(
                metrics,
                prefill_tokens=metrics.prefill_tokens + (router.metrics.prefill_tokens if trace else 0),
                forward_seconds=metrics.forward_seconds + router.metrics.forward_seconds,
                first_token_seconds=metrics.first_token_seconds + (0.0 if trace else router.metrics.seconds),
            )
        return Generation(
            text=text,
            tokens=[token for part in written for token in part.tokens],
            finish_reason=reason,
            metrics=metrics,
            trace=trace,
            error=error,
            parts=parts,
        )


def _joined(stretches: Sequence[Generation], text: str, seconds: float) -> Generation:
    """The outline, from what was generated between the numbers that it was given."""
    first, *later = stretches
    if not later:
        return first
    # That a stretch takes over what the one before it left is no reuse: it is the same text.
    trace = [*first.trace, *(replace(step, reused=0) for stretch in later for step in stretch.trace)]
    prompt_tokens = first.metrics.prompt_tokens + sum(stretch.metrics.prefill_tokens for stretch in later)
    return replace(
        later[-1],
        text=text,
        tokens=[token for stretch in stretches for token in stretch.tokens],
        metrics=measure(trace, seconds=seconds, prompt_tokens=prompt_tokens),
        trace=trace,
    )


def _conversation(prompt: Prompt) -> tuple[list[Message], str]:
    """Earlier messages, and the question that is asked now."""
    if isinstance(prompt, str):
        if not prompt.strip():
            raise InvalidRequest("the prompt is empty; give some text.")
        return [], prompt
    messages = [message for message in prompt if isinstance(message, dict)]
    if not messages or len(messages) != len(prompt) or messages[-1].get("role") != "user":
        raise InvalidRequest(
            "skeleton needs text, or messages of which the last is the user's; it cannot use token ids."
        )
    return messages[:-1], messages[-1]["content"]
