"""The target's own weights, in fewer bits, guess for the target in full precision.

After Tiwari et al. 2025, "QuantSpec" (self-speculation by quantised weights): a pass that reads a quarter of the bytes,
or less, is right nearly always, so drafts can be long, and every answer is still the full model's. The target's cache
serves both, so prompts are read once.
"""

from __future__ import annotations

from collections.abc import Sequence as List
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar

import torch

from decoding.drafting import Draft
from decoding.engine.block import Block
from decoding.engine.latency import LatencyModel, latency_of
from decoding.engine.packing import Row
from decoding.engine.precision import WEIGHTS
from decoding.errors import InvalidRequest
from drafters.layer_skip import SelfSpeculation

if TYPE_CHECKING:
    from decoding.backends.local import LocalBackend
    from decoding.engine.sequence import Sequence


_NOISE = 0.1
"""About how far rounding moves the difference of two logits; what guesses are worth is learnt as they come true."""


@dataclass(eq=False)
class Quantised(SelfSpeculation):
    """weights: "int8" or "int4", fewer bits than the target's.

    Needs the compiled step (a CPU and a C++ compiler): only there are such weights faster.
    """

    weights: str = "int8"

    name: ClassVar[str] = "quantised"
    summary: ClassVar[str] = "the target's own weights in 8 or 4 bits; quantised(weights=int4)"

    trust: ClassVar[float] = 0.95
    _backend: LocalBackend = field(init=False, repr=False)
    _latency: LatencyModel | None = field(default=None, init=False, repr=False)

    def __post_init__(self) -> None:
        if self.weights not in WEIGHTS[1:]:
            raise InvalidRequest(f"weights must be {' or '.join(WEIGHTS[1:])}, not {self.weights!r}.")

    def attach(self, backend: LocalBackend) -> None:
        """Raises ModelError where such weights would not be faster than the target's."""
        backend.engine.runner.hold(self.weights)
        self._backend = backend
        self._latency = None

    def _guess(self, sequences: List[Sequence], lengths: List[int]) -> list[Draft]:
        if any(sequence.params.temperature > 0 for sequence in sequences):
            return super()._guess(sequences, lengths)
        cache, runner = self._backend.engine.cache, self._backend.engine.runner
        guesses: list[list[int]] = [[] for _ in sequences]
        leads: list[list[float]] = [[] for _ in sequences]
        done = 0
        for length in sorted({length for length in lengths if length > 0}):  # as far as the shortest one left
            active = [i for i, own in enumerate(lengths) if own >= length]
            rows = self._rows([sequences[i] for i in active], [guesses[i] for i in active])
            tokens, lead = runner.favoured(rows, length - done, self.weights)
            for i, row, new, by in zip(active, rows, tokens.T.tolist(), lead.T.tolist(), strict=True):
                cache.commit(row.slot, [*row.pending, *new[:-1]])
                guesses[i] += new
                leads[i] += by
            done = length
        return [
            Draft(Block(tokens), confidence=torch.sigmoid(torch.tensor(lead) / _NOISE).tolist())
            for tokens, lead in zip(guesses, leads, strict=True)
        ]

    def _cheaper(self, rows: List[Row]) -> torch.Tensor:
        return self._backend.engine.runner.forward(rows, weights=self.weights)

    def _confident(self, logits: torch.Tensor, best: torch.Tensor) -> torch.Tensor:
        """The first token stays first unless rounding moves it by more than its lead on the second."""
        return torch.sigmoid((best - logits.topk(2, dim=-1).values[:, 1]) / _NOISE)

    def cost(self, levels: int, sequences: int, context: float) -> float:
        if self._latency is None:
            self._latency = latency_of(self._backend.engine.runner, self.weights)
        return levels * float(self._latency.cost(sequences, sequences, context))
