"""Medusa: heads on the target's last hidden state guess the next few tokens at once, independently of each other.

Cai et al. 2024, "Medusa: Simple LLM Inference Acceleration Framework with Multiple Decoding Heads". Instead of a
fixed tree, the branches of highest joint probability are proposed.
"""

from __future__ import annotations

import heapq
import math
import time
from collections.abc import Sequence as List
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import nn
from transformers import PreTrainedModel

from decoding.drafting import Draft, Drafter
from decoding.engine.block import Block
from decoding.engine.runner import Runner
from decoding.engine.sampling import SamplingColumns, draw, probabilities, uniforms
from decoding.errors import InvalidRequest, ModelError
from decoding.textform import is_count
from drafters.heads.fitting import Sizes, require_fit, shipped_head
from drafters.heads.medusa import MedusaHeads, read_medusa

if TYPE_CHECKING:
    from decoding.backends.local import LocalBackend
    from decoding.engine.sequence import Sequence

_STREAM = 2  # of random numbers; the verifier uses others
_TRIALS = 5  # of a pass whose time is measured
_RANKS = 10  # of a head's tokens that a tree may hold
_FINAL_NORMS = ("norm", "ln_f", "final_layernorm", "final_layer_norm")


@dataclass(eq=False)
class Medusa(Drafter):
    """head: the folder of trained heads; None for those that come with the project for the model. nodes: guesses per
    step and sequence in a tree; 0 for a chain. Neither gets deeper than there are heads whose logits are finite."""

    head: str | None = None
    nodes: int = 0

    name: ClassVar[str] = "medusa"
    summary: ClassVar[str] = "trained heads that guess several tokens at once; trees with medusa(nodes=16)"

    _heads: MedusaHeads = field(init=False, repr=False)
    _runner: Runner = field(init=False, repr=False)
    _norm: nn.Module = field(init=False, repr=False)
    _last: int = field(default=0, init=False, repr=False)  # decoder layer
    _seconds: dict[int, float] = field(default_factory=dict, init=False, repr=False)

    def __post_init__(self) -> None:
        if not is_count(self.nodes, 0):
            raise InvalidRequest(f"medusa needs nodes to be an integer of at least 0, not {self.nodes!r}.")

    def attach(self, backend: LocalBackend) -> None:
        """Load the heads. Raises ModelError if there are none, they are damaged, or made for another model."""
        self._runner = backend.engine.runner
        folder = self.head or shipped_head(self.name, backend)
        heads = read_medusa(folder)
        config = heads.config
        sizes = Sizes(config.target_hidden_size, config.vocab_size, config.target_num_hidden_layers)
        require_fit(folder, sizes, backend)
        self._norm = _final_norm(backend.model)
        self._heads = heads.to(self._runner.device, backend.model.dtype)
        self._last = config.target_num_hidden_layers - 1
        self._runner.keep_features((self._last,))

    def propose(self, sequences: List[Sequence], lengths: List[int]) -> list[Draft]:
        drafts = [Draft() for _ in sequences]
        asked = [i for i, length in enumerate(lengths) if length > 0]
        if not asked:
            return drafts
        logits = self._logits([sequences[i] for i in asked])  # [asked, heads, draft vocab]
        finite = logits.amax(-1).isfinite().cumprod(-1).sum(-1).tolist()  # heads before the first that is not
        for i, row, heads in zip(asked, logits, finite, strict=True):
            depth = min(lengths[i], heads)
            if depth:
                drafts[i] = self._tree(row[:depth]) if self.nodes else self._chain(sequences[i], row[:depth])
        return drafts

    @torch.inference_mode()
    def _logits(self, sequences: List[Sequence]) -> torch.Tensor:
        features = self._runner.features
        assert features is not None
        column = self._runner.capture.index(self._last)
        # The last committed token has not been run yet; what chose it has.
        hidden = features[[s.slot for s in sequences], [len(s.tokens) - 2 for s in sequences], column]
        logits: torch.Tensor = self._heads(self._norm(hidden))
        return logits

    @torch.inference_mode()
    def cost(self, levels: int, sequences: int, context: float) -> float:
        """However many levels: the heads guess all at once. Measured once for every power of two of sequences."""
        if levels > self._heads.config.heads:
            return math.inf
        size = max(sequences - 1, 0).bit_length()
        if size not in self._seconds:
            width = self._heads.config.target_hidden_size
            hidden = torch.ones(1 << size, width, dtype=self._heads.output.weight.dtype, device=self._runner.device)
            times = []
            for _ in range(_TRIALS):
                began = time.perf_counter()
                self._heads(self._norm(hidden)).float().softmax(-1).max(-1).values.tolist()
                times.append(time.perf_counter() - began)
            self._seconds[size] = min(times)
        return self._seconds[size]

    def _chain(self, sequence: Sequence, logits: torch.Tensor) -> Draft:
        """A guess per head: the likeliest, or one drawn from its distribution."""
        choice, chances = logits.argmax(-1), None
        if sequence.params.temperature > 0:
            columns = SamplingColumns.of([sequence.params] * len(logits), logits.device)
            chance = probabilities(logits, columns)
            draws = torch.tensor([sequence.draws], device=logits.device)
            choice = draw(chance, uniforms(columns.seed[:1], draws, _STREAM, len(logits))[0])
            chances = chance.new_zeros(len(logits), self._heads.config.vocab_size)
            chances[:, self._heads.tokens] = chance
        sure = logits.float().softmax(-1).gather(1, choice[:, None])[:, 0]
        return Draft(Block(self._heads.tokens[choice].tolist()), chances, sure.tolist())

    def _tree(self, logits: torch.Tensor) -> Draft:
        """The likeliest branches, if the heads were independent."""
        best = logits.float().softmax(-1).topk(min(_RANKS, logits.shape[-1]), dim=-1)
        tokens, chance = self._heads.tokens[best.indices].tolist(), best.values.tolist()  # [heads][ranks]
        chosen: list[tuple[int, int, int]] = []  # parent, level, rank
        # (-joint probability, tie breaker, parent, its joint probability, level, rank)
        heap = [(-chance[0][0], 0, -1, 1.0, 0, 0)]
        pushed = 1
        while heap and len(chosen) < self.nodes:
            joint, _, parent, above, level, rank = heapq.heappop(heap)
            node = len(chosen)
            chosen.append((parent, level, rank))
            if level + 1 < len(tokens):
                heapq.heappush(heap, (joint * chance[level + 1][0], pushed, node, -joint, level + 1, 0))
            if rank + 1 < len(tokens[level]):
                sibling = -above * chance[level][rank + 1]
                heapq.heappush(heap, (sibling, pushed + 1, parent, above, level, rank + 1))
            pushed += 2
        return Draft(
            Block([tokens[level][rank] for _, level, rank in chosen], [parent for parent, _, _ in chosen]),
            None,
            [chance[level][rank] for _, level, rank in chosen],
        )


def _final_norm(model: PreTrainedModel) -> nn.Module:
    """What stands between the last decoder layer and the language-model head."""
    decoder = model.get_decoder()
    for name in _FINAL_NORMS:
        norm = getattr(decoder, name, None)
        if isinstance(norm, nn.Module):
            return norm
    raise ModelError(f"medusa cannot run on a {model.config.model_type} model: its final norm has no known name.")
