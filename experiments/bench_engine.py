"""Plain decoding on this engine against transformers' `generate`, and what a step costs.

    python -m experiments.bench_engine [--model smollm2-135m] [--batches 1 4 16 32] [--rounds 5]

Both decode the same ragged prompts greedily for the same number of tokens, in one process, taking turns. Printed
are medians over the rounds; ratios are what counts, because machines differ and drift. Then one sequence alone:
the time of a step against the tokens in it.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path

import torch

import decoding
from decoding.backends.local import LocalBackend
from decoding.cli import exit_code
from decoding.engine.block import Block
from decoding.engine.packing import Row
from decoding.questions import load_questions
from decoding.report import environment

CONTEXT = 128  # tokens before the step that is timed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 4, 16, 32])
    parser.add_argument("--steps", type=int, nargs="+", default=[1, 2, 4, 8, 16, 32, 64])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--new-tokens", type=int, default=48)
    parser.add_argument("--json", type=Path, help="also write the figures here")
    options = parser.parse_args()
    lm = decoding.load(options.model, slots=max(options.batches), capacity=1024)
    figures: dict[str, object] = {"environment": vars(environment(device=str(lm.device)))}
    figures["batches"] = [batch(lm, size, options.new_tokens, options.rounds) for size in options.batches]
    figures["steps"] = steps(lm, options.steps, 4 * options.rounds)
    if options.json is not None:
        options.json.write_text(json.dumps(figures, indent=1, default=str))


def batch(lm: LocalBackend, size: int, new_tokens: int, rounds: int) -> dict[str, float]:
    """Tokens per second of both, and the engine's share of time outside the forward pass."""
    questions = [q for q in load_questions("default") if len(q.turns[0]) < 600]
    prompts = [lm.encode(question.turns[0]) for question in questions[:size]]
    params = decoding.SamplingParams(max_new_tokens=new_tokens, ignore_eos=True)
    theirs: list[float] = []
    ours: list[float] = []
    outside: list[float] = []
    for round_number in range(rounds + 1):  # the first warms up
        began = time.perf_counter()
        expected = transformers_generate(lm, prompts, new_tokens)
        middle = time.perf_counter()
        lm.forget()
        generations = decoding.generate(prompts, lm, params=params)
        ended = time.perf_counter()
        if round_number:
            theirs.append(middle - began)
            ours.append(ended - middle)
            decode = {s.step: s for g in generations for s in g.trace if not s.prefill}.values()
            forward = sum(s.forward for s in decode)
            outside.append(1 - forward / sum(s.plan + s.forward + s.commit for s in decode))
    same = sum(g.tokens == tokens for g, tokens in zip(generations, expected, strict=True))
    figure = {
        "streams": size,
        "transformers": size * new_tokens / statistics.median(theirs),
        "engine": size * new_tokens / statistics.median(ours),
        "ratio": statistics.median(a / b for a, b in zip(theirs, ours, strict=True)),
        "outside_forward": statistics.median(outside),
        "identical": same,
    }
    print(
        f"{size:>3} streams: transformers {figure['transformers']:7.1f} tokens/s, engine {figure['engine']:7.1f}, "
        f"ratio {figure['ratio']:.2f}; {figure['outside_forward']:.1%} of a step outside the forward pass; "
        f"{same}/{size} answers identical",
        flush=True,
    )
    return figure


def transformers_generate(lm: LocalBackend, prompts: list[list[int]], new_tokens: int) -> list[list[int]]:
    """Greedy tokens from transformers, prompts padded on the left."""
    longest = max(map(len, prompts))
    pad = lm.tokenizer.pad_token_id or 0
    ids = torch.tensor([[pad] * (longest - len(p)) + p for p in prompts], device=lm.device)
    mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts], device=lm.device)
    # An end-of-sequence id that no token has: everybody decodes for the same number of tokens.
    with torch.inference_mode():
        out = lm.model.generate(  # type: ignore[operator]
            ids,
            attention_mask=mask,
            max_new_tokens=new_tokens,
            do_sample=False,
            eos_token_id=lm.engine.runner.vocab,
            pad_token_id=pad,
        )
    return [row.tolist() for row in out[:, longest:]]


def steps(lm: LocalBackend, widths: list[int], rounds: int) -> list[dict[str, float]]:
    """Time of one step over one sequence, against the tokens in it."""
    runner = lm.engine.runner
    runner.cache.forget()
    prompt = list(range(100, 100 + CONTEXT + 1))
    slot, _ = runner.cache.acquire(prompt)
    runner.forward([Row(slot, prompt[:-1], Block(), logits=False)])
    runner.cache.commit(slot, prompt[:-1])
    times: dict[int, list[float]] = {width: [] for width in widths}
    for _ in range(rounds):
        for width in widths:
            row = Row(slot, prompt[-1:], Block(list(range(200, 199 + width))))
            began = time.perf_counter()
            runner.forward([row])
            if lm.device.type == "cuda":
                torch.cuda.synchronize()
            times[width].append(time.perf_counter() - began)
    runner.cache.release(slot)
    one = statistics.median(times[widths[0]])
    figures = []
    for width in widths:
        median = statistics.median(times[width])
        figures.append({"tokens": width, "milliseconds": 1000 * median, "ratio": median / one})
        print(f"{width:>3} tokens in a step: {1000 * median:7.1f} ms, {median / one:.2f} × one token")
    return figures


if __name__ == "__main__":
    raise SystemExit(exit_code(main))
