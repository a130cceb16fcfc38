"""Asking a model to choose among a few answers."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from collections.abc import Sequence as List
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch

from decoding.engine.block import Commit
from decoding.engine.decoder import Decoder
from decoding.types import Generation

if TYPE_CHECKING:
    from decoding.engine.output import Output
    from decoding.engine.sequence import Sequence as EngineSequence


@dataclass(frozen=True)
class Choice:
    """Which option a model prefers.

    option: None if its reply names none, or failed. probabilities: of each option against the others; empty
    where only text could be seen. generation: the request as it ran, for its cost.
    """

    option: str | None
    generation: Generation
    probabilities: Mapping[str, float] = field(default_factory=dict)


def named_option(reply: str, options: Sequence[str]) -> str | None:
    """The option that a reply consists of, or else the first that stands in it as a word of its own."""
    words = "|".join(re.escape(option) for option in sorted(options, key=len, reverse=True))
    match = re.search(rf"(?<!\w)(?:{words})(?!\w)", reply)
    return match[0] if match else None


class NextToken(Decoder):
    """Keeps how likely some tokens are behind a prompt. Its sequences are not meant to go on.

    logprobs: one natural-log probability per token of `tokens`, under the model itself; empty before the prompt
    has been read.
    """

    def __init__(self, tokens: Sequence[int]) -> None:
        self.tokens = list(tokens)
        self.logprobs: list[float] = []

    def commit(self, sequences: List[EngineSequence], output: Output) -> list[Commit]:
        logits = output.raw[int(output.offsets[0])].float()
        self.logprobs = torch.log_softmax(logits, dim=-1)[self.tokens].tolist()
        return [Commit((int(output.best(i)[0]),)) for i in range(len(sequences))]
