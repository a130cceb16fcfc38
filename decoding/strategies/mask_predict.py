"""Mask-Predict: answers of several lengths at once, each filled in and doubted again in a few passes.

Ghazvininejad et al. 2019, "Mask-Predict: Parallel Decoding of Conditional Masked Language Models". Needs a
bidirectional masked checkpoint, see `decoding.masked`. Each length is a sequence of its own, so all of them are refined
in the same passes.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence as List
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar

import torch

from decoding.assembly import assembled_metrics
from decoding.backends.base import Backend, OnText
from decoding.backends.text import TextStream
from decoding.engine.block import Block, Commit
from decoding.engine.decoder import Decoder
from decoding.errors import CapabilityError, ContextOverflow, InvalidRequest
from decoding.strategies.base import Strategy, TokenStrategy
from decoding.strategies.block_diffusion import BlockDiffusion
from decoding.strategies.policies import Iterations
from decoding.textform import is_count
from decoding.trace import shifted
from decoding.types import Generation, Prompt, SamplingParams

if TYPE_CHECKING:
    from decoding.backends.local import LocalBackend
    from decoding.engine.output import Output
    from decoding.engine.sequence import Sequence


@dataclass(frozen=True)
class MaskPredict(Strategy):
    """lengths: so many different lengths are tried, and the one with the likeliest tokens, on average, is the answer.

    iterations: passes over each, at most. length: tokens of the answer, for checkpoints that cannot predict it, or
    instead of what they predict, no longer than they can announce; the lengths tried lie around it.
    """

    lengths: int = 3
    iterations: int = 4
    length: int | None = None

    name: ClassVar[str] = "mask-predict"
    summary: ClassVar[str] = "fill in several lengths at once, redo the unlikely tokens; masked checkpoints only"
    needs: ClassVar[frozenset[str]] = frozenset({"text", "masked"})

    def __post_init__(self) -> None:
        for option in ("lengths", "iterations", "length"):
            value = getattr(self, option)
            if value is None and option == "length":
                continue
            if not is_count(value):
                raise InvalidRequest(f"{option} must be an integer of at least 1, not {value!r}.")

    @property
    def lossless(self) -> bool:
        return False

    async def answer(
        self, prompt: Prompt, params: SamplingParams, backend: Backend, on_text: OnText | None = None
    ) -> Generation:
        from decoding.backends.local import LocalBackend

        assert isinstance(backend, LocalBackend) and backend.masking is not None
        if backend.masking.span:
            raise CapabilityError(
                "mask-predict needs a checkpoint with bidirectional attention, and this one's is block-causal; use "
                "block-diffusion."
            )
        began = time.perf_counter()
        tokens = backend.encode(prompt)
        parts: dict[str, Generation] = {}
        lengths = await self._lengths(tokens, params, backend, parts)
        announced = backend.masking.lengths
        inner = params.but(ignore_eos=True, min_new_tokens=0, logprobs=True, stop=())

        async def fill(length: int) -> Generation:
            offset = time.perf_counter() - began
            given = [*tokens, announced[length - 1]] if announced else tokens
            whole = BlockDiffusion(Iterations(self.iterations), block_size=length)
            generation = await backend.complete(given, inner.but(max_new_tokens=length), whole)
            trace = shifted(generation.trace, offset)
            parts[f"length {length}"] = replace(generation, trace=trace)
            return generation

        candidates = await asyncio.gather(*(fill(length) for length in lengths))
        best = max([*candidates] or [*parts.values()], key=_mean_logprob)  # without lengths, their pass failed
        stream = TextStream(backend.tokenizer, params.stop)
        if (kept := stream.feed(best.tokens)) is not None:
            logprobs = best.logprobs and best.logprobs[:kept]
            best = replace(best, text=stream.text, tokens=best.tokens[:kept], logprobs=logprobs, finish_reason="stop")
        if on_text is not None and best.text:
            on_text(best.text)
        trace = sorted((step for part in parts.values() for step in part.trace), key=lambda s: (s.step, s.sequence))
        metrics = assembled_metrics(list(parts.values()), trace, seconds=time.perf_counter() - began)
        gained = len(best.tokens)  # lengths, and answers that were not taken, are not tokens of the answer
        share = gained / metrics.forwards if metrics.forwards else 0.0
        return Generation(
            text=best.text,
            tokens=best.tokens,
            finish_reason=best.finish_reason,
            metrics=replace(
                metrics,
                first_token_seconds=metrics.seconds if gained else 0.0,  # nothing is text before the choice
                prompt_tokens=len(tokens),
                new_tokens=gained,
                tokens_per_forward=share,
                acceptance_length=share,
            ),
            trace=trace,
            logprobs=best.logprobs if params.logprobs else None,
            error=best.error,
            parts=parts,
        )

    async def _lengths(
        self, tokens: list[int], params: SamplingParams, backend: LocalBackend, parts: dict[str, Generation]
    ) -> list[int]:
        """The lengths to try, the likeliest first.

        Raises InvalidRequest for a length that the checkpoint cannot announce, and ContextOverflow for a prompt that
        leaves no room for any.
        """
        assert backend.masking is not None
        announced = backend.masking.lengths
        if self.length is not None and announced and self.length > len(announced):
            raise InvalidRequest(
                f"length {self.length} is more than the {len(announced)} tokens that this checkpoint can announce; "
                "choose a smaller one."
            )
        capacity = backend.engine.cache.capacity
        most = min(params.max_new_tokens, capacity - len(tokens) - 1)
        if most < 1:
            raise ContextOverflow(
                f"the prompt has {len(tokens)} tokens and a sequence may hold {capacity}, which leaves no room for an "
                "answer; shorten it or load the model with a larger capacity."
            )
        if announced:
            most = min(most, len(announced))
        if self.length is not None:
            around = sorted(range(1, most + 1), key=lambda n: (abs(n - min(self.length or n, most)), n))
            return around[: self.lengths]
        if not announced:
            raise CapabilityError(
                "this checkpoint has no tokens that announce an answer's length; give mask-predict a length."
            )
        count = min(self.lengths, most)
        ranked = SamplingParams(max_new_tokens=count, ignore_eos=True)
        parts["length"] = generation = await backend.complete(tokens, ranked, _Lengths(most))
        return [announced.index(token) + 1 for token in generation.tokens]


def _mean_logprob(generation: Generation) -> float:
    found = generation.logprobs or [-float("inf")]
    return sum(found) / len(found) if generation.error is None else -float("inf")


@dataclass(frozen=True)
class _Lengths(TokenStrategy):
    """One pass over the prompt and a mask behind it; the answer is the most likely length tokens, best first.

    most: the longest length to consider.
    """

    most: int

    needs: ClassVar[frozenset[str]] = frozenset({"masked"})

    @property
    def lossless(self) -> bool:
        return False

    def decoder(self, backend: LocalBackend) -> Decoder:
        assert backend.masking is not None
        return _LengthDecoder(backend.masking.mask, backend.masking.lengths[: self.most], backend.masking.shift)


class _LengthDecoder(Decoder):
    span = 0

    def __init__(self, mask: int, lengths: tuple[int, ...], shift: bool) -> None:
        self.mask, self.lengths, self.shift = mask, lengths, shift

    @property
    def name(self) -> str:
        return "mask-predict"

    def plan(self, sequences: List[Sequence]) -> list[Block]:
        return [Block((self.mask,), bidirectional=True) for _ in sequences]

    def commit(self, sequences: List[Sequence], output: Output) -> list[Commit]:
        rows = torch.from_numpy(output.offsets + (0 if self.shift else 1)).to(output.raw.device)
        lengths = torch.tensor(self.lengths, device=output.raw.device)
        scores = output.raw[rows][:, lengths].float().log_softmax(-1)
        count = max(sequence.limit - len(sequence.tokens) for sequence in sequences)
        best = scores.topk(min(count, len(self.lengths)), dim=-1)
        return [
            Commit(tokens, written=1, logprobs=logprobs)
            for tokens, logprobs in zip(lengths[best.indices].tolist(), best.values.tolist(), strict=True)
        ]
