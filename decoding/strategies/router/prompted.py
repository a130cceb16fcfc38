"""A router that asks the model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import prompts
from decoding.backends.base import Backend
from decoding.errors import InvalidRequest
from decoding.strategies.router.base import EXAMPLE, Route, Router
from decoding.types import Message

_TEMPLATES = ("router/route", "router/small/route")
"""For large models and for small ones."""


@dataclass(frozen=True)
class Prompted(Router):
    """Ask the model: A, a list of independent points; B, points that build on each other; C, no list. A is the one.

    A local model does not write: the likelihoods of the three letters are compared, in one forward pass. Of a server
    the reply is read.
    threshold: how likely A must be among the three, in place of "most likely" (local models only).
    prompt: the template, a name under `prompts/`; "" takes the one for small models below a billion parameters.
    """

    threshold: float | None = None
    prompt: str = ""

    name: ClassVar[str] = "prompt"

    def __post_init__(self) -> None:
        if self.threshold is not None and not 0 < self.threshold < 1:
            raise InvalidRequest(f"threshold must lie between 0 and 1, not {self.threshold!r}.")

    def try_templates(self, templates: str | None) -> None:
        for name in [self.prompt] if self.prompt else _TEMPLATES:
            prompts.render(name, folder=templates, question="?", history=EXAMPLE)

    async def route(
        self, question: str, history: Sequence[Message], backend: Backend, templates: str | None = None
    ) -> Route:
        name = self.prompt or _TEMPLATES[0 < backend.parameters < 1e9]
        chat = prompts.render(name, folder=templates, question=question, history=list(history))
        choice = await backend.choose(chat.messages, ("A", "B", "C"))
        chances = choice.probabilities
        skeleton = choice.option == "A"
        if self.threshold is not None and chances:
            skeleton = chances["A"] >= self.threshold
        reason = ", ".join(f"{option} {chance:.2f}" for option, chance in chances.items())
        return Route.chosen(skeleton, reason or choice.option or "no letter in the reply", choice.generation)
