"""What 8-bit weights do to a model: perplexity, and how often its greedy choice stays the same.

`python -m experiments.claims.eight_bit_quality [--limit 4] [--max-new-tokens 96]`

The float32 model answers every question greedily. Both models then read the same texts, so that their predictions can
be compared token by token: the questions, which people wrote, and the answers. At last the 8-bit model answers on its
own, which shows how soon two answers part once a choice differs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict

import numpy as np
import torch

import decoding
from decoding.backends.local import LocalBackend
from decoding.engine.block import Block
from decoding.engine.packing import Row
from decoding.report.statistics import bootstrap, geometric_mean_ratio, mean
from experiments.claims import Finding, Verdict, arguments, conclude, sample, words

CLOSE = 1.02
"""Perplexity up to here, relative to float32, counts as kept."""


def predictions(lm: LocalBackend, tokens: Sequence[int]) -> torch.Tensor:
    """[tokens, vocabulary] ln p of the next token behind each."""
    runner = lm.engine.runner
    slot, _ = runner.cache.acquire(tokens[:1])
    try:
        return runner.forward([Row(slot, list(tokens[:1]), Block(list(tokens[1:])))]).log_softmax(-1)
    finally:
        runner.cache.release(slot)


def perplexity(predicted: torch.Tensor, tokens: Sequence[int], first: int, last: int) -> float:
    """Of `tokens[first:last]`."""
    wanted = torch.tensor(tokens[first:last])
    return float(predicted[first - 1 : last - 1].gather(1, wanted[:, None]).mean().neg().exp())


def main(argv: Sequence[str] | None = None) -> None:
    options = arguments(__doc__, limit=4, max_new_tokens=96).parse_args(argv)
    exact, eight = decoding.load(options.model), decoding.load(options.model, weights="int8")
    asked = [exact.encode(question.turns[0]) for question in sample(options.limit)]
    asked = [prompt for prompt in asked if len(prompt) + options.max_new_tokens <= exact.engine.cache.capacity]
    params = decoding.SamplingParams(max_new_tokens=options.max_new_tokens)
    answers, others = (
        [generation.tokens for generation in decoding.generate([*asked], lm, params=params)] for lm in (exact, eight)
    )
    of_question: dict[str, list[float]] = {"float32": [], "int8": []}
    of_answer: dict[str, list[float]] = {"float32": [], "int8": []}
    same: list[float] = []
    for prompt, answer in zip(asked, answers, strict=True):
        text = [*prompt, *answer]
        for name, lm in (("float32", exact), ("int8", eight)):
            predicted = predictions(lm, text)
            of_question[name].append(perplexity(predicted, text, 1, len(prompt)))
            of_answer[name].append(perplexity(predicted, text, len(prompt), len(text)))
        choices = predicted[len(prompt) - 1 : -1].argmax(-1)
        same.append(float((choices == torch.tensor(answer)).float().mean()))
    parted = [common(a, b) for a, b in zip(answers, others, strict=True)]
    questions = bootstrap(geometric_mean_ratio, of_question["int8"], of_question["float32"])
    written = bootstrap(geometric_mean_ratio, of_answer["int8"], of_answer["float32"])
    agreement = bootstrap(mean, same)
    whole = sum(a == b for a, b in zip(answers, others, strict=True))
    verdict: Verdict = (
        "holds" if questions.high < CLOSE else "does not hold" if questions.low > CLOSE else "cannot tell"
    )
    finding = Finding(
        claim="Weights in 8 bits, a factor for each row, leave perplexity where it was (within 2 %)",
        source="Dettmers et al. 2022, LLM.int8()",
        measured=f"perplexity relative to float32 {words(questions, 3)} on {len(asked)} questions, {words(written, 3)} "
        f"on float32's answers; the greedy choice is the same at {words(agreement, 3)} of their positions; on its own "
        f"the 8-bit model gives {whole} of {len(asked)} answers word for word, the median one parts after "
        f"{np.median(parted):.0f} tokens",
        verdict=verdict,
        figures={
            "perplexity of questions": asdict(questions),
            "perplexity of answers": asdict(written),
            "float32 perplexity of questions": float(np.exp(np.mean(np.log(of_question["float32"])))),
            "float32 perplexity of answers": float(np.exp(np.mean(np.log(of_answer["float32"])))),
            "agreement of greedy choices": asdict(agreement),
            "tokens in common": parted,
            "identical answers": whole,
            "answers": len(asked),
        },
    )
    conclude("eight_bit_quality", finding, options, exact)


def common(first: Sequence[int], second: Sequence[int]) -> int:
    """Tokens before two answers part."""
    pairs = zip(first, second, strict=False)
    return next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(first), len(second)))


if __name__ == "__main__":
    main()
