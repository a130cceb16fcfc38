"""What consistency training did to a model: how fast it decodes by Jacobi iteration, and how far it moved."""

from __future__ import annotations

import math
from collections.abc import Callable
from collections.abc import Sequence as List
from dataclasses import dataclass

import torch
from torch.nn import functional as F
from transformers import PreTrainedModel

from decoding.backends.local import LocalBackend
from decoding.strategies.jacobi import JacobiDecoder
from decoding.types import SamplingParams
from drafters.training.corpus import Document

Text = tuple[list[int], list[int]]
"""Tokens of a prompt and of the answer to it."""


@dataclass(frozen=True)
class Validation:
    """Greedy answers to held-out questions after `step` training steps.

    tokens_per_forward: by Jacobi iteration, over the passes after prefill. agreement: share of an answer's places that
    hold the base model's token; divergence: tokens until the first that does not (the answer's length if all do);
    means over the questions. perplexity: of the answers under the base model, None if it is no longer at hand.
    repetition: share of runs of four tokens that were in the answer before.
    """

    step: int
    questions: int
    tokens_per_forward: float
    agreement: float
    divergence: float
    perplexity: float | None
    repetition: float

    def __str__(self) -> str:
        perplexity = "" if self.perplexity is None else f", perplexity under the base model {self.perplexity:.2f}"
        return (
            f"step {self.step}: {self.tokens_per_forward:.3f} tokens per forward on {self.questions} questions; "
            f"agreement with the base model {self.agreement:.0%}, first difference after {self.divergence:.1f} tokens"
            f"{perplexity}, repetition {self.repetition:.1%}"
        )


def validate(
    lm: LocalBackend,
    documents: List[Document],
    *,
    step: int,
    block_size: int,
    max_new_tokens: int,
    perplexity: Callable[[List[Text]], float] | None = None,
) -> Validation:
    """Decode held-out questions; `documents` hold the base model's own answers. perplexity: the base model's."""
    decoder = JacobiDecoder(block_size, initial="iterate")
    params = SamplingParams(max_new_tokens=max_new_tokens)
    sequences = [lm.engine.submit(d.tokens[: d.prompt].tolist(), params, decoder, lm.eos) for d in documents]
    while lm.engine.busy:
        lm.engine.step()
    passes = [s for sequence in sequences for s in sequence.trace if not s.prefill]
    texts = [(sequence.prompt, sequence.new_tokens) for sequence in sequences]
    base = [d.tokens[d.prompt : d.prompt + max_new_tokens].tolist() for d in documents]
    return Validation(
        step=step,
        questions=len(documents),
        tokens_per_forward=sum(s.committed for s in passes) / max(1, len(passes)),
        agreement=_mean([_agreement(answer, theirs) for (_, answer), theirs in zip(texts, base, strict=True)]),
        divergence=_mean([_common(answer, theirs) for (_, answer), theirs in zip(texts, base, strict=True)]),
        perplexity=None if perplexity is None else perplexity(texts),
        repetition=_mean([repetition(answer) for _, answer in texts]),
    )


@torch.inference_mode()
def base_perplexity(model: PreTrainedModel, texts: List[Text]) -> float:
    """exp of the mean cross entropy, in nats, of all answers' tokens."""
    total, count = 0.0, 0
    for prompt, answer in texts:
        ids = torch.tensor([[*prompt, *answer]], device=model.device)
        logits = model(input_ids=ids, use_cache=False).logits[0, len(prompt) - 1 : -1].float()
        total += F.cross_entropy(logits, ids[0, len(prompt) :], reduction="sum").item()
        count += len(answer)
    return math.exp(total / max(1, count))


def repetition(tokens: List[int]) -> float:
    """Share of runs of four tokens that occurred before."""
    runs = list(zip(tokens, tokens[1:], tokens[2:], tokens[3:], strict=False))
    return 1 - len(set(runs)) / len(runs) if runs else 0.0


def _agreement(answer: List[int], base: List[int]) -> float:
    return sum(a == b for a, b in zip(answer, base, strict=False)) / max(1, len(answer), len(base))


def _common(answer: List[int], base: List[int]) -> int:
    pairs = zip(answer, base, strict=False)
    return next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(answer), len(base)))


def _mean(values: List[float]) -> float:
    return sum(values) / max(1, len(values))
