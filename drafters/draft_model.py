"""A smaller model with the same tokenizer guesses, one token after the other, for all sequences at once.

Leviathan et al. 2023; Chen et al. 2023.
"""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Sequence as List
from dataclasses import dataclass, field
from functools import cached_property
from itertools import accumulate
from typing import TYPE_CHECKING, ClassVar

import numpy as np
import torch

from decoding.drafting import Draft, Drafter
from decoding.engine.block import Block
from decoding.engine.latency import LatencyModel, latency_of
from decoding.engine.packing import Row
from decoding.engine.runner import Runner
from decoding.engine.sampling import SamplingColumns, draw_distinct, probabilities, uniforms
from decoding.errors import InvalidRequest, ModelError
from decoding.textform import is_count

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from decoding.backends.local import LocalBackend
    from decoding.engine.sequence import Sequence

_STREAM = 2  # of random numbers; the verifier uses others


class Follower:
    """A model with a cache of its own that keeps up with texts, computing only what is new in them."""

    def __init__(self, runner: Runner) -> None:
        self.runner = runner
        self._slots: dict[int, int] = {}

    @classmethod
    def beside(cls, backend: LocalBackend, model: PreTrainedModel) -> Follower:
        """A follower with as many slots as the backend has."""
        cache = backend.engine.runner.cache
        return cls(Runner(model, cache.slots, cache.capacity))

    @cached_property
    def _latency(self) -> LatencyModel:
        return latency_of(self.runner)

    def cost(self, levels: int, sequences: int, context: float) -> float:
        """Seconds of so many levels of guesses; measured at the first time of asking, if never before."""
        return levels * float(self._latency.cost(sequences, sequences, context))

    def logits(self, texts: dict[int, list[int]]) -> torch.Tensor:
        """[texts, vocab] behind the end of each text, given by the number of its sequence."""
        cache, rows = self.runner.cache, []
        for owner, tokens in texts.items():
            slot = self._slot(owner, tokens)
            # What the cache holds of guesses that were refused, or of nothing at all, is rolled back.
            cache.truncate(slot, min(int(cache.shared_prefix(np.asarray(tokens))[slot]), len(tokens) - 1))
            rows.append(Row(slot, tokens[cache.lengths[slot] :], Block()))
        logits = self.runner.forward(rows)
        for row in rows:
            cache.commit(row.slot, row.pending)
        return logits

    def fits(self, tokens: List[int]) -> bool:
        """Whether a text of this length can be followed."""
        return len(tokens) <= self.runner.cache.capacity

    def _slot(self, owner: int, tokens: List[int]) -> int:
        if owner not in self._slots:
            if not self.runner.cache.free:
                raise InvalidRequest("the draft model has no free slot; load it with as many slots as the target.")
            self._slots[owner], _ = self.runner.cache.acquire(tokens)
        return self._slots[owner]

    def forget(self, owner: int) -> None:
        """The text has ended."""
        if owner in self._slots:
            self.runner.cache.release(self._slots.pop(owner))


Ahead = Callable[[list[int], list[list[int]]], torch.Tensor]
"""Logits [active, target vocabulary] behind each active sequence's text and guesses: (indices, guesses of each)."""


def top_probability(logits: torch.Tensor, best: torch.Tensor) -> torch.Tensor:
    """[rows] that of the most likely token, from logits [rows, vocab] and the largest of each row."""
    return (best - logits.logsumexp(-1)).exp()


