"""Text that is given, for tests of what happens around it.

`Dictated` is a strategy on a real engine: every token is a forward pass, but not what the model wants. `Typist` is a
backend that has text only.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from collections.abc import Sequence as List
from dataclasses import dataclass
from typing import ClassVar

from decoding.backends.base import Backend, OnText
from decoding.backends.local import LocalBackend
from decoding.engine.block import Commit
from decoding.engine.decoder import Decoder
from decoding.engine.output import Output
from decoding.engine.sequence import Sequence
from decoding.strategies import TokenStrategy
from decoding.trace import Metrics
from decoding.types import Generation, Prompt, SamplingParams
from tests.tiny import EOS

QUESTION = "How can a town use less water?"
OUTLINE = " Repair pipes\n2. Plant for drought\n3. Price by use\n4. Teach children\n"
TITLES = ("Repair pipes", "Plant for drought", "Price by use", "Teach children")


@dataclass(frozen=True)
class Dictated(TokenStrategy):
    """Writes `texts[key]` for the first key that stands at the end of the prompt, after the last turn began.

    texts: (key, text) pairs; the key "" fits every prompt. A text of "!" fails instead.
    """

    texts: tuple[tuple[str, str], ...]

    name: ClassVar[str] = "dictated"
    summary: ClassVar[str] = "a given text, for tests"

    @property
    def lossless(self) -> bool:
        return False

    def decoder(self, backend: LocalBackend) -> Decoder:
        return _Dictation(self.texts)


class _Dictation(Decoder):
    """One byte is one token of `tiny_tokenizer`."""

    def __init__(self, texts: tuple[tuple[str, str], ...]) -> None:
        self._texts = texts

    def commit(self, sequences: List[Sequence], output: Output) -> list[Commit]:
        commits = []
        for sequence in sequences:
            asked = bytes(token for token in sequence.prompt if token < 256).decode()
            asked = asked[asked.rindex("user\n") :]
            text = next(text for key, text in self._texts if key in asked)
            if text == "!":
                raise RuntimeError("dictation ran dry")
            begun = asked.rpartition("assistant\n1.")[2]  # of an outline that goes on behind a number it was given
            data = text.encode()
            place = len(sequence.new_tokens)
            if text.startswith(begun) or begun.startswith(text):
                place += len(begun)
            commits.append(Commit((data[place] if place < len(data) else EOS,)))
        return commits


OUTLINED = Dictated((("", OUTLINE),))
"""The outline of `TITLES`, after a pre-filled "1."."""


class Typist(Backend):
    """A server that types one word at a time: it has text only, and takes as long as its answers do."""

    name = "typist"
    capabilities = frozenset({"text"})

    def __init__(self, reply: Callable[[str], str]) -> None:
        self.reply = reply
        self.log: list[str] = []

    async def complete(
        self,
        prompt: Prompt,
        params: SamplingParams,
        strategy: TokenStrategy,
        *,
        prefill: str = "",
        on_text: OnText | None = None,
    ) -> Generation:
        asked = prompt if isinstance(prompt, str) else prompt[-1]["content"]  # type: ignore[index]
        self.log.append(f"> {asked[-30:]}")
        text = ""
        for word in self.reply(asked).split(" "):
            await asyncio.sleep(0)
            piece = (" " if text else "") + word
            text += piece
            if on_text is not None and on_text(piece) is True:
                break
        self.log.append(f"< {asked[-30:]}")
        return Generation(text, [], "eos", Metrics(new_tokens=len(text.split())))
