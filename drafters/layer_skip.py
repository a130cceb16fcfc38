"""The target guesses for itself in cheaper passes over its own cache: no second model, no second cache.

Zhang et al. 2023, "Draft & Verify"; Elhoushi et al. 2024, "LayerSkip". What such passes write to the cache behind the
committed tokens is scratch, and verification writes over it.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence as List
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar

import torch

from decoding.drafting import Draft, Drafter
from decoding.engine.block import Block
from decoding.engine.packing import Row
from decoding.errors import InvalidRequest
from decoding.textform import is_count
from drafters.draft_model import guess_ahead, top_probability

if TYPE_CHECKING:
    from decoding.backends.local import LocalBackend
    from decoding.engine.sequence import Sequence


class SelfSpeculation(Drafter):
    """Chains of guesses by passes of the target that `_cheaper` runs."""

    _backend: LocalBackend

    @abstractmethod
    def _cheaper(self, rows: List[Row]) -> torch.Tensor:
        """Logits [rows, vocab] of a step in which every row has pending tokens only."""

    def _confident(self, logits: torch.Tensor, best: torch.Tensor) -> torch.Tensor:
        """From such logits and the largest of each row, how likely [rows] that token is to be the target's."""
        return top_probability(logits, best)

    def propose(self, sequences: List[Sequence], lengths: List[int]) -> list[Draft]:
        cache = self._backend.engine.cache
        committed = [int(cache.lengths[sequence.slot]) for sequence in sequences]
        try:
            return self._guess(sequences, lengths)
        finally:
            for sequence, length in zip(sequences, committed, strict=True):
                cache.truncate(sequence.slot, length)

    def _guess(self, sequences: List[Sequence], lengths: List[int]) -> list[Draft]:
        """Drafts. What the cache gains is given back later."""

        def ahead(active: list[int], guesses: list[list[int]]) -> torch.Tensor:
            rows = self._rows([sequences[i] for i in active], guesses)
            logits = self._cheaper(rows)
            for row in rows:
                self._backend.engine.cache.commit(row.slot, row.pending)  # for as long as this draft is made
            return logits

        return guess_ahead(sequences, lengths, ahead, self._confident)

    def _rows(self, sequences: List[Sequence], guesses: List[list[int]]) -> list[Row]:
        """What of the sequences and the guesses behind them is not in the cache."""
        rows = []
        for sequence, guess in zip(sequences, guesses, strict=True):
            known = int(self._backend.engine.cache.lengths[sequence.slot])
            behind = guess[max(0, known - len(sequence.tokens)) :]
            rows.append(Row(sequence.slot, [*sequence.tokens[known:], *behind], Block()))
        return rows


@dataclass(eq=False)
class LayerSkip(SelfSpeculation):
    """layers: how many of the target's first layers guess, followed by its final norm and head; None takes half.

    Models that were trained to leave early guess well; others need most of their layers, and then this does not pay.
    """

    layers: int | None = None

    name: ClassVar[str] = "layer-skip"
    summary: ClassVar[str] = "the target's own first layers; layer-skip(layers=K)"

    _backend: LocalBackend = field(init=False, repr=False)
    _layers: int = field(default=0, init=False, repr=False)
    _share: float = field(default=1.0, init=False, repr=False)

    def __post_init__(self) -> None:
        if self.layers is not None and not is_count(self.layers):
            raise InvalidRequest(f"layer-skip needs layers to be an integer of at least 1, not {self.layers!r}.")

    def attach(self, backend: LocalBackend) -> None:
        """Raises InvalidRequest if the model does not have more layers than were asked for."""
        runner = backend.engine.runner
        count = int(runner.config.num_hidden_layers)
        self._layers = max(1, count // 2) if self.layers is None else self.layers
        if self._layers >= count:
            raise InvalidRequest(
                f"layer-skip(layers={self._layers}) leaves nothing out: {backend.name} has {count} layers; "
                f"give at most {count - 1}."
            )
        self._backend = backend
        head = runner.model.get_output_embeddings().weight.numel()
        body = max(0, backend.parameters - head)
        self._share = (head + body * self._layers / count) / (head + body)  # of the parameters that a step reads

    def _cheaper(self, rows: List[Row]) -> torch.Tensor:
        return self._backend.engine.runner.forward(rows, layers=self._layers)

    def cost(self, levels: int, sequences: int, context: float) -> float:
        return levels * self._share * float(self._backend.latency.cost(sequences, sequences, context))
