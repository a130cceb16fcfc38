"""This project's engine. Modes: the kind of weights, and after a colon a strategy other than plain decoding."""

from __future__ import annotations

from worker import Generate, serve

import decoding


def load(folder: str, gguf: str, mode: str) -> Generate:
    weights, _, strategy = mode.partition(":")
    lm = decoding.load(folder, weights=weights, capacity=1024)

    def generate(texts: list[str], ids: list[list[int]], tokens: int) -> list[int]:
        lm.forget()
        params = decoding.SamplingParams(max_new_tokens=tokens, ignore_eos=True)
        answers = decoding.generate(ids, lm, strategy=strategy or "autoregressive", params=params)
        return [len(answer.tokens) for answer in answers]

    return generate


serve(load)
