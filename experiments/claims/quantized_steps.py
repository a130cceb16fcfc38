"""8-bit weights against float32, in steps bound by memory and in steps bound by arithmetic.

`python -m experiments.claims.quantized_steps [--tokens 1 32 128] [--prompt 512] [--rounds 15]`

Timed are the engine's own steps, `load(weights="int8")` against `load()`: one token behind a context, which waits for
the weights; many tokens behind it, and a long prompt, which wait for the arithmetic. The engine rounds activations to
integers as well, so what the last two gain is what integer arithmetic brings, and nothing that rounding weights does.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict

import decoding
from decoding.backends.local import LocalBackend
from decoding.cli import exit_code
from decoding.engine.block import Block
from decoding.engine.packing import Row
from decoding.report import Json
from decoding.report.statistics import Interval, bootstrap, geometric_mean_ratio
from experiments.claims import Finding, Verdict, arguments, conclude, interleaved, words

CONTEXT = 128  # tokens before a step of a few


def step(lm: LocalBackend, tokens: int) -> Callable[[], object]:
    """One engine step of `tokens` tokens, all but the first guessed, behind `CONTEXT` others."""
    runner, context = lm.engine.runner, list(range(10, 10 + CONTEXT))
    slot, known = runner.cache.acquire(context)
    runner.forward([Row(slot, context[known:], Block(), logits=False)])
    runner.cache.commit(slot, context[known:])
    row = Row(slot, [10 + CONTEXT], Block([7] * (tokens - 1)))
    return lambda: runner.forward([row])


def prefill(lm: LocalBackend, tokens: int) -> Callable[[], object]:
    """One engine step that reads a prompt of `tokens` tokens."""
    runner, prompt = lm.engine.runner, [9 + i % 200 for i in range(tokens)]
    slot, known = runner.cache.acquire(prompt)
    row = Row(slot, prompt[known:], Block(), logits=False)
    return lambda: runner.forward([row])


def judged(few: Interval, many: Sequence[Interval]) -> Verdict:
    """Holds if the step of few tokens gains something, and more than every step of many."""
    if few.low > max(1.0, *(gain.high for gain in many)):
        return "holds"
    return "does not hold" if few.high < max(1.0, *(gain.low for gain in many)) else "cannot tell"


def main(argv: Sequence[str] | None = None) -> None:
    parser = arguments(__doc__)
    parser.add_argument("--tokens", type=int, nargs="+", default=[1, 32, 128], help="in a step; the first are few")
    parser.add_argument("--prompt", type=int, default=512, help="tokens of the long prompt (%(default)s)")
    parser.add_argument("--rounds", type=int, default=15, help="the two take turns so often (%(default)s)")
    options = parser.parse_args(argv)
    ways = {"float32": decoding.load(options.model), "int8": decoding.load(options.model, weights="int8")}
    steps: dict[str, Mapping[str, Callable[[], object]]] = {
        f"{tokens} token{'s' if tokens > 1 else ''}": {way: step(lm, tokens) for way, lm in ways.items()}
        for tokens in options.tokens
    }
    steps[f"a prompt of {options.prompt}"] = {way: prefill(lm, options.prompt) for way, lm in ways.items()}
    gains: dict[str, Interval] = {}
    figures: dict[str, Json] = {}
    for name, pair in steps.items():
        times = interleaved(pair, options.rounds)
        gains[name] = bootstrap(geometric_mean_ratio, times["float32"], times["int8"])
        figures[name] = {**asdict(gains[name]), **{f"seconds {way}": list(found) for way, found in times.items()}}
        print(f"{name:>20}: {words(gains[name])}×", flush=True)
    few, *many = gains.values()
    finding = Finding(
        claim="8-bit weights speed up steps that wait for memory; steps that wait for arithmetic gain less",
        source="Lin et al. 2024, AWQ; Xiao et al. 2023, SmoothQuant",
        measured="times as fast as float32, intervals over rounds: "
        + "; ".join(f"{name} {words(gain)}" for name, gain in gains.items())
        + f". Steps ran as {' and '.join(lm.engine.runner.kernels for lm in ways.values())}",
        verdict=judged(few, many),
        figures=figures,
    )
    conclude("quantized_steps", finding, options, ways["float32"])


if __name__ == "__main__":
    raise SystemExit(exit_code(main))
