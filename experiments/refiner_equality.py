"""Every exact refiner against plain decoding, token by token, on a real model in float32.

    python -m experiments.refiner_equality [--questions FILE] [--limit 64] [--max-new-tokens 96]

Each refiner answers every question alone and in ragged batches of eight. A token that differs from plain decoding's is
excused only where the two tokens' logits, recomputed in float64 for that very prefix, lie within 1e-4 of each other.
Prints one line per refiner, with tokens per forward; exits with 1 if a token differs.
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from rich.progress import track
from transformers import PreTrainedModel

import decoding
from decoding.questions import load_questions

REFINERS = (
    "jacobi",
    "jacobi(block_size=8)",
    "jacobi(block_size=8, recycle=false)",
    "jacobi(block_size=8, initial=iterate, recycle=false)",
    "jacobi(block_size=8, candidates=3)",
    "jacobi(block_size=16, schedule=gauss-seidel)",
    "jacobi(block_size=16, schedule=hybrid)",
    "jacobi(block_size=8, schedule=gauss-seidel, blocks=3, candidates=2)",
    "lookahead",
    "lookahead(adaptive=false)",
    "lookahead(window=7, ngram=5, guesses=7, adaptive=false)",
)
BATCH = 8
TIE = 1e-4


@dataclass
class Tally:
    """differing: answers' first wrong tokens. ties: excused ones. tokens, forwards: of all answers, after prefill."""

    differing: int = 0
    ties: int = 0
    tokens: int = 0
    forwards: int = 0

    def add(self, lm: decoding.LocalBackend, prompt: list[int], plain: list[int], answer: decoding.Generation) -> None:
        """Compare an answer with plain decoding's, up to the first difference: what follows has another prefix."""
        if answer.error is not None:
            raise SystemExit(f"a refiner failed: {answer.error}")
        place = next((i for i, (a, b) in enumerate(zip(plain, answer.tokens, strict=False)) if a != b), None)
        if place is not None:
            tie = is_tie(lm.model, [*prompt, *plain[:place]], plain[place], answer.tokens[place])
            self.ties += tie
            self.differing += not tie
        elif len(plain) != len(answer.tokens):
            self.differing += 1
        self.tokens += sum(step.committed for step in answer.trace if not step.prefill)
        self.forwards += answer.metrics.forwards

    def __str__(self) -> str:
        rate = self.tokens / max(1, self.forwards)
        return f"{self.differing} differing, {self.ties} ties in {self.tokens} tokens, {rate:.2f} tokens per forward"


_precise: dict[int, PreTrainedModel] = {}


@torch.inference_mode()
def is_tie(model: PreTrainedModel, prefix: Sequence[int], one: int, other: int) -> bool:
    """Whether two tokens are the model's best, and equally good, by a plain forward pass in float64."""
    if id(model) not in _precise:
        _precise[id(model)] = copy.deepcopy(model).double()
    logits = _precise[id(model)](torch.tensor([list(prefix)], device=model.device)).logits[0, -1]
    return bool(logits.max() - torch.minimum(logits[one], logits[other]) < TIE)


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--questions", default="default", help="a question file or a shipped suite")
    parser.add_argument("--limit", type=int, default=64)
    parser.add_argument("--max-new-tokens", type=int, default=96)
    parser.add_argument("--strategies", nargs="+", default=list(REFINERS), metavar="STRATEGY")
    options = parser.parse_args()
    lm = decoding.load(options.model, dtype="float32", slots=BATCH, capacity=2048)
    params = decoding.SamplingParams(max_new_tokens=options.max_new_tokens)
    questions = load_questions(options.questions, limit=options.limit)
    prompts = [lm.encode(q.turns[0])[: lm.engine.cache.capacity - options.max_new_tokens] for q in questions]
    plain = [decoding.generate(prompt, lm, params=params).tokens for prompt in track(prompts, "plain decoding")]
    failed = 0
    for text in options.strategies:
        strategy = decoding.resolve(text)
        if not strategy.lossless:
            raise SystemExit(f"{strategy} does not claim plain decoding's tokens; there is nothing to compare.")
        alone, batched = Tally(), Tally()
        for prompt, tokens in zip(track(prompts, text), plain, strict=True):
            lm.forget()
            alone.add(lm, prompt, tokens, decoding.generate(prompt, lm, strategy=strategy, params=params))
        for at in range(0, len(prompts), BATCH):
            lm.forget()
            batch = prompts[at : at + BATCH]
            answers = decoding.generate([*batch], lm, strategy=strategy, params=params)
            for prompt, tokens, answer in zip(batch, plain[at : at + BATCH], answers, strict=True):
                batched.add(lm, prompt, tokens, answer)
        print(f"{text}\n  alone: {alone}\n  batch: {batched}", flush=True)
        failed += alone.differing + batched.differing
    return int(failed > 0)


if __name__ == "__main__":
    raise SystemExit(main())
