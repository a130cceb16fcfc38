"""Skeleton-of-Thought: outline the answer, then write all points of the outline at the same time.

Ning et al. 2024, "Skeleton-of-Thought: Prompting LLMs for Efficient Parallel Generation".
"""

from __future__ import annotations

import asyncio
import time
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import prompts
from decoding.assembly import assembled_metrics
from decoding.backends.base import Backend, OnText
from decoding.errors import InvalidRequest
from decoding.strategies.autoregressive import Autoregressive
from decoding.strategies.base import Strategy, TokenStrategy, parse
from decoding.strategies.merge import merge, write_point
from decoding.strategies.outline import OutlineParser, Point
from decoding.trace import shifted
from decoding.types import FinishReason, Generation, Message, Prompt, SamplingParams


@dataclass(frozen=True)
class SkeletonOfThought(Strategy):
    """Two stages: an outline, then one sequence per point, all in one batch.

    inner: the token-level strategy of both stages. max_points: points beyond these are left out.
    outline_tokens, point_tokens: limits of the outline and of each point; a request's `max_new_tokens`
    bounds the points together. repetition_penalty: for requests that set none, on local models only (servers
    have no common field for it); without it a small model writes the same point over and over. prompt: the
    templates, a name under `prompts/`; "" takes the ones for small models below a billion parameters.
    templates: a folder whose templates go before the shipped ones.

    An outline of fewer than two points means that the question does not want a list: it is then answered
    by `inner` alone. The answer's `parts` hold the outline and every point.
    """

    inner: Strategy | str = Autoregressive()
    max_points: int = 6
    outline_tokens: int = 96
    point_tokens: int = 64
    repetition_penalty: float = 1.1
    prompt: str = ""
    templates: str | None = None

    name: ClassVar[str] = "skeleton"
    summary: ClassVar[str] = "an outline first, then all its points in parallel; another answer than plain decoding's"
    needs: ClassVar[frozenset[str]] = frozenset({"text"})

    def __post_init__(self) -> None:
        inner = parse(self.inner) if isinstance(self.inner, str) else self.inner
        if not isinstance(inner, TokenStrategy):
            raise InvalidRequest(f"inner must be a token-level strategy, which {inner} is not.")
        object.__setattr__(self, "inner", inner)
        object.__setattr__(self, "needs", inner.needs)  # a backend that cannot run the stages cannot run the whole
        for option, least in (("max_points", 2), ("outline_tokens", 1), ("point_tokens", 1)):
            if not isinstance(value := getattr(self, option), int) or value < least:
                raise InvalidRequest(f"{option} must be an integer of at least {least}, not {value!r}.")

    @property
    def lossless(self) -> bool:
        return False

    async def answer(
        self, prompt: Prompt, params: SamplingParams, backend: Backend, on_text: OnText | None = None
    ) -> Generation:
        began = time.perf_counter()
        parts: dict[str, Generation] = {}

        async def part(
            label: str, chat: prompts.ChatPrompt, limit: int, stop: Sequence[str] = (), watch: OnText | None = None
        ) -> Generation:
            """One sequence of the answer. Every part has a seed of its own, by its label."""
            limited = params.but(
                max_new_tokens=limit,
                min_new_tokens=0,
                ignore_eos=False,
                seed=params.seed ^ zlib.crc32(label.encode()),
                stop=(*params.stop, *stop),
                repetition_penalty=self.repetition_penalty
                if params.repetition_penalty == 1 and "tokens" in backend.capabilities
                else params.repetition_penalty,
            )
            offset = time.perf_counter() - began
            generation = await backend.complete(
                chat.messages, limited, self._inner, prefill=chat.prefill, on_text=watch
            )
            parts[label] = replace(generation, trace=shifted(generation.trace, offset))
            return generation

        style = self.prompt or ("skeleton/small" if 0 < backend.parameters < 1e9 else "skeleton")
        history, question = _conversation(prompt)
        ask: dict[str, object] = {"question": question, "history": history, "max_points": self.max_points}
        ask["can_prefill"] = "prefill" in backend.capabilities
        chat = prompts.render(f"{style}/outline", folder=self.templates, **ask)
        parser = OutlineParser(max_points=self.max_points)
        parser.feed(chat.prefill)

        def enough(piece: str) -> bool:
            parser.feed(piece)
            return parser.done

        outline = await part("outline", chat, self.outline_tokens, watch=enough)
        if outline.error is not None:
            return _assemble("", outline.finish_reason, parts, began, outline.error)
        parser.finish(truncated=outline.finish_reason == "length")
        points = parser.points
        if len(points) < 2:
            plain = await self._inner.answer(prompt, params, backend, on_text)
            parts["answer"] = replace(
                plain, trace=shifted(plain.trace, time.perf_counter() - began - plain.metrics.seconds)
            )
            return _assemble(plain.text, plain.finish_reason, parts, began, plain.error)
        limit = min(self.point_tokens, max(params.max_new_tokens // len(points), 1))
        texts: list[str | None] = [None] * len(points)
        shown = 0

        async def expand(place: int, point: Point) -> Generation:
            nonlocal shown
            point_chat = prompts.render(
                f"{style}/expand",
                folder=self.templates,
                outline=chat.prefill + outline.text,
                index=point.index,
                title=point.title,
                **ask,
            )
            generation = await part(f"point {place + 1}", point_chat, limit, (f"\n{point.index + 1}.",))
            texts[place] = generation.text
            while shown < len(points) and (ready := texts[shown]) is not None:
                if on_text is not None:
                    on_text(("\n\n" if shown else "") + write_point(shown + 1, points[shown], ready))
                shown += 1
            return generation

        expansions = await asyncio.gather(*(expand(place, point) for place, point in enumerate(points)))
        failed = [(place, g.error) for place, g in enumerate(expansions, start=1) if g.error is not None]
        error = "; ".join(f"point {place}: {cause}" for place, cause in failed) or None
        reason: FinishReason = "error" if failed else expansions[-1].finish_reason
        return _assemble(merge(points, [g.text for g in expansions]), reason, parts, began, error)

    @property
    def _inner(self) -> TokenStrategy:
        assert isinstance(self.inner, TokenStrategy)
        return self.inner


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


def _assemble(
    text: str, reason: FinishReason, parts: dict[str, Generation], began: float, error: str | None
) -> Generation:
    """One generation from its parts, in the order they were asked for."""
    trace = sorted((step for part in parts.values() for step in part.trace), key=lambda s: (s.step, s.sequence))
    labels = sorted(parts, key=lambda label: (label != "outline", len(label), label))
    return Generation(
        text=text,
        tokens=[token for label in labels for token in parts[label].tokens],
        finish_reason=reason,
        metrics=assembled_metrics(list(parts.values()), trace, seconds=time.perf_counter() - began),
        trace=trace,
        error=error,
        parts={label: parts[label] for label in labels},
    )
