"""Acceptance length by drafter and category of question, as in Spec-Bench.

`python -m experiments.claims.acceptance_by_drafter [--drafters prompt-lookup suffix token-recycling] [--limit 3]`
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from statistics import fmean

import decoding
from decoding.cli import exit_code
from decoding.report import Json
from decoding.report.statistics import Interval
from experiments.claims import Finding, above, arguments, conclude, gap, sample, words

COPIED = ("summarization", "qa")
"""Categories whose answers repeat their question."""


def main(argv: Sequence[str] | None = None) -> None:
    parser = arguments(__doc__, limit=3)  # five of either kind make an interval
    parser.add_argument("--drafters", nargs="+", default=["prompt-lookup", "suffix", "token-recycling"])
    parser.add_argument("--draft-length", type=int, default=8, help="guesses in a row (%(default)s)")
    options = parser.parse_args(argv)
    lm = decoding.load(options.model)
    texts = [f"speculative(drafter={d},draft_length={options.draft_length})" for d in options.drafters]
    strategies = {drafter: decoding.resolve(text) for drafter, text in zip(options.drafters, texts, strict=True)}
    params = decoding.SamplingParams(max_new_tokens=options.max_new_tokens)
    run = decoding.compare(sample(options.limit), lm, strategies=list(strategies.values()), params=params)

    categories = list(dict.fromkeys(record.category for record in run))
    lengths: dict[str, dict[str, list[float]]] = {drafter: {c: [] for c in categories} for drafter in strategies}
    names = {str(strategy): drafter for drafter, strategy in strategies.items()}
    for record in run:
        if not record.failed and record.metrics.forwards:
            lengths[names[record.strategy]][record.category].append(record.metrics.acceptance_length)
    print(f"{'':>16}" + "".join(f"{drafter:>18}" for drafter in strategies))
    for category in categories:
        print(f"{category:>16}" + "".join(f"{fmean(lengths[d][category] or [0.0]):18.2f}" for d in strategies))
    figures: dict[str, Json] = {}
    gaps: dict[str, Interval] = {}
    for drafter, found in lengths.items():
        copied = [length for category in COPIED for length in found.get(category, ())]
        others = [length for category, values in found.items() if category not in COPIED for length in values]
        gaps[drafter] = gap(copied, others)
        figures[drafter] = {"gap": asdict(gaps[drafter]), "categories": {c: fmean(v) for c, v in found.items() if v}}
    finding = Finding(
        claim="Guesses copied from the text so far gain most where answers repeat it, as in summaries",
        source="Saxena 2023, prompt lookup; Xia et al. 2024, Spec-Bench",
        measured="acceptance length on summaries and questions about a passage, minus that on all other questions: "
        + "; ".join(f"{drafter} {words(difference)}" for drafter, difference in gaps.items()),
        verdict=above(gaps[options.drafters[0]], 0.0),
        figures=figures,
    )
    conclude("acceptance_by_drafter", finding, options, lm)


if __name__ == "__main__":
    raise SystemExit(exit_code(main))
