"""Block diffusion: fill blocks of masks in, some places in every pass, block after block.

Arriola et al. 2025, "Block Diffusion"; LLaDA's semi-autoregressive decoding (Nie et al. 2025); caches as in Fast-dLLM
(Wu et al. 2025). Needs a masked checkpoint, see `decoding.masked`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence as List
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar

import numpy as np
import torch

from decoding.engine.block import Block, Commit, settled
from decoding.engine.decoder import Decoder
from decoding.engine.output import Output, ends_too_early
from decoding.engine.sampling import SamplingColumns, adjust, draw, probabilities, uniforms
from decoding.errors import InvalidRequest
from decoding.masked import Masking
from decoding.strategies.base import TokenStrategy
from decoding.strategies.policies import BlockView, Change, Confidence, Policy, resolve
from decoding.textform import is_count

if TYPE_CHECKING:
    from decoding.backends.local import LocalBackend
    from decoding.engine.sequence import Sequence

CACHES = ("exact", "prefix", "dual")
_BIDIRECTIONAL_BLOCK = 32  # places of a block where the checkpoint does not say
_STREAM = 5  # of random numbers; verifiers and drafters use others
_EMPTY = np.empty(0)


@dataclass(frozen=True)
class BlockDiffusion(TokenStrategy):
    """Another answer than a causal model's; the same for a request alone and in any batch.

    policy: what to write, and what to revise, after each pass: see `decoding.strategies.policies`.
    block_size: places refined together. None is the checkpoint's own for block-causal ones, which it has to divide, and
        32 for bidirectional ones.
    cache: "exact" keeps what no later token changes: all blocks before the open one if attention is block-causal,
        nothing if it is bidirectional. "prefix" keeps, while a block is refined, everything before it as the block's
        first pass computed it, and "dual" the masks behind it as well: approximations wherever "exact" keeps less.
    canvas: bidirectional checkpoints: how many places stand open at least, the block and masks behind it; an answer
        grows by blocks until it ends. None opens all of `max_new_tokens` at once.
    early_stop: end as soon as an end-of-sequence token stands with everything before it, instead of with its block.
    eos_last: an end-of-sequence token is written only where everything before it is: models that were padded with it
        in training are sure of it too early.
    """

    policy: Policy | str = Confidence()
    block_size: int | None = None
    cache: str = "exact"
    canvas: int | None = None
    early_stop: bool = True
    eos_last: bool = False

    name: ClassVar[str] = "block-diffusion"
    summary: ClassVar[str] = "fill blocks of masks in, several tokens per pass; masked checkpoints only"
    needs: ClassVar[frozenset[str]] = frozenset({"text", "masked"})

    def __post_init__(self) -> None:
        object.__setattr__(self, "policy", resolve(self.policy))
        for option in ("block_size", "canvas"):
            value = getattr(self, option)
            if value is not None and not is_count(value):
                raise InvalidRequest(f"{option} must be an integer of at least 1, or None, not {value!r}.")
        if self.cache not in CACHES:
            raise InvalidRequest(f"cache must be one of {', '.join(CACHES)}, not {self.cache!r}.")
        for option in ("early_stop", "eos_last"):
            if not isinstance(getattr(self, option), bool):
                raise InvalidRequest(f"{option} must be true or false, not {getattr(self, option)!r}.")

    @property
    def lossless(self) -> bool:
        return False

    def decoder(self, backend: LocalBackend) -> Decoder:
        assert backend.masking is not None
        return BlockDiffusionDecoder(self, backend.masking, backend.engine.cache.capacity)


@dataclass
class _Open:
    """The block that a sequence is refining.

    start: committed tokens before it. canvas: [places] its tokens and the masks behind it. size: places of the block;
    needed: those that the answer has room for. trust: [size] confidence that each visible token was written with.
    probabilities: [size, vocab] of the last pass, and divergences of all, where the policy compares passes. See
    `BlockView` for the rest.
    """

    start: int
    canvas: np.ndarray
    size: int
    needed: int
    trust: np.ndarray
    passes: int = 0
    full: int = 0
    last: np.ndarray | None = None
    probabilities: torch.Tensor | None = None
    divergences: list[np.ndarray] = field(default_factory=list)


class BlockDiffusionDecoder(Decoder):
    """Keeps one open block per sequence.

    Raises InvalidRequest for a block size that does not fit the checkpoint or the capacity.
    """

    def __init__(self, options: BlockDiffusion, masking: Masking, capacity: int) -> None:
        self.options, self.masking, self.capacity = options, masking, capacity
        self.span = masking.span
        self.block_size = options.block_size or masking.span or _BIDIRECTIONAL_BLOCK
        if masking.span and masking.span % self.block_size:
            raise InvalidRequest(
                f"block_size {self.block_size} does not divide the checkpoint's blocks of {masking.span}."
            )
        if self.block_size > capacity:
            raise InvalidRequest(
                f"a block of {self.block_size} tokens does not fit a sequence of {capacity}; choose a smaller "
                "block_size or load the model with a larger capacity."
            )
        if masking.encoder and options.cache != "exact":
            raise InvalidRequest(
                f"an encoder-decoder keeps nothing of its answer, so cache={options.cache} is not for it."
            )
        if options.canvas is not None and masking.span:
            raise InvalidRequest("canvas is for bidirectional checkpoints; this one opens one block after the other.")
        assert isinstance(options.policy, Policy)
        self.policy = options.policy
        self._open: dict[int, _Open] = {}

    @property
    def name(self) -> str:
        return "block-diffusion"

    def plan(self, sequences: List[Sequence]) -> list[Block]:
        blocks = []
        for sequence in sequences:
            if sequence.params.repetition_penalty != 1:
                raise InvalidRequest(
                    "masked refinement takes no repetition_penalty: a block has no order in which its tokens come."
                )
            block = self._open.get(sequence.id)
            if block is None or block.start != len(sequence.tokens):
                block = self._open[sequence.id] = self._opened(sequence)
            # After its first pass, a dual cache holds the places behind the block.
            shown = block.size if self.options.cache == "dual" and block.passes else len(block.canvas)
            blocks.append(Block(block.canvas[:shown].tolist(), bidirectional=True, suffix=len(block.canvas) - shown))
        return blocks

    def _opened(self, sequence: Sequence) -> _Open:
        """A new block of masks behind a sequence's tokens."""
        start, size = len(sequence.tokens), self.block_size
        if self.span:  # blocks are counted from position 0, and are whole even if the answer has no room for all of it
            stop = min((start // size + 1) * size, self.capacity)
            end = min((start // self.span + 1) * self.span, self.capacity)
        else:
            begun = len(sequence.prompt)
            stop = min(begun + ((start - begun) // size + 1) * size, sequence.limit)
            end = sequence.limit
            if self.options.canvas is not None:
                end = min(max(start + self.options.canvas, stop), end)
            if self.masking.encoder and stop < sequence.limit:
                raise InvalidRequest(
                    "an encoder-decoder fills its answer in as one block: choose a block_size of at least "
                    "max_new_tokens, or use mask-predict."
                )
        return _Open(
            start,
            np.full(end - start, self.masking.mask, dtype=np.int64),
            stop - start,
            min(stop, sequence.limit) - start,
            np.zeros(stop - start),
        )

    def commit(self, sequences: List[Sequence], output: Output) -> list[Commit]:
        blocks = [self._open[sequence.id] for sequence in sequences]
        views = self._views(sequences, blocks, output)
        return [self._apply(*each) for each in zip(sequences, blocks, views, strict=True)]

    def _views(self, sequences: List[Sequence], blocks: List[_Open], output: Output) -> list[BlockView]:
        """What the pass said about every sequence's block, with one copy to the host."""
        device = output.raw.device
        sizes = np.array([block.size for block in blocks])
        firsts = output.offsets + (0 if self.masking.shift else 1)
        place = np.concatenate([np.arange(size) for size in sizes])
        owner = torch.from_numpy(np.repeat(np.arange(len(blocks)), sizes)).to(device)
        rows = torch.from_numpy(np.repeat(firsts, sizes) + place).to(device)
        params = SamplingColumns.of([sequence.params for sequence in sequences], device)
        columns = params.rows(owner)
        before = np.array([len(s.tokens) - len(s.prompt) for s in sequences])
        logits = adjust(
            output.raw[rows].double(),  # [places of all blocks, vocab]
            columns,
            banned=torch.from_numpy(ends_too_early(sequences, sizes, np.repeat(before, sizes) + place)).to(device),
        )
        logits[:, self.masking.mask] = -torch.inf
        model = logits.softmax(-1)
        if columns.all_greedy:
            predicted = logits.argmax(-1)
        else:
            draws = torch.tensor([sequence.draws for sequence in sequences], device=device)
            u = uniforms(params.seed, draws, _STREAM, int(sizes.max()))
            predicted = draw(probabilities(logits, columns), u[owner, torch.from_numpy(place).to(device)])
        measured = [predicted.double(), model.gather(1, predicted[:, None])[:, 0]]
        measured += [getattr(self, f"_{name}")(model, blocks, sizes) for name in sorted(self.policy.needs)]
        parts = torch.stack(measured).cpu().numpy()
        views = []
        for sequence, block, stop in zip(sequences, blocks, np.cumsum(sizes), strict=True):
            mine = parts[:, stop - block.size : stop]
            extra = dict(zip(sorted(self.policy.needs), mine[2:], strict=True))
            if "divergence" in extra:
                block.divergences.append(extra["divergence"])
            tokens = block.canvas[: block.size].copy()
            masked = tokens == self.masking.mask
            chosen = mine[0].astype(np.int64)
            views.append(
                BlockView(
                    tokens,
                    masked,
                    masked & ~self._too_early(sequence, masked, chosen),
                    chosen,
                    mine[1],
                    block.trust,
                    extra.get("margin", _EMPTY),
                    extra.get("entropy", _EMPTY),
                    np.array(block.divergences),
                    block.passes,
                    block.full,
                    block.last,
                )
            )
        return views

    def _too_early(self, sequence: Sequence, masked: np.ndarray, predicted: np.ndarray) -> np.ndarray:
        """[places] where the end is predicted behind a mask, if it has to come last."""
        if not self.options.eos_last:
            return np.zeros_like(masked)
        behind = np.concatenate([[False], np.logical_or.accumulate(masked)[:-1]])
        return behind & np.isin(predicted, list(sequence.eos))

    def _margin(self, model: torch.Tensor, blocks: List[_Open], sizes: np.ndarray) -> torch.Tensor:
        best = model.topk(2, dim=-1).values
        return best[:, 0] - best[:, 1]

    def _entropy(self, model: torch.Tensor, blocks: List[_Open], sizes: np.ndarray) -> torch.Tensor:
        return -torch.special.xlogy(model, model).sum(-1)

    def _divergence(self, model: torch.Tensor, blocks: List[_Open], sizes: np.ndarray) -> torch.Tensor:
        """KL(this pass || last pass) of every place, and keep this pass's distributions for the next."""
        out = []
        for block, now in zip(blocks, model.split(sizes.tolist()), strict=True):
            if block.probabilities is None:
                out.append(torch.full_like(now[:, 0], torch.inf))
            else:
                floor = torch.finfo(now.dtype).tiny
                ratio = now.clamp(min=floor).log() - block.probabilities.clamp(min=floor).log()
                out.append((now * ratio).sum(-1).clamp(min=0))
            block.probabilities = now
        return torch.cat(out)

    def _apply(self, sequence: Sequence, block: _Open, view: BlockView) -> Commit:
        change = self.policy.change(view)
        tokens = np.where(change.write, view.predicted, view.tokens)
        block.trust = np.where(change.write, view.confidence, view.trust)
        block.last = tokens.copy()
        tokens[change.clear] = self.masking.mask
        block.canvas[: block.size] = tokens
        block.passes += 1
        block.full += not view.masked.any()
        length = self._finished(sequence, block, tokens, change)
        # Between passes an approximate cache keeps all before the block; the next block starts from what is exact.
        approximate = self.options.cache != "exact"
        reuse = settled(block.start, self.span) if length else block.start - 1
        return Commit(
            tokens[:length].tolist(),
            written=int((view.masked & change.write & ~change.clear).sum()),
            revised=int((~view.masked & (tokens != view.tokens)).sum()),
            reuse=reuse if approximate else None,
            logprobs=[math.log(trust) if trust > 0 else -math.inf for trust in block.trust[:length].tolist()],
        )

    def _finished(self, sequence: Sequence, block: _Open, tokens: np.ndarray, change: Change) -> int:
        """How many tokens of the block can be committed: none before all of them can, or an end stands."""
        if not change.done:
            return 0
        masks = (tokens == self.masking.mask).nonzero()[0]
        known = int(masks[0]) if len(masks) else len(tokens)
        if known >= block.needed:
            return block.needed
        ends = np.isin(tokens[:known], list(sequence.eos)).nonzero()[0]
        return int(ends[0]) + 1 if self.options.early_stop and len(ends) else 0

    def forget(self, sequence: Sequence) -> None:
        self._open.pop(sequence.id, None)
