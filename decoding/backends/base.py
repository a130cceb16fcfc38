"""What a strategy may ask of a backend."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, ClassVar

from decoding.backends.choice import Choice, named_option
from decoding.errors import CapabilityError, InvalidRequest
from decoding.types import Generation, Message, Prompt, SamplingParams, is_text

if TYPE_CHECKING:
    from decoding.strategies.base import Strategy, TokenStrategy

OnText = Callable[[str], object]
"""Receives pieces of the answer as they become final; joined they are the answer. Returning True ends it there."""


class Backend(ABC):
    """Completes prompts. Strategies are written against this and run on any backend that can do what they need.

    capabilities: "text" (complete a prompt), "prefill" (continue an answer that was begun for it),
    "tokens" (decoders may choose blocks and see next-token logits), "masked" (they may fill masks in).
    parameters: of the model, 0 if unknown.
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

    async def choose(self, prompt: Prompt, options: Sequence[str]) -> Choice:
        """Which of a few short options ("A", "B") the model answers with.

        It is read from a short reply; a backend that sees tokens compares the options' likelihoods instead.
        """
        from decoding.strategies.autoregressive import Autoregressive

        generation = await self.complete(prompt, SamplingParams(max_new_tokens=8), Autoregressive())
        return Choice(None if generation.error else named_option(generation.text, options), generation)

    def at_once(self, prompt: Prompt, strategy: TokenStrategy, most: int) -> int:
        """How many continuations of a prompt to write at the same time, of `most` in all: as many as raise the tokens
        per second, and all of them where nobody knows what that costs."""
        return most

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
                + _instead(missing, self.capabilities)
            )


def _instead(missing: Sequence[str], offered: frozenset[str]) -> str:
    """What to use where these capabilities are missing."""
    if "masked" in missing:
        return "a masked checkpoint (LLaDA, Dream, SDAR … or one whose config.json has a section 'masked') for it."
    if "tokens" in missing and "masked" in offered:
        return "block-diffusion or mask-predict: this model fills masks in and does not continue a text."
    return "a local model for it." if "tokens" in missing else "another backend for it."


def messages_of(prompt: Prompt) -> list[Message]:
    """A prompt that is no list of token ids, as messages. Raises InvalidRequest for what is empty or no text."""
    given: Sequence[object] = prompt
    if isinstance(prompt, str):
        given = [{"role": "user", "content": prompt}] if prompt.strip() else []
    if not isinstance(given, Sequence):
        raise InvalidRequest(f"a prompt is text, a list of messages or a list of token ids, not {prompt!r:.60}.")
    if not given:
        raise InvalidRequest("the prompt is empty; give text, at least one message, or token ids.")
    messages: list[Message] = []
    for message in given:
        if not isinstance(message, dict) or not all(isinstance(message.get(key), str) for key in ("role", "content")):
            raise InvalidRequest("every message of a prompt needs a 'role' and a 'content', both text.")
        if not is_text(message["content"]):
            raise InvalidRequest("the prompt holds half of a surrogate pair, which is no character; give it as UTF-8.")
        messages.append({"role": message["role"], "content": message["content"]})
    return messages
