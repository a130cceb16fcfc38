"""Strategies: how a request becomes an answer. Values with a text form that parses back."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Any, ClassVar

from decoding.backends.base import Backend, OnText
from decoding.errors import UnknownName
from decoding.textform import TextForm, build, parse_call
from decoding.types import Generation, Prompt, SamplingParams

if TYPE_CHECKING:
    from decoding.backends.local import LocalBackend
    from decoding.engine.decoder import Decoder

REGISTRY: dict[str, type[Strategy]] = {}


class Strategy(TextForm, ABC):
    """Base of all strategies. Subclasses are frozen dataclasses, so equal options make equal strategies.

    name: how text refers to it; a subclass that sets one is registered under it.
    summary: one line for `--help`. needs: capabilities a backend must have.
    lossless: whether it promises plain decoding's tokens (greedy) or distribution (sampling).
    """

    name: ClassVar[str]
    summary: ClassVar[str] = ""
    needs: ClassVar[frozenset[str]] = frozenset({"text"})

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if "name" in cls.__dict__:
            REGISTRY[cls.name] = cls

    @property
    @abstractmethod
    def lossless(self) -> bool: ...

    @abstractmethod
    async def answer(
        self, prompt: Prompt, params: SamplingParams, backend: Backend, on_text: OnText | None = None
    ) -> Generation:
        """Answer one request."""


class TokenStrategy(Strategy):
    """A strategy that is one sequence from beginning to end, driven by a decoder."""

    needs: ClassVar[frozenset[str]] = frozenset({"text", "tokens"})

    @abstractmethod
    def decoder(self, backend: LocalBackend) -> Decoder:
        """A decoder for this strategy on this backend. Called once for each."""

    def home(self, backend: LocalBackend) -> LocalBackend:
        """Where its sequences run: on the backend itself, or on a variant of it with other weights."""
        return backend

    async def answer(
        self, prompt: Prompt, params: SamplingParams, backend: Backend, on_text: OnText | None = None
    ) -> Generation:
        return await backend.complete(prompt, params, self, on_text=on_text)


def parse(text: str) -> Strategy:
    """A strategy from its text form: `name` or `name(option=value, …)`; values may nest.

    >>> parse("speculative(drafter=prompt-lookup, draft_length=4)")

    Raises UnknownName for unknown strategies and options, InvalidRequest for anything else.
    """
    name, options = parse_call(text)
    if name not in REGISTRY:
        raise UnknownName("strategy", name, REGISTRY)
    strategy = build(REGISTRY[name], name, options)
    assert isinstance(strategy, Strategy)
    return strategy
