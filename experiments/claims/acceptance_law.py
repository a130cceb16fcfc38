"""Tokens per pass against the law for independent guesses, E = (1 − α^(γ + 1)) ÷ (1 − α).

`python -m experiments.claims.acceptance_law [--drafter suffix] [--lengths 1 2 4 8] [--limit 2]`

α is the share of guesses confirmed among those that were reached, and γ how many are guessed in a row. The law holds
if every guess is confirmed with the same chance, whatever came before it. `experiments.acceptance_theory` draws it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict

import numpy as np

import decoding
from decoding.cli import exit_code
from decoding.report import Json
from decoding.report.statistics import Array, Interval, Statistic, bootstrap, ratio_of_sums
from experiments.acceptance_theory import counts
from experiments.claims import Finding, Verdict, arguments, conclude, sample, words

TOLERANCE = 0.05
"""How far measured ÷ expected may lie from 1 for the law to hold."""


def against_the_law(length: int) -> Statistic:
    """Measured ÷ expected tokens per pass of `length` guesses, from columns of passes, guesses confirmed, guesses
    reached and tokens gained, `[..., questions]` → `[...]`."""

    def statistic(passes: Array, right: Array, reached: Array, gained: Array) -> Array:
        alpha = ratio_of_sums(right, reached)
        expected = (alpha[..., None] ** np.arange(length + 1)).sum(axis=-1)  # the law's sum, finite at α = 1 too
        return np.asarray(ratio_of_sums(gained, passes) / expected)

    return statistic


def judged(ratios: Mapping[int, Interval]) -> Verdict:
    """Holds if every interval lies within the tolerance around 1, and does not if one lies wholly outside."""
    if all(ratio.low >= 1 - TOLERANCE and ratio.high <= 1 + TOLERANCE for ratio in ratios.values()):
        return "holds"
    outside = any(ratio.low > 1 + TOLERANCE or ratio.high < 1 - TOLERANCE for ratio in ratios.values())
    return "does not hold" if outside else "cannot tell"


def main(argv: Sequence[str] | None = None) -> None:
    parser = arguments(__doc__, limit=2)
    parser.add_argument("--drafter", default="suffix", help="one that drafts chains, in text form (%(default)s)")
    parser.add_argument("--lengths", type=int, nargs="+", default=[1, 2, 4, 8], help="guesses in a row, γ")
    parser.add_argument("--streams", type=int, default=8, help="questions answered at once (%(default)s)")
    options = parser.parse_args(argv)
    lm = decoding.load(options.model, slots=options.streams)
    params = decoding.SamplingParams(max_new_tokens=options.max_new_tokens)
    prompts = [question.turns[0] for question in sample(options.limit)]
    ratios: dict[int, Interval] = {}
    figures: dict[str, Json] = {}
    parts: list[str] = []
    for length in options.lengths:
        strategy = decoding.Speculative(drafter=options.drafter, draft_length=length)
        lm.forget()
        answers = decoding.generate(list(prompts), lm, strategy=strategy, params=params)
        found = [each for answer in answers if (each := counts(answer.trace, length)).passes]
        if not found:
            print(f"γ = {length}: no pass guessed so many tokens")
            continue
        columns = [[getattr(each, name) for each in found] for name in ("passes", "right", "reached", "gained")]
        ratios[length] = bootstrap(against_the_law(length), *columns)
        passes, right, reached, gained = map(sum, columns)
        parts.append(f"γ = {length}: {gained / passes:.2f}, {words(ratios[length])} times the law's")
        figures[str(length)] = {
            **asdict(ratios[length]),
            "alpha": right / reached,
            "passes": passes,
            "tokens_per_pass": gained / passes,
            "questions": len(found),
        }
        print(f"{parts[-1]}, α = {right / reached:.3f} over {passes} passes", flush=True)
    finding = Finding(
        claim="A pass over γ guesses gains (1 − α^(γ+1)) ÷ (1 − α) tokens, α being the chance that one is confirmed",
        source="Leviathan et al. 2023, Fast Inference from Transformers via Speculative Decoding",
        measured=f"tokens per pass of {options.drafter}; " + "; ".join(parts),
        verdict=judged(ratios) if ratios else "cannot tell",
        figures={"drafter": options.drafter, "lengths": figures},
    )
    conclude("acceptance_law", finding, options, lm)


if __name__ == "__main__":
    raise SystemExit(exit_code(main))
