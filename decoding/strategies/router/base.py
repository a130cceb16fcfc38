"""What a router is, and the two that need no model."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

from decoding.backends.base import Backend
from decoding.errors import InvalidRequest, UnknownName
from decoding.textform import TextForm, build, parse_call
from decoding.trace import Metrics
from decoding.types import Generation, Message

ROUTERS: dict[str, type[Router]] = {}

EXAMPLE: Sequence[Message] = ({"role": "user", "content": "?"}, {"role": "assistant", "content": "?"})
"""Earlier messages, to try templates with."""


@dataclass(frozen=True)
class Route:
    """Where a question goes: to Skeleton-of-Thought, or to plain decoding.

    generation: the request or computation that decided, for its cost; its text names the route and the reason
    ("skeleton: A 0.71, B 0.09, C 0.20"), and its error, if there is one, is why the route is plain.
    """

    skeleton: bool
    generation: Generation

    @classmethod
    def chosen(cls, skeleton: bool, reason: str, generation: Generation) -> Route:
        """A route whose generation's text says what it is."""
        text = f"{'skeleton' if skeleton else 'plain'}: {reason}"
        return cls(skeleton, replace(generation, text=text, tokens=[]))


class Router(TextForm, ABC):
    """Base of all routers. Subclasses are frozen dataclasses; one that sets a `name` is registered under it.

    needs: capabilities a backend must have.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"text"})

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if "name" in cls.__dict__:
            ROUTERS[cls.name] = cls

    def try_templates(self, templates: str | None) -> None:
        """Raise InvalidRequest if a template that this one asks with does not exist or does not work."""

    @abstractmethod
    async def route(
        self, question: str, history: Sequence[Message], backend: Backend, templates: str | None = None
    ) -> Route:
        """Decide. history: earlier messages, oldest first. templates: a folder of prompts that go before ours."""


@dataclass(frozen=True)
class Always(Router):
    """Every question gets an outline."""

    name: ClassVar[str] = "always"

    async def route(
        self, question: str, history: Sequence[Message], backend: Backend, templates: str | None = None
    ) -> Route:
        return Route.chosen(True, "always", computation(0.0))


@dataclass(frozen=True)
class FunctionRouter(Router):
    """A function from the question's text to whether it wants an outline."""

    function: Callable[[str], bool]

    def __str__(self) -> str:
        return str(getattr(self.function, "__qualname__", type(self.function).__qualname__))

    async def route(
        self, question: str, history: Sequence[Message], backend: Backend, templates: str | None = None
    ) -> Route:
        began = time.perf_counter()
        skeleton = bool(self.function(question))
        return Route.chosen(skeleton, str(self), computation(time.perf_counter() - began))


def computation(seconds: float, tokens: int = 0) -> Generation:
    """What a decision cost that was not a request: seconds, and tokens that went through the model for it."""
    forward = seconds if tokens else 0.0
    metrics = Metrics(seconds=seconds, forward_seconds=forward, prompt_tokens=tokens, prefill_tokens=tokens)
    return Generation("", [], "stop", metrics)


def as_router(value: Router | str | Callable[[str], bool]) -> Router:
    """A router from its text form, `name` or `name(option=value, …)`, or from a function; a router stays as it is."""
    if isinstance(value, Router):
        return value
    if callable(value):
        return FunctionRouter(value)
    if not isinstance(value, str):
        raise InvalidRequest(f"router must be {', '.join(map(repr, ROUTERS))} or a function, not {value!r}.")
    name, options = parse_call(value)
    if name not in ROUTERS:
        raise UnknownName("router", name, ROUTERS)
    router = build(ROUTERS[name], name, options)
    assert isinstance(router, Router)
    return router
