"""What a strategy may ask of a backend."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, ClassVar

from decoding.errors import CapabilityError
from decoding.types import Generation, Prompt, SamplingParams

if TYPE_CHECKING:
    from decoding.strategies.base import Strategy, TokenStrategy

OnText = Callable[[str], object]
"""Receives pieces of the answer as they become final; joined they are the answer. Returning True ends it there."""


class Backend(ABC):
    """Completes prompts. Strategies are written against this and run on any backend that can do what they need.

    capabilities: "text" (complete a prompt), "prefill" (continue an answer that was begun for it),
    "tokens" (decoders may choose blocks and see logits). parameters: of the model, 0 if unknown.
    """

    name: str
    capabilities: ClassVar[frozenset[str]]
    parameters: int = 0

    @abstractmethod
    async def complete(
        self,
        prompt: Prompt,
        params: SamplingParams,
        strategy: TokenStrategy,
        *,
        prefill: str = "",
        on_text: OnText | None = None,
    ) -> Generation:
        """Continue `prompt`, after the beginning `prefill` of the answer, which the result does not repeat."""

    def forget(self) -> None:  # noqa: B027 - a backend that keeps nothing has nothing to do
        """Reuse nothing of earlier requests for the next one: no cached prefix, nothing that a drafter learned."""

    def pieces(self, tokens: Sequence[int]) -> list[str]:
        """The text of every token on its own, for display; empty if the backend does not know."""
        return []

    def require(self, strategy: Strategy) -> None:
        """Raise CapabilityError if the strategy needs what this backend lacks."""
        missing = sorted(strategy.needs - self.capabilities)
        if missing:
            raise CapabilityError(
                f"{strategy} needs {' and '.join(map(repr, missing))}, which {self.name} does not offer; use "
                + ("a local model for it." if "tokens" in missing else "another backend for it.")
            )
