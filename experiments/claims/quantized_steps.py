"""Weight-only against activation quantization, in steps bound by memory and in steps bound by arithmetic.

`python -m experiments.claims.quantized_steps [--tokens 1 4 16 64 256] [--rounds 9]`

Two comparisons against float32: the largest linear layer alone, with weights of 8 bits and float activations
("weights") and with both in 8 bits ("both", scaling of the activations included), as torch computes them; and the
engine's whole step with `load(weights="int8")`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

import decoding
from decoding.backends.local import LocalBackend
from decoding.engine.block import Block
from decoding.engine.packing import Row
from decoding.engine.precision import int8_rows
from experiments.claims import Finding, Verdict, arguments, conclude, interleaved

CONTEXT = 128  # tokens before the step that is timed


def layer(lm: LocalBackend, tokens: int) -> dict[str, Callable[[], object]]:
    """Ways to put `tokens` through the model's largest linear layer but the head."""
    head = lm.model.get_output_embeddings()
    linears = [m for m in lm.model.modules() if isinstance(m, torch.nn.Linear) and m is not head]
    weight = max(linears, key=lambda module: module.weight.numel()).weight.detach()
    whole, factor = int8_rows(weight)
    x = torch.randn(tokens, weight.shape[1], generator=torch.Generator().manual_seed(0))

    def both() -> torch.Tensor:
        scale = x.abs().amax(dim=1, keepdim=True) / 127
        return torch._int_mm((x / scale).round().to(torch.int8), whole.t()) * scale * factor

    return {
        "float32": lambda: torch.nn.functional.linear(x, weight),
        "weights": lambda: torch._weight_int8pack_mm(x, whole, factor),
        "both": both,
    }


def step(lm: LocalBackend, tokens: int) -> Callable[[], object]:
    """One engine step of `tokens` tokens behind `CONTEXT` others."""
    runner, prompt = lm.engine.runner, list(range(10, 11 + CONTEXT))
    lm.forget()
    slot, _ = runner.cache.acquire(prompt)
    runner.forward([Row(slot, prompt[:-1], Block(), logits=False)])
    runner.cache.commit(slot, prompt[:-1])
    row = Row(slot, prompt[-1:], Block([7] * (tokens - 1)))
    return lambda: runner.forward([row])


@torch.inference_mode()
def main(argv: Sequence[str] | None = None) -> None:
    parser = arguments(__doc__)
    parser.add_argument("--tokens", type=int, nargs="+", default=[1, 4, 16, 64, 256], help="tokens in a step")
    parser.add_argument("--rounds", type=int, default=9, help="the median of so many (%(default)s)")
    options = parser.parse_args(argv)
    lm, small = decoding.load(options.model), decoding.load(options.model, weights="int8")
    gains: dict[str, dict[int, float]] = {"weights": {}, "both": {}, "step": {}}
    for tokens in options.tokens:
        ways = layer(lm, tokens) | {"step float32": step(lm, tokens), "step": step(small, tokens)}
        times = interleaved(ways, options.rounds)
        for way, found in gains.items():
            base = "step float32" if way == "step" else "float32"
            found[tokens] = times[base] / times[way]
        print(f"{tokens:>4} tokens: " + ", ".join(f"{way} {found[tokens]:.2f}×" for way, found in gains.items()))
    few, many = min(options.tokens), max(options.tokens)
    fades, lasts = gains["weights"][few] > 1 >= gains["weights"][many], min(gains["both"].values()) > 1
    verdict: Verdict = "holds" if fades and lasts else "does not hold"
    parts = "; ".join(f"{way} {found[few]:.2f} and {found[many]:.2f}" for way, found in gains.items())
    finding = Finding(
        claim="Quantizing weights alone speeds up memory-bound steps only; activations too, compute-bound ones as well",
        source="Xiao et al. 2023, SmoothQuant; Lin et al. 2024, AWQ",
        measured=f"times as fast as float32 at {few} and {many} tokens, in one layer and the whole step: {parts}",
        verdict=verdict,
        figures={way: {str(n): gain for n, gain in found.items()} for way, found in gains.items()},
    )
    conclude("quantized_steps", finding, options, lm)


if __name__ == "__main__":
    main()
