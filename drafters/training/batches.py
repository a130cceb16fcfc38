"""Documents as padded batches, in an order that a seed and an epoch determine."""

from __future__ import annotations

from collections.abc import Sequence as List
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from drafters.training.corpus import Corpus, Document

_WINDOW = 8  # batches are made of documents of like length out of so many batches' worth


@dataclass(frozen=True)
class Batch:
    """B documents. Training starts behind each answer's first token, which the target itself gives.

    tokens: [B, T + 1], padded with 0. features: [B, T, layers, target hidden]. starts: [B] the first position that
    is drafted from. counts: [B] how many are; R is the largest. final, greedy: [M, target hidden] and [M], for all
    of them in order: what the target's head receives one position later, and the token that it chooses.
    """

    tokens: Tensor
    features: Tensor
    starts: Tensor
    counts: Tensor
    final: Tensor
    greedy: Tensor

    def to(self, device: torch.device) -> Batch:
        """A copy on another device."""
        return Batch(**{f.name: getattr(self, f.name).to(device) for f in fields(self)})

    @property
    def valid(self) -> Tensor:
        """[B, R] which positions exist."""
        return torch.arange(int(self.counts.max()), device=self.counts.device) < self.counts[:, None]


def load_batch(corpus: Corpus, documents: List[Document]) -> Batch:
    """Read a batch's documents and the target's states over them."""
    longest = max(map(len, documents))
    states = [corpus.states(document) for document in documents]
    layers, width = states[0].features.shape[1:]
    tokens = torch.zeros(len(documents), longest, dtype=torch.long)
    features = torch.zeros(len(documents), longest - 1, layers, width)
    for i, (document, state) in enumerate(zip(documents, states, strict=True)):
        tokens[i, : len(document)] = document.tokens
        features[i, : len(document) - 1] = state.features[:-1]
    return Batch(
        tokens,
        features,
        starts=torch.tensor([document.prompt - 1 for document in documents]),
        counts=torch.tensor([document.supervised for document in documents]),
        final=torch.cat([s.final[d.prompt : -1] for d, s in zip(documents, states, strict=True)]).float(),
        greedy=torch.cat([s.greedy[d.prompt : -1] for d, s in zip(documents, states, strict=True)]),
    )


def epoch(documents: List[Document], size: int, seed: int, number: int) -> list[list[Document]]:
    """All documents once, in batches of `size` of like length, so that little is padded."""
    generator = torch.Generator().manual_seed(seed * 1_000_003 + number)
    order = torch.randperm(len(documents), generator=generator).tolist()
    batches = []
    for at in range(0, len(order), _WINDOW * size):
        window = sorted(order[at : at + _WINDOW * size], key=lambda i: (documents[i].supervised, i))
        parts = [window[k : k + size] for k in range(0, len(window), size)]
        batches += [parts[k] for k in torch.randperm(len(parts), generator=generator).tolist()]
    return [[documents[i] for i in members] for members in batches]
