"""llama.cpp through llama-cpp-python, from the same GGUF file (4-bit weights). It has no batches: one stream."""

from __future__ import annotations

from llama_cpp import Llama
from worker import Generate, serve


def load(folder: str, gguf: str, mode: str) -> Generate:
    model = Llama(gguf, n_ctx=1024, n_threads=2, n_threads_batch=2, verbose=False)

    def generate(texts: list[str], ids: list[list[int]], tokens: int) -> list[int]:
        if len(ids) > 1:
            raise ValueError("llama-cpp-python answers one prompt at a time")
        model.reset()
        made = 0
        for _ in model.generate(ids[0], temp=0.0, top_k=1, repeat_penalty=1.0):
            made += 1
            if made == tokens:
                break
        return [made]

    return generate


serve(load)
