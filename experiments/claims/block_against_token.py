"""Block against token verification of sampled drafts.

`python -m experiments.claims.block_against_token [--drafter "layer-skip(layers=24)"] [--draft-length 6] [--repeats 2]`
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict

import numpy as np

import decoding
from decoding.cli import exit_code
from decoding.options import Schedule
from decoding.report.statistics import bootstrap, ratio_of_rates
from experiments.claims import Finding, above, arguments, conclude, sample, words

WAYS = ("block", "token")


def main(argv: Sequence[str] | None = None) -> None:
    parser = arguments(__doc__, limit=2, max_new_tokens=48)
    parser.add_argument("--drafter", help="one that samples its guesses; by default four fifths of the model's layers")
    parser.add_argument("--draft-length", type=int, default=6, help="guesses in a row (%(default)s)")
    parser.add_argument("--temperature", type=float, default=1.0, help="(%(default)s)")
    parser.add_argument("--repeats", type=int, default=2, help="answers per question, each with its own seed")
    parser.add_argument("--streams", type=int, default=8, help="questions answered at once (%(default)s)")
    options = parser.parse_args(argv)
    lm = decoding.load(options.model)
    layers = int(lm.engine.runner.config.num_hidden_layers)
    drafter = options.drafter or f"layer-skip(layers={max(1, 4 * layers // 5)})"
    texts = [f"speculative(drafter={drafter},draft_length={options.draft_length},verification={w})" for w in WAYS]
    strategies = [decoding.resolve(text) for text in texts]
    params = decoding.SamplingParams(temperature=options.temperature, max_new_tokens=options.max_new_tokens)
    schedule = Schedule(repeats=options.repeats, streams=options.streams)
    run = decoding.compare(sample(options.limit), lm, strategies=strategies, params=params, schedule=schedule)

    tokens: dict[str, dict[int | str, float]] = {str(strategy): {} for strategy in strategies}
    passes: dict[str, dict[int | str, float]] = {str(strategy): {} for strategy in strategies}
    for record in run:  # repeats of a question are added up: they share its difficulty
        decode = [step for step in record.trace if not step.prefill]
        for total, value in ((tokens, sum(step.committed for step in decode)), (passes, len(decode))):
            total[record.strategy][record.question_id] = total[record.strategy].get(record.question_id, 0) + value
    block, token = map(str, strategies)
    both = [q for q in passes[block] if passes[block][q] and passes[token].get(q)]
    columns = [np.array([of[q] for q in both]) for of in (tokens[block], passes[block], tokens[token], passes[token])]
    gain = bootstrap(ratio_of_rates, *columns)
    lengths = {
        way: sum(tokens[name].values()) / max(1, sum(passes[name].values()))
        for way, name in zip(WAYS, (block, token), strict=True)
    }
    for way, length in lengths.items():
        print(f"{way:>6}: acceptance length {length:.3f}")
    finding = Finding(
        claim="Verifying a block of guesses together accepts more of them than verifying token by token",
        source="Sun et al. 2024, Block Verification Accelerates Speculative Decoding",
        measured=f"acceptance length {lengths['block']:.2f} against {lengths['token']:.2f}, "
        f"{words(gain, 3)} times as long, on {len(both)} questions",
        verdict=above(gain),
        figures={"drafter": drafter, "lengths": lengths, "gain": asdict(gain)},
    )
    conclude("block_against_token", finding, options, lm)


if __name__ == "__main__":
    raise SystemExit(exit_code(main))
