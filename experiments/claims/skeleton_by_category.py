"""Skeleton-of-Thought's speed-up by category of question.

`python -m experiments.claims.skeleton_by_category [--limit 2] [--max-new-tokens 96]`
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict

import numpy as np

import decoding
from decoding.cli import exit_code
from decoding.report import BASELINE, Json, summarize
from decoding.report.statistics import Interval, bootstrap, ratio_of_sums
from decoding.report.summary import per_question_seconds
from experiments.claims import Finding, above, arguments, conclude, sample, words

LISTS = ("knowledge", "generic", "common-sense", "roleplay", "counterfactual")
"""Categories on which the paper reports the largest speed-ups, 1.89 to 2.33."""


def main(argv: Sequence[str] | None = None) -> None:
    parser = arguments(__doc__, limit=2, max_new_tokens=96)
    parser.add_argument("--strategy", default="skeleton", help="in text form (%(default)s)")
    parser.add_argument("--categories", nargs="+", help="only these")
    options = parser.parse_args(argv)
    lm = decoding.load(options.model)
    questions = sample(options.limit, options.categories)
    params = decoding.SamplingParams(max_new_tokens=options.max_new_tokens)
    strategy = str(decoding.resolve(options.strategy))
    run = decoding.compare(questions, lm, strategies=[BASELINE, strategy], params=params)

    row = summarize(run).row(strategy)
    figures: dict[str, Json] = {}
    for category, found in row.categories.items():
        if found.speedup is not None:
            print(f"{category:>16}  {words(found.speedup)}×, {found.questions} questions")
            figures[category] = asdict(found.speedup) | {"questions": found.questions}
    plain, skeleton = (per_question_seconds(run, name) for name in (BASELINE, strategy))
    lists = {question.id for question in questions if question.category in LISTS}
    speedups: dict[str, Interval] = {}
    for name, wanted in (("lists", True), ("others", False)):
        both = [q for q in skeleton if q in plain and (q in lists) == wanted]
        pair = [np.array([seconds[q] for q in both]) for seconds in (plain, skeleton)]
        speedups[name] = bootstrap(ratio_of_sums, *pair)
    finding = Finding(
        claim="Skeleton-of-Thought answers questions of knowledge, common sense and roles sooner than plain decoding",
        source="Ning et al. 2024, Skeleton-of-Thought",
        measured=f"{words(speedups['lists'])} times as fast there, {words(speedups['others'])} on other questions; "
        f"answers {row.tokens / summarize(run).row(BASELINE).tokens:.2f} times as long",
        verdict=above(speedups["lists"]),
        figures={"categories": figures, **{name: asdict(interval) for name, interval in speedups.items()}},
    )
    conclude("skeleton_by_category", finding, options, lm)


if __name__ == "__main__":
    raise SystemExit(exit_code(main))
