"""One sequence on its way through the engine."""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Sequence as Tokens
from dataclasses import dataclass, field

import numpy as np

from decoding.engine.block import settled
from decoding.engine.decoder import Decoder
from decoding.trace import Step
from decoding.types import FinishReason, SamplingParams

CommitHook = Callable[["Sequence", Tokens[int]], "int | None"]
"""Called with the new tokens of every commit; may return how many of them to keep, which ends the sequence."""


@dataclass(eq=False)
class Sequence:
    """State of one sequence. Decoders read it; only the engine writes it.

    id: the engine's number; also orders sequences. prompt: token ids. tokens: prompt and new ones.
    eos: ids that end the sequence. limit: length of `tokens` at which it ends for lack of room.
    draws: commits so far; with `params.seed` it keys the sequence's random numbers.
    slot: where its keys and values live while it runs. cached: committed tokens that the cache holds.
    """

    id: int
    prompt: list[int]
    params: SamplingParams
    decoder: Decoder
    eos: frozenset[int]
    limit: int
    submitted: float
    on_commit: CommitHook | None = None
    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    trace: list[Step] = field(default_factory=list)
    draws: int = 0
    slot: int = -1
    cached: int = 0
    reused: int = 0
    finish_reason: FinishReason | None = None
    error: Exception | None = None
    prompt_array: np.ndarray = field(init=False)

    def __post_init__(self) -> None:
        self.tokens = list(self.prompt)
        self.prompt_array = np.asarray(self.prompt, dtype=np.int64)

    @property
    def new_tokens(self) -> list[int]:
        """Tokens generated so far."""
        return self.tokens[len(self.prompt) :]

    @property
    def room(self) -> int:
        """How many guesses could still be committed, leaving a place for the bonus token."""
        return self.limit - len(self.tokens) - 1

    @property
    def pending(self) -> int:
        """Committed tokens that the cache does not hold yet; 1 between decoding steps if attention is causal."""
        return len(self.tokens) - self.cached

    @property
    def span(self) -> int:
        """How far attention looks ahead, see `Decoder.span`."""
        return self.decoder.span

    @property
    def reading(self) -> bool:
        """Whether its prompt has to be read further before its decoder plans. Where attention is causal, what is left
        to read brings the first token, be it the prompt's last token alone."""
        begun = len(self.tokens) > len(self.prompt)
        return not begun and (self.span == 1 or self.cached < settled(len(self.prompt), self.span))
