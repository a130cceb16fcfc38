"""How many passes Jacobi decoding takes, against the size of its block.

`python -m experiments.claims.jacobi_iterations [--blocks 2 4 8 16] [--limit 1]`
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict

import decoding
from decoding.cli import exit_code
from decoding.report import BASELINE, Json
from decoding.report.measures import difference
from decoding.report.statistics import Interval, bootstrap, ratio_of_sums
from experiments.claims import Finding, arguments, conclude, sample, words


def main(argv: Sequence[str] | None = None) -> None:
    parser = arguments(__doc__, limit=1)
    parser.add_argument("--blocks", type=int, nargs="+", default=[2, 4, 8, 16], help="tokens in a block")
    parser.add_argument("--initial", default="iterate", help="first guess at a place: iterate, as published, or ngrams")
    options = parser.parse_args(argv)
    lm = decoding.load(options.model)
    strategies = [decoding.Jacobi(block_size=block, initial=options.initial) for block in options.blocks]
    params = decoding.SamplingParams(max_new_tokens=options.max_new_tokens)
    run = decoding.compare(sample(options.limit), lm, strategies=[BASELINE, *strategies], params=params)

    plain = {record.question_id: record for record in run if record.strategy == BASELINE}
    figures: dict[str, Json] = {}
    gains: dict[int, Interval] = {}
    slowest, same = 0.0, 0
    for block, strategy in zip(options.blocks, strategies, strict=True):
        records = [record for record in run if record.strategy == str(strategy) and not record.failed]
        decode = [[step for step in record.trace if not step.prefill] for record in records]
        tokens = [sum(step.committed for step in steps) for steps in decode]
        slowest = max([slowest, *(len(s) / count for s, count in zip(decode, tokens, strict=True) if count)])
        same += sum(difference(record, plain[record.question_id]) is None for record in records)
        gains[block] = bootstrap(ratio_of_sums, tokens, [len(steps) for steps in decode])
        figures[str(block)] = asdict(gains[block])
        print(f"blocks of {block:>3}: {words(gains[block])} tokens per pass")
    best = max(gains, key=lambda block: gains[block].estimate)
    finding = Finding(
        claim="Jacobi decoding reaches plain decoding's answer in at most as many passes as there are tokens",
        source="Santilli et al. 2023; Kou et al. 2024 find 1.05 tokens per pass without training for it",
        measured=f"{words(gains[best])} tokens per pass in blocks of {best}; at most {slowest:.2f} passes per token; "
        f"{same} of {len(run) - len(plain)} answers equal plain decoding's",
        verdict="holds" if slowest <= 1 and same == len(run) - len(plain) else "does not hold",
        figures={"tokens_per_pass": figures, "most_passes_per_token": slowest, "same_as_plain": same},
    )
    conclude("jacobi_iterations", finding, options, lm)


if __name__ == "__main__":
    raise SystemExit(exit_code(main))
