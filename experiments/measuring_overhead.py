"""What recording costs: a comparison with its records, against the same answers without them.

    python -m experiments.measuring_overhead [--model smollm2-135m] [--questions 4] [--rounds 5]

Both make the same answers in one process, taking turns. The bare one keeps nothing; the recorded one notes peak
memory and every token's text, scores the answer, has it on disk before the next one begins, and draws the progress
that `decoding compare` shows. Printed are the share of the recorded run in which no answer was being made, which is all
that recording does between answers and does not depend on the machine's noise; and the median over rounds of
recorded ÷ bare − 1, which also holds what drawing takes from the answers, and the noise of the machine: on a busy one
take more rounds. The claim holds if both are below the limit.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path

from rich.console import Console

from decoding.api import load, run
from decoding.backends.base import Backend
from decoding.comparison import Comparison, answer_turns, execute
from decoding.options import Schedule
from decoding.progress import Live
from decoding.questions import load_questions
from decoding.report import read_run
from decoding.strategies import parse
from decoding.types import SamplingParams

LIMIT = 0.02


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--questions", type=int, default=4)
    parser.add_argument("--max-new-tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    lm = load(options.model)
    questions = load_questions("default", limit=options.questions)
    strategies = [parse(text) for text in ("autoregressive", "speculative(drafter=prompt-lookup)")]
    params = SamplingParams(max_new_tokens=options.max_new_tokens, ignore_eos=True)
    comparison = Comparison(questions, strategies, params, Schedule(warm_up=0))
    bare(comparison, lm)  # warms up
    costs, shares = [], []
    for number in range(options.rounds):
        if number % 2:
            total, share = recorded(comparison, lm)
            costs.append(total / bare(comparison, lm) - 1)
        else:
            without = bare(comparison, lm)
            total, share = recorded(comparison, lm)
            costs.append(total / without - 1)
        shares.append(share)
    cost, share = statistics.median(costs), statistics.median(shares)
    print(f"claim: recording costs less than {LIMIT:.0%} of a run")
    print(f"recorded ÷ bare − 1: {cost:+.2%} (rounds: {', '.join(f'{c:+.2%}' for c in costs)})")
    print(f"share of the recorded run without an answer under way: {share:.2%}")
    held = max(cost, share) < LIMIT
    print("verdict:", "holds" if held else "does not hold")
    return 0 if held else 1


def bare(comparison: Comparison, lm: Backend) -> float:
    """Seconds for all answers, with nothing kept."""
    began = time.perf_counter()
    for question in comparison.questions:
        for strategy in comparison.strategies:
            lm.forget()
            run(answer_turns(question, strategy, lm, comparison.params))
    return time.perf_counter() - began


def recorded(comparison: Comparison, lm: Backend) -> tuple[float, float]:
    """Seconds for the same with records, and the share of them that is in no answer."""
    with tempfile.TemporaryDirectory() as folder:
        began = time.perf_counter()
        with open(os.devnull, "w") as nowhere, Live(comparison, Console(file=nowhere, force_terminal=True)) as live:
            execute(comparison, lm, Path(folder), progress=live.update)
        total = time.perf_counter() - began
        answering = sum(record.metrics.seconds for record in read_run(folder))
    return total, 1 - answering / total


if __name__ == "__main__":
    sys.exit(main())
