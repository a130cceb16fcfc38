"""What consistency training did to a model: how fast it decodes by Jacobi iteration, and how far it moved.

    python -m experiments.jacobi_validation --adapter runs/jacobi/adapter [--questions FILE] [--limit 64]

Answers questions greedily with the model as it is, and again, by Jacobi iteration of whole blocks, with it and with the
adapter. Prints tokens per forward of both, and how far the adapter's answers are from the model's own; writes all of it
to `experiments/results/jacobi_validation.json`. Questions must be none that the adapter was trained on.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Callable
from collections.abc import Sequence as List
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import torch
from torch.nn import functional as F
from transformers import PreTrainedModel

import decoding
from decoding.backends.local import LocalBackend
from decoding.cli import exit_code
from decoding.questions import load_questions
from decoding.strategies.adapter import CARD, adapted, load_adapter
from decoding.strategies.jacobi import JacobiDecoder
from decoding.types import SamplingParams
from drafters.training.corpus import Document
from experiments.claims import RESULTS, Finding, conclude

ENOUGH = 1.8  # tokens per forward that the training is to reach; untrained models make 1.1 to 1.2

Text = tuple[list[int], list[int]]
"""Tokens of a prompt and of the answer to it."""


@dataclass(frozen=True)
class Validation:
    """Greedy answers to held-out questions after `step` training steps.

    tokens_per_forward: by Jacobi iteration of whole blocks with one candidate, over the passes after prefill.
    agreement: share of an answer's places that hold the base model's token; divergence: tokens until the first that
    does not (the answer's length if all do); means over the questions. perplexity: of the answers under the base
    model, None if it is no longer at hand. repetition: share of runs of four tokens that were in the answer before.
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
    decoder = JacobiDecoder(block_size, candidates=1)
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


def both(
    lm: LocalBackend, adapter: str, prompts: List[List[int]], max_new_tokens: int
) -> tuple[Validation, Validation]:
    """The model's validation and the adapted one's, in blocks of the size that the adapter was trained for."""
    file = load_adapter(adapter).folder / CARD
    card = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    block_size = int(card.get("training", {}).get("block_size", 16))
    params = SamplingParams(max_new_tokens=max_new_tokens)
    answers = decoding.generate([list(prompt) for prompt in prompts], lm, params=params)
    documents = [
        Document(torch.tensor([*prompt, *answer.tokens]), len(prompt), 0, 0)
        for prompt, answer in zip(prompts, answers, strict=True)
        if answer.error is None
    ]
    found = []
    for backend, step in ((lm, 0), (adapted(lm, adapter), int(card.get("validation", {}).get("step", 0)))):
        backend.forget()
        found.append(
            validate(
                backend,
                documents,
                step=step,
                block_size=block_size,
                max_new_tokens=max_new_tokens,
                perplexity=partial(base_perplexity, lm.model),
            )
        )
    return found[0], found[1]


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--adapter", required=True, help="one that comes with the package, or a folder")
    parser.add_argument("--model", default="smollm2-135m", help="(%(default)s)")
    parser.add_argument("--questions", default="default", help="a question file or a shipped suite (%(default)s)")
    parser.add_argument("--limit", type=int, default=64, help="(%(default)s)")
    parser.add_argument("--max-new-tokens", type=int, default=96, help="(%(default)s)")
    parser.add_argument("--results", type=Path, default=RESULTS, help="where the result goes")
    options = parser.parse_args()
    lm = decoding.load(options.model, slots=8, capacity=1024)
    questions = load_questions(options.questions, limit=options.limit)
    longest = lm.engine.cache.capacity - options.max_new_tokens
    base, trained = both(
        lm, options.adapter, [lm.encode(q.turns[0])[-longest:] for q in questions], options.max_new_tokens
    )
    finding = Finding(
        claim=f"consistency training takes Jacobi decoding to {ENOUGH} tokens per forward and more",
        source="Kou et al. 2024 report 2.4 to 3.4 times the speed, for 7B models and single tasks",
        measured=f"without the adapter: {base}; with it: {trained}",
        verdict="holds" if trained.tokens_per_forward >= ENOUGH else "does not hold",
        figures={"base": asdict(base), "adapted": asdict(trained)},
    )
    conclude("jacobi_validation", finding, options, lm, package="experiments")


if __name__ == "__main__":
    raise SystemExit(exit_code(main))
