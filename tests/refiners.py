"""What the refiners' tests share: prompts, a way to run decoders on an engine, and what to count."""

from __future__ import annotations

from collections.abc import Sequence as List
from dataclasses import dataclass
from typing import Any

import numpy as np
from transformers import PreTrainedModel

from decoding.engine.decoder import Decoder
from decoding.engine.engine import Engine
from decoding.engine.sequence import Sequence
from decoding.types import SamplingParams
from tests import greedy
from tests.exactness import greedy_violations
from tests.greedy import VOCAB


def prompts(count: int, seed: int = 0) -> list[list[int]]:
    """Ragged prompts that repeat a piece, so that there is something to find in them."""
    random = np.random.default_rng(seed)
    pieces = [random.integers(3, VOCAB, size=random.integers(2, 9)).tolist() for _ in range(count)]
    return [(piece * 4)[: int(random.integers(3, 30))] for piece in pieces]


def run(engine: Engine, work: List[tuple[list[int], Decoder]], params: SamplingParams) -> list[Sequence]:
    """Decode everything together, without a failure."""
    sequences = greedy.run(engine, work, params)
    assert [s.error for s in sequences] == [None] * len(sequences)
    return sequences


def violations(model: PreTrainedModel, sequences: List[Sequence]) -> int:
    """Tokens that greedy decoding would not have chosen, in all sequences together."""
    return sum(len(greedy_violations(model, s.prompt, s.new_tokens)[0]) for s in sequences)


def accepted(sequences: List[Sequence]) -> int:
    """Guesses that were confirmed."""
    return sum(step.accepted for s in sequences for step in s.trace)


@dataclass
class Slope:
    """A latency model: every token beyond the first adds `each` to a step of 1."""

    each: float

    def cost(self, tokens: Any, sequences: Any, context: Any) -> Any:
        return 1 + self.each * (np.asarray(tokens, dtype=float) - 1)
