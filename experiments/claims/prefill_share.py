"""How an answer's time divides into reading the prompt and writing the answer, against the prompt's length.

`python -m experiments.claims.prefill_share [--prompts 32 128 512 1024] [--rounds 3]`
"""

from __future__ import annotations

from collections.abc import Sequence
from statistics import median

import decoding
from decoding.cli import exit_code
from decoding.report import Json
from experiments.claims import Finding, arguments, conclude, sample


def main(argv: Sequence[str] | None = None) -> None:
    parser = arguments(__doc__, max_new_tokens=128)
    parser.add_argument("--prompts", type=int, nargs="+", default=[32, 128, 512, 1024], help="lengths in tokens")
    parser.add_argument("--rounds", type=int, default=3, help="the median of so many (%(default)s)")
    options = parser.parse_args(argv)
    lm = decoding.load(options.model)
    text = [token for question in sample(13) for token in lm.encode(question.turns[0])]
    params = decoding.SamplingParams(max_new_tokens=options.max_new_tokens, ignore_eos=True)
    shares: dict[int, list[float]] = {length: [] for length in options.prompts}
    for number in range(options.rounds + 1):
        for length in options.prompts:
            lm.forget()
            trace = decoding.generate(text[:length], lm, params=params).trace
            reading = sum(step.end - step.start for step in trace if step.prefill)
            if number:  # the first round warms up
                shares[length].append(reading / sum(step.end - step.start for step in trace))
    found = {length: median(values) for length, values in shares.items()}
    figures: dict[str, Json] = {str(length): share for length, share in found.items()}
    for length, share in found.items():
        print(f"{length:>5} tokens of prompt: {share:.1%} of the time is prefill")
    same = min(found, key=lambda length: abs(length - options.max_new_tokens))
    half = next((length for length in sorted(found) if found[length] >= 0.5), None)
    finding = Finding(
        claim="Writing takes most of an answer's time: a prompt as long as the answer is read in a fraction of it",
        source="Ning et al. 2024, Skeleton-of-Thought; Patel et al. 2024, Splitwise",
        measured=f"{options.max_new_tokens} new tokens: prefill of {same} tokens takes {found[same]:.1%} of the time, "
        f"of {max(found)} tokens {found[max(found)]:.1%}; "
        + (f"half of it from {half} tokens on" if half else "never half of it"),
        verdict="holds" if found[same] < 0.5 else "does not hold",
        figures={"prefill_share": figures},
    )
    conclude("prefill_share", finding, options, lm)


if __name__ == "__main__":
    raise SystemExit(exit_code(main))