def guess_ahead(
    sequences: List[Sequence],
    lengths: List[int],
    ahead: Ahead,
    confident: Callable[[torch.Tensor, torch.Tensor], torch.Tensor] = top_probability,
    branches: int = 1,
) -> list[Draft]:
    """`lengths[i]` guesses in a row, one level of all sequences after the other: the most likely tokens of greedy
    requests, draws under the request's own temperature and filters of the others. A draft ends where the logits are not
    finite: what is not a number says nothing about what it was drawn from.

    confident: from logits [rows, vocab] and [rows] of each row, how likely [rows] these are to be the target's.
    branches: guesses for every place, drawn without replacement; the first of them is gone on from.
    """
    left = list(lengths)
    guesses: list[list[list[int]]] = [[] for _ in sequences]  # for each place
    chances: list[list[torch.Tensor]] = [[] for _ in sequences]
    confidence: list[list[list[float]]] = [[] for _ in sequences]
    for depth in range(max(lengths, default=0)):
        active = [i for i, length in enumerate(left) if length > depth]
        if not active:
            break
        logits = ahead(active, [[place[0] for place in guesses[i]] for i in active])
        best, tokens = logits.topk(branches)
        finite = best[:, 0].isfinite().tolist()
        likely = torch.stack([confident(logits, column) for column in best.unbind(1)], dim=1).tolist()
        chosen = tokens.tolist()
        sampled = [k for k, i in enumerate(active) if finite[k] and sequences[i].params.temperature > 0]
        if sampled:
            members = [sequences[active[k]] for k in sampled]
            columns = SamplingColumns.of([s.params for s in members], logits.device)
            chance = probabilities(logits[sampled], columns)
            draws = torch.tensor([s.draws for s in members], device=logits.device)
            u = uniforms(columns.seed, draws, _STREAM, branches * (depth + 1))[:, branches * depth :]
            for k, drawn, row in zip(sampled, draw_distinct(chance, u).tolist(), chance, strict=True):
                chosen[k] = [token for token in drawn if token >= 0]  # there may be no more than these
                chances[active[k]].append(row)
        for k, i in enumerate(active):
            if finite[k]:
                guesses[i].append(chosen[k])
                confidence[i].append(likely[k])
            else:
                left[i] = depth
    return [_draft(*each, branches > 1) for each in zip(guesses, chances, confidence, strict=True)]


def _draft(guesses: list[list[int]], chances: list[torch.Tensor], confidence: list[list[float]], tree: bool) -> Draft:
    """From the guesses for every place, what they were drawn from, if they were, and how likely they are."""
    tokens: list[int] = [token for place in guesses for token in place]
    firsts = [-1, *accumulate(map(len, guesses), initial=0)][: len(guesses)]  # that each place follows
    parents = [first for first, place in zip(firsts, guesses, strict=True) for _ in place]
    block = Block(tokens, parents if tree else None)
    if not chances:
        return Draft(block, confidence=[each for place in confidence for each in place])
    if not tree:
        return Draft(block, torch.stack(chances))
    behind = torch.zeros(1 + len(tokens), len(chances[0]), dtype=chances[0].dtype, device=chances[0].device)
    behind[[1 + first for first in firsts]] = torch.stack(chances)
    return Draft(block, behind)


@dataclass(eq=False)
class DraftModel(Drafter):
    """model: an alias, folder, .gguf file or hub id, or a transformers model. branches: guesses for every place, of
    which the first is gone on from; more than one cost no pass of the draft model, but a place each in the target's.

    Runs on a runner of its own, with its own slots. Its vocabulary must be the target's: padded rows aside,
    both models must read and write the same ids (`cross-vocabulary` takes others).
    """

    model: str | PreTrainedModel
    branches: int = 1

    name: ClassVar[str] = "draft-model"
    summary: ClassVar[str] = "a smaller model of the same tokenizer; draft-model(model=NAME, branches=2) drafts trees"

    _follower: Follower = field(init=False, repr=False)
    _backend: LocalBackend = field(init=False, repr=False)

    def __post_init__(self) -> None:
        if not is_count(self.branches):
            raise InvalidRequest(f"draft-model needs branches to be an integer of at least 1, not {self.branches!r}.")

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
                    "with the same tokenizer, or the drafter cross-vocabulary."
                )
        else:
            model = self.model
        self._backend = backend
        self._follower = Follower.beside(backend, model)
        vocab = self._follower.runner.vocab
        if vocab != target.vocab and vocab < len(backend.tokenizer):
            raise ModelError(
                f"the draft model has a vocabulary of {vocab} tokens and {backend.name} of {target.vocab}; use a "
                "draft model with the same tokenizer, or the drafter cross-vocabulary."
            )

    def propose(self, sequences: List[Sequence], lengths: List[int]) -> list[Draft]:
        def ahead(active: list[int], guesses: list[list[int]]) -> torch.Tensor:
            texts = {sequences[i].id: sequences[i].tokens + guess for i, guess in zip(active, guesses, strict=True)}
            vocab = self._backend.engine.runner.vocab
            logits = self._follower.logits(texts)[:, :vocab]
            return torch.nn.functional.pad(logits, (0, vocab - logits.shape[1]), value=-torch.inf)

        capacity = self._follower.runner.cache.capacity
        fitting = [min(n, capacity + 1 - len(s.tokens)) for s, n in zip(sequences, lengths, strict=True)]
        return guess_ahead(sequences, fitting, ahead, branches=self.branches)

    def cost(self, levels: int, sequences: int, context: float) -> float:
        return self._follower.cost(levels, sequences, context)

    def forget(self, sequence: Sequence) -> None:
        self._follower.forget(sequence.id)
