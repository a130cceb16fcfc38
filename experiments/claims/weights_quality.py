"""What weights in fewer bits do to a model: perplexity, and how often its greedy choice stays the same.

`python -m experiments.claims.weights_quality [--weights int8 int4] [--limit 4] [--max-new-tokens 96]`

The float32 model answers every question greedily. Both models then read the same texts, so that their predictions can
be compared token by token: the questions, which people wrote, and the answers. Besides, the rounded model answers on
its own, which shows how soon two answers part once a choice differs.
"""

from __future__ import annotations

from collections.abc import Sequence as List
from dataclasses import asdict, dataclass

import numpy as np
import torch

import decoding
from decoding.backends.local import LocalBackend
from decoding.cli import exit_code
from decoding.engine.block import Block
from decoding.engine.packing import Row
from decoding.report.statistics import Interval, bootstrap, geometric_mean_ratio, mean
from decoding.types import SamplingParams
from experiments.claims import Finding, Verdict, arguments, conclude, sample, words

CLOSE = 1.02
"""Perplexity up to here, relative to float32, counts as kept."""


def predictions(lm: LocalBackend, tokens: List[int]) -> torch.Tensor:
    """[tokens, vocabulary] ln p of the next token behind each."""
    runner = lm.engine.runner
    slot, _ = runner.cache.acquire(tokens[:1])
    try:
        return runner.forward([Row(slot, list(tokens[:1]), Block(list(tokens[1:])))]).log_softmax(-1)
    finally:
        runner.cache.release(slot)


def perplexity(predicted: torch.Tensor, tokens: List[int], first: int, last: int) -> float:
    """Of `tokens[first:last]`."""
    wanted = torch.tensor(tokens[first:last])
    return float(predicted[first - 1 : last - 1].gather(1, wanted[:, None]).mean().neg().exp())


@dataclass(frozen=True)
class Kept:
    """What a precision keeps of float32's behaviour.

    questions, answers: perplexity relative to float32's, on the questions and on float32's answers. agreement: how
    often the greedy choice is the same on those. identical: answers of its own that are float32's word for word.
    parted: median of the tokens before they part.
    """

    questions: Interval
    answers: Interval
    agreement: Interval
    identical: int
    parted: float


def compare(exact: LocalBackend, rounded: LocalBackend, asked: List[List[int]], params: SamplingParams) -> Kept:
    """Let both read the same texts, and `rounded` answer on its own."""
    answers, others = (
        [generation.tokens for generation in decoding.generate([*asked], lm, params=params)] for lm in (exact, rounded)
    )
    of_question: tuple[list[float], list[float]] = [], []
    of_answer: tuple[list[float], list[float]] = [], []
    same: list[float] = []
    for prompt, answer in zip(asked, answers, strict=True):
        text = [*prompt, *answer]
        for i, lm in enumerate((exact, rounded)):
            predicted = predictions(lm, text)
            of_question[i].append(perplexity(predicted, text, 1, len(prompt)))
            of_answer[i].append(perplexity(predicted, text, len(prompt), len(text)))
        choices = predicted[len(prompt) - 1 : -1].argmax(-1)
        same.append(float((choices == torch.tensor(answer)).float().mean()))
    return Kept(
        questions=bootstrap(geometric_mean_ratio, of_question[1], of_question[0]),
        answers=bootstrap(geometric_mean_ratio, of_answer[1], of_answer[0]),
        agreement=bootstrap(mean, same),
        identical=sum(a == b for a, b in zip(answers, others, strict=True)),
        parted=float(np.median([common(a, b) for a, b in zip(answers, others, strict=True)])),
    )


def main(argv: List[str] | None = None) -> None:
    parser = arguments(__doc__, limit=4, max_new_tokens=96)
    parser.add_argument("--weights", nargs="+", default=["int8", "int4"], help="compared with float32")
    options = parser.parse_args(argv)
    exact = decoding.load(options.model)
    asked = [exact.encode(question.turns[0]) for question in sample(options.limit)]
    asked = [prompt for prompt in asked if len(prompt) + options.max_new_tokens <= exact.engine.cache.capacity]
    params = SamplingParams(max_new_tokens=options.max_new_tokens)
    found: dict[str, Kept] = {}
    for weights in options.weights:
        kept = compare(exact, decoding.load(options.model, weights=weights), asked, params)
        found[weights] = kept
        print(f"{weights}: perplexity {words(kept.questions, 3)}×, agreement {words(kept.agreement, 3)}", flush=True)
    highs, lows = [k.questions.high for k in found.values()], [k.questions.low for k in found.values()]
    verdict: Verdict = "holds" if max(highs) < CLOSE else "does not hold" if max(lows) > CLOSE else "cannot tell"
    finding = Finding(
        claim="Weights in 8 bits by rows, and in 4 bits by groups of 32, leave perplexity where it was (within 2 %)",
        source="Dettmers et al. 2022, LLM.int8(); Dettmers and Zettlemoyer 2023",
        measured="; ".join(
            f"{weights}: perplexity relative to float32 {words(kept.questions, 3)} on {len(asked)} questions, "
            f"{words(kept.answers, 3)} on float32's answers, where the greedy choice is the same at "
            f"{words(kept.agreement, 3)} of positions; {kept.identical} answers of its own are the same word for word, "
            f"the median one parts after {kept.parted:.0f} tokens"
            for weights, kept in found.items()
        ),
        verdict=verdict,
        figures={weights: asdict(kept) for weights, kept in found.items()},
    )
    conclude("weights_quality", finding, options, exact)


def common(first: List[int], second: List[int]) -> int:
    """Tokens before two answers part."""
    pairs = zip(first, second, strict=False)
    return next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(first), len(second)))


if __name__ == "__main__":
    raise SystemExit(exit_code(main))
