"""Speculation's gain against the number of sequences in the batch, and where the latency model says it ends.

`python -m experiments.claims.speculation_against_batch [--batches 1 2 4 8 16] [--draft-length 5] [--rounds 3]`
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import median

import decoding
from decoding.backends.local import LocalBackend
from decoding.cli import exit_code
from decoding.report import BASELINE, Json
from decoding.trace import Step
from experiments.claims import Finding, Verdict, arguments, conclude, crossing, sample


def decode_steps(prompts: list[str], lm: LocalBackend, strategy: str, new_tokens: int) -> list[Step]:
    """The passes after prefill of one batch that decodes all prompts, one entry per pass."""
    params = decoding.SamplingParams(max_new_tokens=new_tokens, ignore_eos=True)
    lm.forget()
    answers = decoding.generate(list(prompts), lm, strategy=strategy, params=params)
    steps = {step.step: step for answer in answers for step in answer.trace}
    reading = {step.step for answer in answers for step in answer.trace if step.prefill}
    return [step for number, step in steps.items() if number not in reading]


def main(argv: Sequence[str] | None = None) -> None:
    parser = arguments(__doc__, max_new_tokens=32)
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 2, 4, 8, 16])
    parser.add_argument("--drafter", default="token-recycling", help="(%(default)s)")
    parser.add_argument("--draft-length", type=int, default=5, help="guesses in a row (%(default)s)")
    parser.add_argument("--rounds", type=int, default=3, help="the median of so many (%(default)s)")
    options = parser.parse_args(argv)
    lm = decoding.load(options.model, slots=max(options.batches))
    guess = f"speculative(drafter={options.drafter},draft_length={options.draft_length})"
    prompts = [question.turns[0] for question in sample(4) if len(question.turns[0]) < 200]
    measured: dict[int, float] = {}
    predicted: dict[int, float] = {}
    figures: dict[str, Json] = {}
    for size in options.batches:
        batch = (prompts * math.ceil(size / len(prompts)))[:size]
        context = sum(len(lm.encode(text)) for text in batch) // size + options.max_new_tokens // 2
        gains: list[float] = []
        models: list[float] = []
        for _ in range(options.rounds + 1):  # the first warms up
            runs = [decode_steps(batch, lm, strategy, options.max_new_tokens) for strategy in (BASELINE, guess)]
            plain, fast = (sum(step.end - step.start for step in steps) for steps in runs)
            costs = [sum(lm.latency.cost(s.batch_tokens, s.batch_sequences, context) for s in steps) for steps in runs]
            gains.append(plain / fast)
            models.append(float(costs[0]) / float(costs[1]))
        measured[size], predicted[size] = median(gains[1:]), median(models[1:])
        figures[str(size)] = {"measured": measured[size], "predicted": predicted[size]}
        print(f"{size:>3} sequences: {measured[size]:.2f}×, latency model {predicted[size]:.2f}×", flush=True)
    smallest, largest = min(measured), max(measured)
    cross, expected = crossing(measured), crossing(predicted)
    fell = measured[largest] < measured[smallest]
    verdict: Verdict = "does not hold" if not fell else "holds" if cross is not None else "cannot tell"
    ends = " and ".join("none" if at is None else f"{at:.1f} sequences" for at in (cross, expected))
    finding = Finding(
        claim="The gain of speculation falls with the batch and ends where the step has no slack left",
        source="Liu et al. 2024, Optimizing Speculative Decoding for Serving; Chen et al. 2024, MagicDec",
        measured=f"{measured[smallest]:.2f} times as fast at {smallest}, {measured[largest]:.2f} at {largest}; "
        f"the gain ends at, measured and by the latency model: {ends}",
        verdict=verdict,
        figures={"batches": figures, "crossing": cross, "predicted_crossing": expected},
    )
    conclude("speculation_against_batch", finding, options, lm)


if __name__ == "__main__":
    raise SystemExit(exit_code(main))
