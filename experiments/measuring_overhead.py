"""What recording costs: a comparison with its records, against the same answers without them.

    python -m experiments.measuring_overhead [--model smollm2-135m] [--questions 3] [--rounds 10]

Both make the same answers in one process, taking turns. The bare one keeps nothing; the recorded one notes peak
memory and every token's text, scores the answer, has it on disk before the next one begins, and draws the progress
that `decoding compare` shows. What that costs is in two places. Between answers: the share of the recorded run in which
none was being made, which the machine's noise hardly touches. Within answers, where the drawing is: every answer's
seconds against the same answer's in the bare run of the same round, median over all with a bootstrapped interval. The
claim holds if both together are below the limit at the interval's upper end, and does not if they are above it at its
lower end.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from functools import partial
from pathlib import Path

import numpy as np
from rich.console import Console

from decoding.api import load, run
from decoding.backends.base import Backend
from decoding.cli import exit_code
from decoding.comparison import Comparison, answer_turns, execute
from decoding.options import Schedule
from decoding.progress import Live
from decoding.questions import load_questions
from decoding.report import read_run
from decoding.report.statistics import bootstrap
from decoding.strategies import parse
from decoding.types import SamplingParams
from experiments.claims import words

LIMIT = 0.02


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--questions", type=int, default=3)
    parser.add_argument("--max-new-tokens", type=int, default=48)
    parser.add_argument("--rounds", type=int, default=10)
    options = parser.parse_args()
    lm = load(options.model)
    questions = load_questions("default", limit=options.questions)
    strategies = [parse(text) for text in ("autoregressive", "speculative(drafter=prompt-lookup)")]
    params = SamplingParams(max_new_tokens=options.max_new_tokens, ignore_eos=True)
    comparison = Comparison(questions, strategies, params, Schedule(warm_up=0))
    bare(comparison, lm)  # warms up
    ratios, shares = [], []
    for number in range(options.rounds):
        first = bare(comparison, lm) if number % 2 == 0 else None
        seconds, share = recorded(comparison, lm)
        ratios += [ours / theirs for ours, theirs in zip(seconds, first or bare(comparison, lm), strict=True)]
        shares.append(share)
    share, within = statistics.median(shares), bootstrap(partial(np.median, axis=-1), np.array(ratios))
    low, high = (value / (1 - share) - 1 for value in (within.low, within.high))
    print(f"claim: recording costs less than {LIMIT:.0%} of a run")
    print(f"between answers: {share:.2%} of the run")
    print(f"within answers: {words(within, 3)} times as long, {len(ratios)} pairs")
    print(f"together: {low:+.1%} to {high:+.1%}")
    print("verdict:", "holds" if high < LIMIT else "does not hold" if low > LIMIT else "cannot tell")
    return 0 if low <= LIMIT else 1


def bare(comparison: Comparison, lm: Backend) -> list[float]:
    """Seconds of every answer, with nothing kept."""
    seconds = []
    for question in comparison.questions:
        for strategy in comparison.strategies:
            lm.forget()
            seconds.append(
                sum(turn.metrics.seconds for turn in run(answer_turns(question, strategy, lm, comparison.params)))
            )
    return seconds


def recorded(comparison: Comparison, lm: Backend) -> tuple[list[float], float]:
    """Seconds of the same answers with records, in the same order, and the share of the run that is in none."""
    with tempfile.TemporaryDirectory() as folder:
        began = time.perf_counter()
        with open(os.devnull, "w") as nowhere, Live(comparison, Console(file=nowhere, force_terminal=True)) as live:
            execute(comparison, lm, Path(folder), progress=live.update)
        total = time.perf_counter() - began
        found = {(record.question_id, record.strategy): record.metrics.seconds for record in read_run(folder)}
    seconds = [found[q.id, str(strategy)] for q in comparison.questions for strategy in comparison.strategies]
    return seconds, 1 - sum(seconds) / total


if __name__ == "__main__":
    raise SystemExit(exit_code(main))
