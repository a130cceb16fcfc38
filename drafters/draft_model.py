"""A smaller model with the same tokenizer guesses, one token after the other, for all sequences at once.

Leviathan et al. 2023; Chen et al. 2023.
"""

from __future__ import annotations

from collections.abc import Sequence as List
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar

import numpy as np
import torch

from decoding.drafting import Draft, Drafter
from decoding.engine.block import Block
from decoding.engine.packing import Row
from decoding.engine.runner import Runner
from decoding.engine.sampling import SamplingColumns, draw, probabilities, uniforms
from decoding.errors import InvalidRequest, ModelError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from decoding.backends.local import LocalBackend
    from decoding.engine.sequence import Sequence

_STREAM = 2  # of random numbers; the verifier uses others


@dataclass(eq=False)
class DraftModel(Drafter):
    """model: an alias, folder, .gguf file or hub id, or a transformers model.

    Runs on a runner of its own, with its own slots. Its vocabulary must be the target's: padded rows aside,
    both models must read and write the same ids.
    """

    model: str | PreTrainedModel

    name: ClassVar[str] = "draft-model"
    summary: ClassVar[str] = "a smaller model of the same tokenizer; draft-model(model=NAME)"

    _runner: Runner = field(init=False, repr=False)
    _slots: dict[int, int] = field(default_factory=dict, init=False, repr=False)
    _vocab: int = field(default=0, init=False, repr=False)

    def attach(self, backend: LocalBackend) -> None:
        """Load the model and give it as many slots as the target has.

        Raises ModelError if the two vocabularies differ.
        """
        target = backend.engine.runner
        if isinstance(self.model, str):
            from decoding.models import load_model

            loaded = load_model(self.model, device=str(target.device))
            model = loaded.model
            if loaded.tokenizer.get_vocab() != backend.tokenizer.get_vocab():
                raise ModelError(
                    f"the draft model {self.model} has another vocabulary than {backend.name}; use a draft model "
                    "with the same tokenizer."
                )
        else:
            model = self.model
        self._vocab = target.vocab
        self._runner = Runner(model, target.cache.slots, target.cache.capacity)
        if self._runner.vocab != self._vocab and self._runner.vocab < len(backend.tokenizer):
            raise ModelError(
                f"the draft model has a vocabulary of {self._runner.vocab} tokens and {backend.name} of "
                f"{self._vocab}; use a draft model with the same tokenizer."
            )

    def propose(self, sequences: List[Sequence], lengths: List[int]) -> list[Draft]:
        guesses: list[list[int]] = [[] for _ in sequences]
        chances: list[list[torch.Tensor]] = [[] for _ in sequences]
        for depth in range(max(lengths, default=0)):
            active = [i for i, length in enumerate(lengths) if length > depth and self._fits(sequences[i], depth)]
            if not active:
                break
            for i, token, chance in self._step(sequences, active, guesses, depth):
                guesses[i].append(token)
                if chance is not None:
                    chances[i].append(chance)
        return [
            Draft(Block(tokens), torch.stack(chance) if chance else None)
            for tokens, chance in zip(guesses, chances, strict=True)
        ]

    def _fits(self, sequence: Sequence, depth: int) -> bool:
        return len(sequence.tokens) + depth <= self._runner.cache.capacity

    def _step(
        self, sequences: List[Sequence], active: list[int], guesses: list[list[int]], depth: int
    ) -> list[tuple[int, int, torch.Tensor | None]]:
        """One more guess for every active sequence: (index, token, [vocab] distribution if sampled)."""
        rows = []
        cache = self._runner.cache
        for i in active:
            tokens = sequences[i].tokens + guesses[i]
            slot = self._slot(sequences[i])
            # What the cache holds of guesses that were refused, or of nothing at all, is rolled back.
            cache.truncate(slot, min(int(cache.shared_prefix(np.asarray(tokens))[slot]), len(tokens) - 1))
            rows.append(Row(slot, tokens[cache.lengths[slot] :], Block()))
        logits = self._runner.forward(rows)[:, : self._vocab]
        for row in rows:
            cache.commit(row.slot, row.pending)
        sampled = [k for k, i in enumerate(active) if sequences[i].params.temperature > 0]
        tokens = logits.argmax(dim=-1).tolist()
        chances: dict[int, torch.Tensor] = {}
        if sampled:
            members = [sequences[active[k]] for k in sampled]
            columns = SamplingColumns.of([s.params for s in members], logits.device)
            chance = probabilities(logits[sampled], columns)
            chance = torch.nn.functional.pad(chance, (0, self._vocab - chance.shape[1]))
            draws = torch.tensor([s.draws for s in members], device=logits.device)
            u = uniforms(columns.seed, draws, _STREAM, depth + 1)[:, depth]
            for k, token, row in zip(sampled, draw(chance, u).tolist(), chance, strict=True):
                tokens[k], chances[k] = token, row
        return [(i, tokens[k], chances.get(k)) for k, i in enumerate(active)]

    def _slot(self, sequence: Sequence) -> int:
        if sequence.id not in self._slots:
            if not self._runner.cache.free:
                raise InvalidRequest("the draft model has no free slot; load it with as many slots as the target.")
            self._slots[sequence.id], _ = self._runner.cache.acquire(sequence.tokens)
        return self._slots[sequence.id]

    def forget(self, sequence: Sequence) -> None:
        if sequence.id in self._slots:
            self._runner.cache.release(self._slots.pop(sequence.id))
